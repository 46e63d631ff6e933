"""Storage: in which format states and bases are kept between steps.

All arithmetic is float32 or float64; a format is only how a tensor is held. Low-bit formats hold a
declared state as several plain tensors, `name` (the codes) and companions such as `name_scale`, so
checkpoints need no tensor subclass and load with `weights_only`.

| format | holds | bytes per element |
| --- | --- | --- |
| "parameter" | the parameter's own dtype (float32 for float16 parameters) | 2 or 4 |
| "fp32", "bf16" | that dtype; bf16 moments are written with stochastic rounding | 4, 2 |
| "int8" | dynamic map, a scale per 256; bases: affine, a scale and zero per 256 | 1.02 |
| "int8-linear" | the same with equally spaced levels, for moments and errors | 1.02 |
| "int8-signed" | the same with the signed map also for second moments (COAP, Flora) | 1.02 |
| "int4" | two codes per byte; second moments equally spaced; bases affine | 0.52 |
| "rows8", "rows4" | errors: minimum and step per matrix row (DCT-AdamW) | 1, 0.5 |
| "seed" | bases that a seed determines: nothing | 0 |

Dettmers et al.: 8-bit Optimizers via Block-wise Quantization, 2021, arXiv 2110.02861; Li et al.:
Memory Efficient Optimizers with 4-bit States, 2023, arXiv 2309.01507; Zhang et al.: Q-GaLore, 2024,
arXiv 2407.08296 (bases).

"@n" after a format sets the elements per scale ("int8-signed@4096"); "-released" after rows8 and
rows4 reproduces two faults of the DCT-AdamW code.

int8 rounds as bitsandbytes's CPU kernels do, by way of an even grid without 0. The nearest entry
would be closer on average, but turns second moments below 1.6e-7 of their block's largest into 0,
and steps divide by their root.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from math import ceil, prod
from typing import Protocol

import torch
from torch import Tensor

from subspan.linalg import compute_dtype
from subspan.linalg.affine import dequantise_affine, quantise_affine
from subspan.linalg.codebooks import dynamic_codebook, linear_codebook
from subspan.linalg.quantise import (
    dequantise_blocks,
    pack_nibbles,
    quantise_blocks,
    unpack_nibbles,
)
from subspan.linalg.row_affine import dequantise_rows, quantise_rows
from subspan.subspaces.layout import Kind, Layout, Shape, StateDeclaration

FORMATS = ("parameter", "fp32", "bf16", "int8", "int8-linear", "int8-signed", "int4", "rows8",
           "rows4", "seed")  # fmt: skip
KINDS: tuple[Kind, ...] = ("first_moment", "second_moment", "basis", "error")
BLOCK = 256

Slot = tuple[Shape, torch.dtype]
Slots = dict[str, Slot]
Stored = Mapping[str, Tensor]


class Codec(Protocol):
    """How one state tensor is held as other tensors, by the suffix of their names."""

    @property
    def unit(self) -> int:
        """Elements that share a scale; a flat piece of a state starts at a multiple of it."""

    def slots(self, shape: Shape) -> Slots:
        """Suffix -> shape and dtype of the tensors that hold a state of that shape."""

    def encode(self, value: Tensor, stored: Stored) -> None:
        """Write a value into the tensors that hold it."""

    def decode(self, stored: Stored, shape: Shape, dtype: torch.dtype) -> Tensor:
        """The value that the tensors hold."""


def _codes_slot(count: int, bits: int) -> tuple[Shape, torch.dtype]:
    return (count if bits == 8 else ceil(count / 2),), torch.uint8


@cache
def _codebook(dynamic: bool, signed: bool, bits: int, device: torch.device) -> Tensor:
    """Shared, because the look-up table of a codebook is kept with the tensor."""
    make = dynamic_codebook if dynamic else linear_codebook
    return make(signed, bits).to(device)


@dataclass(frozen=True)
class Blockwise:
    """Nearest entry of a codebook, relative to the largest magnitude of each block.

    Args:
        bits: 8 or 4.
        dynamic: the dynamic map; False for equally spaced levels.
        signed: whether values may be negative.
        unit: elements per block.
    """

    bits: int
    dynamic: bool
    signed: bool
    unit: int = BLOCK

    def slots(self, shape: Shape) -> Slots:
        """See `Codec`."""
        count = prod(shape)
        scales = ((ceil(count / self.unit),), torch.float32)
        return {"": _codes_slot(count, self.bits), "_scale": scales}

    def encode(self, value: Tensor, stored: Stored) -> None:
        """See `Codec`."""
        quantise_blocks(
            value,
            _codebook(self.dynamic, self.signed, self.bits, value.device),
            self.unit,
            codes=stored[""],
            scale=stored["_scale"],
            packed=self.bits == 4,
            grid=self.bits == 8 and self.dynamic,
        )

    def decode(self, stored: Stored, shape: Shape, dtype: torch.dtype) -> Tensor:
        """See `Codec`."""
        codes = stored[""]
        return dequantise_blocks(
            codes,
            stored["_scale"],
            _codebook(self.dynamic, self.signed, self.bits, codes.device),
            self.unit,
            count=prod(shape),
            packed=self.bits == 4,
            dtype=dtype,
        ).view(shape)


@dataclass(frozen=True)
class Affine:
    """Equally spaced levels between the smallest and largest value of each group (Q-GaLore).

    Args:
        bits: 8 or 4.
        unit: elements per group.
    """

    bits: int
    unit: int = BLOCK

    def slots(self, shape: Shape) -> Slots:
        """See `Codec`."""
        count = prod(shape)
        groups = (ceil(count / self.unit),)
        return {
            "": _codes_slot(count, self.bits),
            "_scale": (groups, torch.float32),
            "_zero": (groups, torch.uint8),
        }

    def encode(self, value: Tensor, stored: Stored) -> None:
        """See `Codec`."""
        codes, scale, zero = quantise_affine(value, self.bits, self.unit)
        stored[""].copy_(codes if self.bits == 8 else pack_nibbles(codes))
        stored["_scale"].copy_(scale)
        stored["_zero"].copy_(zero)

    def decode(self, stored: Stored, shape: Shape, dtype: torch.dtype) -> Tensor:
        """See `Codec`."""
        codes = stored[""] if self.bits == 8 else unpack_nibbles(stored[""], prod(shape))
        return dequantise_affine(
            codes, stored["_scale"], stored["_zero"], self.unit, dtype=dtype
        ).view(shape)


@dataclass(frozen=True)
class Rows:
    """Equally spaced levels between the smallest and largest value of each matrix row (DCT-AdamW).

    Args:
        bits: 8 or 4.
        released: reproduce the faults of the released code.
    """

    bits: int
    released: bool = False

    @property
    def unit(self) -> int:
        """A row cannot be cut; error buffers never are."""
        raise TypeError("states held row by row are not cut into pieces")

    def slots(self, shape: Shape) -> Slots:
        """See `Codec`."""
        count, columns = prod(shape[:-1]), shape[-1]
        width = columns if self.bits == 8 else ceil(columns / 2)
        return {
            "": ((count, width), torch.uint8),
            "_low": ((count,), torch.float32),
            "_step": ((count,), torch.float32),
        }

    def encode(self, value: Tensor, stored: Stored) -> None:
        """See `Codec`."""
        out = stored[""], stored["_low"], stored["_step"]
        rows = value.reshape(-1, value.shape[-1])
        quantise_rows(rows, self.bits, as_released=self.released, out=out)

    def decode(self, stored: Stored, shape: Shape, dtype: torch.dtype) -> Tensor:
        """See `Codec`."""
        return dequantise_rows(
            stored[""],
            stored["_low"],
            stored["_step"],
            shape[-1],
            self.bits,
            as_released=self.released,
            dtype=dtype,
        ).view(shape)


_PATTERN = re.compile(
    r"(?P<name>[a-z0-9]+(-linear|-signed)?)(?P<released>-released)?(@(?P<n>\d+))?"
)


@dataclass(frozen=True)
class Format:
    """A parsed format; see the module."""

    name: str
    unit: int = BLOCK
    released: bool = False

    @classmethod
    def parse(cls, text: str) -> Format:
        """From its spelling.

        Raises:
            ValueError: naming it and what is allowed.
        """
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None or match["name"] not in FORMATS:
            raise ValueError(f"storage={text!r} is not known: use one of {', '.join(FORMATS)}")
        name, unit = match["name"], int(match["n"] or BLOCK)
        low_bit = name.startswith("int")
        if match["n"] and (not low_bit or unit < 2 or unit % 2):
            raise ValueError(
                f"storage={text!r}: only int8 and int4 formats have a block size, an even number"
            )
        if match["released"] and not name.startswith("rows"):
            raise ValueError(f"storage={text!r}: only rows8 and rows4 have a released form")
        return cls(name, unit, bool(match["released"]))

    def codec(self, kind: Kind) -> Codec | None:
        """The codec for a kind of state; None if it is held as one tensor of some dtype."""
        if self.name.startswith("rows"):
            return Rows(int(self.name[-1]), self.released)
        if not self.name.startswith("int"):
            return None
        bits = int(self.name[3])
        if kind == "basis":
            return Affine(bits, self.unit)
        second = kind == "second_moment"
        signed = not second or self.name.endswith("-signed")
        # Of 16 levels the dynamic map spends too many near zero for a positive quantity.
        dynamic = not self.name.endswith("-linear") and not (second and bits == 4)
        return Blockwise(bits, dynamic, signed, self.unit)

    def allowed_for(self, kind: str) -> bool:
        """Whether the format can hold that kind of state."""
        if self.name == "seed":
            return kind == "basis"
        if self.name.startswith("rows"):
            return kind == "error"
        return kind != "basis" or not self.name.endswith(("-linear", "-signed"))


@dataclass(frozen=True)
class Storage:
    """The format of every kind of state.

    Args:
        formats: `{kind: format}`, see the module.
        asked: the kinds that the user named one by one.
    """

    formats: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(KINDS, "parameter"))
    asked: tuple[str, ...] = ()

    @classmethod
    def parse(cls, choice: str | Mapping[str, str]) -> Storage:
        """From one format for all kinds that can have it, or a mapping for some of them.

        Raises:
            ValueError: naming the unknown kind or format, or the kind that it cannot hold.
        """
        if isinstance(choice, str):
            single = Format.parse(choice)
            if single.name == "seed" or single.name.startswith("rows"):
                kind = "basis" if single.name == "seed" else "error"
                raise ValueError(
                    f"storage={choice!r} holds only one kind of state: use "
                    f"storage={{{kind!r}: {choice!r}}}"
                )
            plain = choice.partition("-")[0].partition("@")[0]
            chosen: dict[str, str] = {
                kind: choice if single.allowed_for(kind) else plain for kind in KINDS
            }
            return cls(chosen)
        if not isinstance(choice, Mapping):
            raise ValueError(
                f"storage={choice!r} must be one of {', '.join(FORMATS)} or a mapping from kinds "
                "to them"
            )
        for kind, name in choice.items():
            if kind not in KINDS:
                raise ValueError(f"storage kind {kind!r} is not known: use {', '.join(KINDS)}")
            if not Format.parse(name).allowed_for(kind):
                allowed = [text for text in FORMATS if Format(text).allowed_for(kind)]
                raise ValueError(
                    f"storage={name!r} cannot hold a {kind}: use one of {', '.join(allowed)}"
                )
        return cls({kind: choice.get(kind, "parameter") for kind in KINDS}, tuple(choice))

    def explicit(self, kind: str) -> bool:
        """Whether the user chose the format of just that kind."""
        return kind in self.asked

    @cached_property
    def low_bit(self) -> bool:
        """Whether any state is held by a codec."""
        return any(self.format(kind).codec(kind) is not None for kind in KINDS)

    def format(self, kind: str) -> Format:
        """The parsed format of a kind."""
        return Format.parse(self.formats[kind])

    def codec(self, declaration: StateDeclaration) -> Codec | None:
        """The codec of a declared state, or None if it is held as it is."""
        if declaration.dtype != "storage" or declaration.kind == "scalar":
            return None
        return self.format(declaration.kind).codec(declaration.kind)

    def dtype(self, declaration: StateDeclaration, parameter: torch.dtype) -> torch.dtype:
        """The dtype of a declared state that has no codec."""
        if isinstance(declaration.dtype, torch.dtype):
            return declaration.dtype
        parameter = parameter.to_real()  # complex parameters are treated as pairs of real ones
        if declaration.kind == "scalar" or declaration.dtype == "compute":
            return compute_dtype(parameter)
        name = self.format(declaration.kind).name
        if name == "bf16":
            return torch.bfloat16
        if name == "fp32":
            return compute_dtype(parameter)
        return torch.float32 if parameter == torch.float16 else parameter

    def slots(self, declaration: StateDeclaration, layout: Layout, parameter: torch.dtype) -> Slots:
        """Name -> shape and dtype of the tensors that hold a declared state of a parameter."""
        shape, codec = layout.shape(declaration.shape), self.codec(declaration)
        if codec is None:
            return {declaration.name: (shape, self.dtype(declaration, parameter))}
        return {declaration.name + suffix: slot for suffix, slot in codec.slots(shape).items()}
