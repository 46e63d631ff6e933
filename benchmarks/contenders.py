"""What is compared: one optimizer in a family of optimizers that are stepped in turn.

The families are put together in `families.py` from ours (`ours.py`), packages (`peers.py`) and the
authors' own code (`official.py`). All of a family run with the same learning rate, rank, gap and
scale, and otherwise with their own defaults unless a builder says why not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer

from benchmarks.shapes import Parameters

LEARNING_RATE = 1e-3
SCALE = 0.25
REFERENCE = "AdamW fused"

Builder = Callable[[Parameters, int, int], Optimizer]


@dataclass(frozen=True)
class Contender:
    """One optimizer of a family.

    Args:
        family: one method, with the rows that it is compared with.
        name: of the method or its variant.
        package: that it comes from, "subspan" for ours.
        build: `build(parameters, rank, gap)` returns it. Peers are optional: what they need is
            imported there, so one that is missing costs only its row.
        phase: 0 where the subspace changes at steps 0, gap, 2*gap, ..., 1 where the counter starts
            at one, so that it happens one step earlier, and None where no step differs from the
            others.
        note: how it was made to run, or has to be read.
        work: what a step has to do, a key of `floors.py`; those with the same are compared. The
            family itself if empty.
        official: the authors' implementation, or the library that the method is known from.
    """

    family: str
    name: str
    package: str
    build: Builder
    phase: int | None = 0
    note: str = ""
    work: str = ""
    official: bool = False

    @property
    def ours(self) -> bool:
        return self.package == "subspan"

    @property
    def reference(self) -> bool:
        """torch's fused AdamW, which runs in every family."""
        return self.name == REFERENCE

    @property
    def label(self) -> str:
        return f"{self.package} {self.name}"

    @property
    def method(self) -> str:
        """Key of `floors.py`."""
        return self.work or self.family
