"""Storage: in which format states and bases are kept between steps.

All arithmetic is float32 or float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from subspan.linalg import compute_dtype
from subspan.subspaces.layout import StateDeclaration

FORMATS = ("parameter", "fp32", "bf16")
KINDS = ("first_moment", "second_moment", "basis", "error")


@dataclass(frozen=True)
class Storage:
    """The format of every kind of state.

    "parameter" is the parameter's own dtype, as in torch.optim, except that float16 parameters keep
    float32 states (squared gradients underflow in float16). "bf16" moments are written with
    stochastic rounding: an average that moves by less than a bf16 step would otherwise stand still.

    Args:
        formats: `{kind: format}`.
    """

    formats: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(KINDS, "parameter"))

    @classmethod
    def parse(cls, choice: str | Mapping[str, str]) -> Storage:
        """From one format for all kinds, or a mapping for some of them.

        Raises:
            ValueError: naming the unknown kind or format and what is allowed.
        """
        if isinstance(choice, str):
            choice = dict.fromkeys(KINDS, choice)
        if not isinstance(choice, Mapping):
            raise ValueError(
                f"storage={choice!r} must be one of {', '.join(FORMATS)} or a mapping from kinds "
                "to them"
            )
        for kind, name in choice.items():
            if kind not in KINDS:
                raise ValueError(f"storage kind {kind!r} is not known: use {', '.join(KINDS)}")
            if name not in FORMATS:
                raise ValueError(f"storage={name!r} is not known: use one of {', '.join(FORMATS)}")
        return cls({kind: choice.get(kind, "parameter") for kind in KINDS})

    def dtype(self, declaration: StateDeclaration, parameter: torch.dtype) -> torch.dtype:
        """The dtype in which a declared state of a parameter of that dtype is kept."""
        if declaration.dtype != "storage":
            return declaration.dtype
        parameter = parameter.to_real()  # complex parameters are treated as pairs of real ones
        if declaration.kind == "scalar":
            return compute_dtype(parameter)
        name = self.formats[declaration.kind]
        if name == "bf16":
            return torch.bfloat16
        if name == "fp32":
            return compute_dtype(parameter)
        return torch.float32 if parameter == torch.float16 else parameter
