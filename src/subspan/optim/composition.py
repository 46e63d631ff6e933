"""A recipe's result: one choice of every part, checked for parts that disagree."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch

from subspan.optim.parts.activity import Activity
from subspan.optim.parts.inner import Inner
from subspan.optim.parts.normaliser import Normaliser
from subspan.optim.parts.output import (
    Discard,
    ErrorFeedback,
    Lift,
    Remainder,
    RescaledGradient,
    SignedLift,
    Stateless,
)
from subspan.optim.parts.refresh import Every, Refresh
from subspan.optim.parts.storage import Codec, Slot, Storage
from subspan.optim.parts.transport import Keep
from subspan.subspaces.finders import Finder
from subspan.subspaces.layout import PROJECTION_TYPES, Layout, StateDeclaration, check_rank
from subspan.subspaces.ranks import EnergyRank

Output = Lift | SignedLift | RescaledGradient


@dataclass(frozen=True)
class Composition:
    """One method as a choice of parts.

    Args:
        inner: runs on the coordinates.
        plain: runs on parameters that are not projected; the inner optimizer if None.
        finder: where the subspace comes from; None: no subspace, the inner optimizer sees the whole
            gradient.
        rank: dimension of the subspace, a fraction of the smaller dimension, or an `EnergyRank`.
        proj_type: which side is projected: std, reverse_std, left, right, full or entries.
        tie: the side that "std" takes for square matrices.
        refresh: when the finder runs again.
        transport: what happens to the moments then.
        output: how the update is made.
        remainder: what is done with the residual.
        normaliser: scaling of the gradient before it is projected, or of the lifted update.
        activity: which projected parameters are active in a period.
        idle: the parts of those that are not; None: they rest.
        tensors: the parts of projected weights with more than two dimensions; None: they are read
            as matrices.
        tensors_above: with `tensors`, such weights of at most so many entries are not projected.
        modes: with proj_type "tucker", how many leading modes have a basis; None for all.
        complement: the inner optimizer works, in full size, on what lies outside the subspace.
        gain: factor on the coordinates.
        lr_scale: factor on the learning rate of projected parameters (weight decay keeps the
            unscaled one).
        parameter_scale: if given, the learning rate is multiplied with `max(parameter_scale,
            rms(W))`.
        normalises_all: the normaliser also serves what is not projected.
        clip_rms: if given, the full-size update is divided by `max(1, rms(update) / clip_rms)`.
        storage: formats of the state.

    Raises:
        ValueError: if two parts disagree; the message names both.
    """

    inner: Inner
    plain: Inner | None = None
    finder: Finder | None = None
    rank: int | float | EnergyRank = 1
    proj_type: str = "std"
    tie: Literal["left", "right"] = "right"
    refresh: Refresh = field(default_factory=Refresh)
    transport: Keep = field(default_factory=Keep)
    output: Output = field(default_factory=Lift)
    remainder: Remainder = field(default_factory=Discard)
    normaliser: Normaliser | None = None
    activity: Activity | None = None
    idle: Composition | None = None
    tensors: Composition | None = None
    tensors_above: int = 0
    modes: int | None = None
    complement: bool = False
    gain: float = 1.0
    lr_scale: float = 1.0
    parameter_scale: float | None = None
    normalises_all: bool = True
    clip_rms: float | None = None
    storage: Storage = field(default_factory=Storage)

    def __post_init__(self) -> None:
        if self.finder is not None and not isinstance(self.rank, EnergyRank):
            check_rank(self.rank)
        if self.proj_type not in PROJECTION_TYPES:
            raise ValueError(
                f"proj_type={self.proj_type!r} is not known: use one of "
                f"{', '.join(PROJECTION_TYPES)}"
            )
        for complaint in self._disagreements():
            raise ValueError(complaint)

    def _disagreements(self) -> list[str]:
        """Every pair of parts that cannot work together, in words."""
        if self.idle is not None and self.activity is None and not self.inner.concludes:
            return ["idle has no activity that would make a parameter idle"]
        if self.inner.concludes and self.activity is not None:
            return [
                f"inner {_name(self.inner)} decides itself when a parameter is idle; it cannot be "
                f"combined with activity {_name(self.activity)}"
            ]
        if self.finder is None:
            return self._without_finder()
        found: list[str] = []
        found += self._projection_disagreements(self.finder)
        found += self._moment_disagreements(self.finder)
        if (
            self.clip_rms is not None
            and isinstance(self.remainder, Stateless)
            and self.remainder.rule == "sign"
        ):
            found.append(
                "clip_rms rescales the whole update and cannot be combined with remainder "
                "Stateless('sign')"
            )
        return found

    def _without_finder(self) -> list[str]:
        """Parts that need a subspace where there is none."""
        found = []
        if not isinstance(self.output, Lift):
            found.append(
                "output RescaledGradient needs a finder: without a subspace there is nothing to "
                "compare"
            )
        if not isinstance(self.remainder, Discard):
            found.append(
                f"remainder {_name(self.remainder)} needs a finder: without one nothing is "
                "left over"
            )
        return found

    def _projection_disagreements(self, finder: Finder) -> list[str]:
        """Parts that the projection type or the output leaves without what they need."""
        found = []
        modes = self.proj_type == "tucker"
        one_basis = finder.form == "dense" and self.proj_type not in ("full", "entries", "tucker")
        if isinstance(self.rank, EnergyRank) and not (one_basis and finder.reads_gradient):
            found.append(
                f"rank EnergyRank and finder {_name(finder)}: ranks by energy need a stored basis "
                "on one side, found from gradients"
            )
        two_sided, entries = self.proj_type == "full" or modes, self.proj_type == "entries"
        if modes != (finder.form == "modes"):
            found.append(
                f"proj_type={self.proj_type!r} and finder {_name(finder)}: one basis per mode of a "
                "tensor needs proj_type='tucker' and a finder of Tucker factors"
            )
            return found
        if self.complement and (two_sided or entries or not isinstance(self.output, Lift)):
            found.append("complement needs one projected side and output Lift")
        if self.complement and not isinstance(self.remainder, Discard):
            found.append(f"complement leaves remainder {_name(self.remainder)} nothing")
        if two_sided and not modes and not finder.supports_both_sides:
            found.append(
                f"finder {_name(finder)} has no two-sided form, which proj_type='full' asks for"
            )
        if entries and finder.form != "coordinates":
            found.append(
                f"finder {_name(finder)} cannot choose entries, which proj_type='entries' asks for"
            )
        if (two_sided or entries) and self.remainder.one_sided and not modes:
            found.append(
                f"remainder {_name(self.remainder)} scales columns or rows; "
                f"proj_type={self.proj_type!r} has neither"
            )
        if (
            (two_sided or entries)
            and isinstance(self.output, RescaledGradient)
            and self.output.granularity == "channel"
        ):
            found.append(
                "output RescaledGradient('channel') needs one projected side, not "
                f"proj_type={self.proj_type!r}"
            )
        if not self.output.lifts and not isinstance(self.remainder, Discard):
            found.append(
                f"output RescaledGradient never lifts, so remainder {_name(self.remainder)} has no "
                "residual"
            )
        if entries and self.transport.moves:
            found.append(
                f"transport {_name(self.transport)} needs a change of basis, which "
                "proj_type='entries' does not define"
            )
        if entries and self.inner.needs_matrix:
            found.append(
                f"inner {_name(self.inner)} needs matrices; the coordinates of proj_type='entries' "
                "are a vector"
            )
        return found

    def _moment_disagreements(self, finder: Finder) -> list[str]:
        """Parts that read or move moments which the inner optimizer does not keep."""
        found = []
        if finder.reads_momentum and self.inner.first_moment is None:
            found.append(
                f"finder {_name(finder)} reads a first moment, which inner {_name(self.inner)} "
                "does not keep"
            )
        if self.transport.moves and self.inner.first_moment is None:
            found.append(
                f"transport {_name(self.transport)} has nothing to move: inner {_name(self.inner)} "
                "keeps no moment"
            )
        moves_all = self.transport.moves and self.transport.needs_second
        if moves_all and type(self.inner).__name__ == "Adafactor":
            found.append(
                f"transport {_name(self.transport)} cannot move inner Adafactor's factored second "
                "moment"
            )
        return found

    @property
    def takes_all(self) -> bool:
        """Whether every parameter of a model belongs to it, not only the blocks' matrices."""
        return self.activity is not None and self.activity.takes_all

    @property
    def selective(self) -> bool:
        """Whether blocks' matrices are treated differently from all other parameters."""
        own = self.finder is not None or self.activity is not None or self.normaliser is not None
        return own or self.inner.needs_matrix or self.plain not in (None, self.inner)

    def parts_for(self, layout: Layout) -> Composition:
        """The composition that updates a parameter of that layout, while it is active."""
        if layout.projected:
            higher = self.tensors is not None and len(layout.natural) > 2
            return self.tensors if higher else self  # type: ignore[return-value]
        return self.plain_matrices if len(layout.natural) >= 2 else self.plain_vectors

    @cached_property
    def plain_matrices(self) -> Composition:
        """The same inner optimizer, plainly, for matrices that are not projected."""
        inner = self.plain or (self.inner.fallback() if self.inner.needs_matrix else self.inner)
        return Composition(
            inner,
            parameter_scale=self.parameter_scale,
            clip_rms=self.clip_rms,
            normaliser=self.normaliser if self.normalises_all else None,
            storage=self.storage,
        )

    @cached_property
    def plain_vectors(self) -> Composition:
        """The same for vectors and scalars.

        Inner optimizers of matrices hand these to their fallback.
        """
        return replace(self.plain_matrices, inner=self.plain_matrices.inner.fallback())

    def declarations(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """All state that a parameter of that layout keeps, in a fixed order."""
        declared = list(self.inner.declare(layout))
        if self.finder is not None:
            declared += self.finder.declare(layout)
            declared += self.refresh.declare(layout)
        declared += self.remainder.declare(layout) if self.finder is not None else ()
        declared += self.output.declare(layout)
        if self.normaliser is not None:
            declared += self.normaliser.declare(layout)
        return tuple(declared)

    def slots(self, layout: Layout, parameter: torch.dtype) -> dict[str, tuple[str, Slot]]:
        """Every tensor that a parameter's state consists of: name -> kind, (shape, dtype)."""
        return {
            name: (item.kind, slot)
            for item in self.declarations(layout)
            for name, slot in self.storage.slots(item, layout, parameter).items()
        }

    @property
    def elementwise(self) -> bool:
        """Whether the update of an entry depends on that entry alone.

        Tensors may then be cut anywhere.
        """
        whole = self.finder is None and self.normaliser is None
        return (
            whole
            and self.inner.elementwise
            and self.parameter_scale is None
            and self.clip_rms is None
        )

    def works_on_slices(self, layout: Layout, dim: int) -> bool:
        """Whether the pieces of a matrix cut along `dim` can be updated apart from each other.

        Rows (columns) of coordinates, moments and residual then belong to those of the matrix; only
        the basis, which every piece needs whole, and norms of the matrix are common.

        Args:
            layout: of the whole parameter.
            dim: 0 or 1.
        """
        if len(layout.natural) > 2 or not self._steps_on_slices(layout, dim):
            return False
        finder = self.finder
        if finder is None:
            return True
        planned = type(self.refresh)
        return (
            layout.side == ("right", "left")[dim]
            # Sending a new basis to all ranks in every step costs more than gathering the matrix.
            and not (finder.reads_gradient and finder.form == "dense" and self.refresh == Every(1))
            and not finder.follows
            and all(item.kind == "basis" for item in finder.declare(layout))
            and planned.drifted is Refresh.drifted
            and planned.found is Refresh.found
            and not planned.declare(self.refresh, layout)
            and self.remainder.works_on_slices
            and not self.complement
        )

    def _steps_on_slices(self, layout: Layout, dim: int) -> bool:
        """The same of all that has nothing to do with a subspace."""
        normaliser = self.normaliser
        return (
            self.inner.elementwise
            and not self.inner.concludes
            and (normaliser is None or normaliser.works_on_slices(layout, dim))
            and self.parameter_scale is None
            and self.clip_rms is None
            and self.activity is None
            and not self.storage.low_bit
        )

    @property
    def shows_bad_gradients(self) -> bool:
        """Whether NaN or infinity in a gradient shows in its coordinates before any state changes.

        Products with a dense basis spread it; chosen coordinates may miss it, and an error buffer,
        or a normaliser that comes first, has taken it up by then.
        """
        mixes = self.finder is not None and self.finder.mixes_entries
        return (
            mixes
            and not self.complement
            and (self.normaliser is None or self.normaliser.after)
            and not isinstance(self.remainder, ErrorFeedback)
        )

    def codecs(self, layout: Layout) -> dict[str, tuple[Codec, StateDeclaration]]:
        """The states of a parameter that are held in few bits, by name."""
        if not self.storage.low_bit:
            return {}
        pairs = ((self.storage.codec(item), item) for item in self.declarations(layout))
        return {item.name: (codec, item) for codec, item in pairs if codec is not None}

    def stored_as(self, storage: Storage) -> Composition:
        """The same parts with their states held in other formats.

        Raises:
            ValueError: if a format cannot hold what a part keeps.
        """
        finder, basis = self.finder, storage.format("basis").name
        if basis == "seed":
            finder = None if finder is None else finder.seeded()
            if finder is None:
                raise ValueError(
                    "storage='seed' cannot hold a basis of "
                    + ("a method without a finder" if self.finder is None else _name(self.finder))
                    + ": only random bases are determined by a seed"
                )
        indices = finder is not None and finder.form in ("coordinates", "columns")
        if indices and basis.startswith("int") and storage.explicit("basis"):
            raise ValueError(
                f"storage={basis!r} cannot hold a basis of {_name(finder)}: it keeps indices"
            )
        idle = None if self.idle is None else self.idle.stored_as(storage)
        tensors = None if self.tensors is None else self.tensors.stored_as(storage)
        return replace(self, storage=storage, finder=finder, idle=idle, tensors=tensors)

    @property
    def needs_whole_gradient(self) -> str | None:
        """Why a step cannot be taken from the coordinates of the gradient alone; None if it can."""
        if self.finder is None:
            return None
        if not isinstance(self.output, Lift) or not isinstance(self.remainder, Discard):
            part = self.remainder if isinstance(self.output, Lift) else self.output
            return f"{_name(part)} needs the whole gradient"
        if self.normaliser is not None:
            return f"normaliser {_name(self.normaliser)} needs the whole gradient"
        if self.complement or self.finder.follows:
            return f"finder {_name(self.finder)} needs the whole gradient in every step"
        if type(self.refresh).drifted is not Refresh.drifted or self.refresh == Every(1):
            return f"refresh {self.refresh!r} needs the whole gradient in every step"
        return None

    @property
    def reads_momentum_loss(self) -> bool:
        """Whether the lifted old momentum is needed at a refresh."""
        return self.remainder.reads_momentum_loss and self.inner.first_moment is not None

    def describe(self) -> dict[str, str]:
        """Part -> its setting in words, for listings; parts that do nothing are left out."""
        shown: dict[str, str] = {}
        for item in fields(self):
            value: Any = getattr(self, item.name)
            idle = isinstance(value, (Discard, Storage)) or value is None
            numeric = item.name in (
                "normalises_all",
                "tensors_above",
                "modes",
                "rank",
                "proj_type",
                "tie",
                "lr_scale",
                "gain",
                "complement",
            )
            if not idle and not numeric and not (item.name == "plain" and value == self.inner):
                shown[item.name] = repr(value)
        if self.finder is None:
            for name in ("refresh", "transport", "output"):
                shown.pop(name, None)
        return shown


def _name(part: object) -> str:
    return type(part).__name__
