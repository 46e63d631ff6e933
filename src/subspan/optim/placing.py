"""Where the pieces of a sharded parameter are, and in which of three ways it is updated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
from torch import Tensor

from subspan.optim.composition import Composition
from subspan.subspaces.layout import Layout

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as Cut

Way = Literal["entries", "slices", "whole"]


@dataclass(frozen=True)
class Shard:
    """Where the parts of a parameter are.

    Args:
        dim: the dimension that is cut, in pieces of equal size but for the last ones.
        size: its whole size.
        group: the processes that hold a piece each.
    """

    dim: int
    size: int
    group: dist.ProcessGroup

    @property
    def ranks(self) -> int:
        """Number of pieces."""
        return self.group.size()

    @property
    def chunk(self) -> int:
        """Size of the first piece."""
        return -(-self.size // self.ranks)

    def length(self, rank: int) -> int:
        """Size of a rank's piece, which may be 0."""
        return max(0, min(self.chunk, self.size - rank * self.chunk))

    def piece(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's piece of the whole."""
        start = min(rank * self.chunk, self.size)
        return whole.narrow(self.dim, start, self.length(rank))

    def padded_shape(self, piece: Tensor) -> list[int]:
        """Shape of the first piece, which no other exceeds."""
        shape = list(piece.shape)
        shape[self.dim] = self.chunk
        return shape

    def padded(self, piece: Tensor) -> Tensor:
        """A piece with the size of the first one, filled up with zeros."""
        if piece.shape[self.dim] == self.chunk:
            return piece.contiguous()
        padded = piece.new_zeros(self.padded_shape(piece))
        padded.narrow(self.dim, 0, piece.shape[self.dim]).copy_(piece)
        return padded


@dataclass(frozen=True)
class Place:
    """How one parameter is updated.

    Args:
        shard: where its pieces are; None if every rank holds all of it.
        way: see the module.
        owner: rank within the shard's group that holds the state of a "whole" parameter.
    """

    shard: Shard | None
    way: Way
    owner: int = 0

    @property
    def is_mine(self) -> bool:
        """Whether this rank keeps state for the parameter."""
        return self.shard is None or self.way != "whole" or self.owner == self.shard.group.rank()


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor (without loading torch.distributed.tensor)."""
    return type(tensor).__name__ == "DTensor"


def shard_of(parameter: DTensor, name: str) -> Shard | None:
    """Where the pieces of a parameter are; None if every rank holds all of it.

    Raises:
        ValueError: it is cut along two mesh dimensions, or not in plain pieces.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Cut

    cut = [(d, place) for d, place in enumerate(parameter.placements) if place != Replicate()]
    if not cut:
        return None
    if len(cut) > 1 or type(cut[0][1]) is not Cut:
        raise ValueError(
            f"parameter {name!r} is placed as {parameter.placements}: optimizers take parameters "
            "that are sharded along one mesh dimension (FSDP2, with or without replicas), not two "
            "(tensor parallel on top of FSDP) and not partial sums"
        )
    mesh_dim, place = cut[0]
    assert isinstance(place, Cut)
    dim = place.dim % parameter.dim()
    return Shard(dim, parameter.shape[dim], parameter.device_mesh.get_group(mesh_dim))


def way_of(layout: Layout, parts: Composition, dim: int) -> Way:
    """How a parameter of that (whole) layout is updated when it is cut along `dim`."""
    if parts.elementwise and not parts.storage.low_bit:
        return "entries"
    return "slices" if parts.works_on_slices(layout, dim) else "whole"


def sliced(layout: Layout, way: Way, shard: Shard) -> Layout:
    """The layout of this rank's piece."""
    if way == "whole":
        return layout
    own = list(layout.natural)
    own[shard.dim] = shard.length(shard.group.rank())
    return replace(layout, natural=tuple(own), view=tuple(own), whole=layout.natural)


def local(tensor: Tensor) -> Tensor:
    """A DTensor's piece on this rank, sharing its memory; other tensors as they are."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_placement(
    method: str, *, ranks: int | None = None, **options: Any
) -> Callable[[Tensor], Cut | None]:
    """For FSDP2: which dimension of every matrix to cut so that a method's steps need no exchange.

    FSDP2 cuts rows. A matrix that is projected from the left (fewer rows than columns, for most
    methods) can be updated in pieces only if its columns are cut.

    Args:
        method: name of a registered recipe.
        ranks: number of pieces, over which FSDP2 can cut columns only evenly; None: all processes.
        options: hyper-parameters of the recipe.

    Returns:
        For `fully_shard(..., shard_placement_fn=...)`.

    Example:
        >>> placement = subspan.optim.shard_placement("galore", rank=128)
        >>> fully_shard(model, shard_placement_fn=placement)
        >>> optimizer = subspan.optim.for_model(model, "galore", rank=128)
    """
    from torch.distributed.tensor import Shard as Cut

    from subspan.optim.groups import lay_out
    from subspan.optim.registry import lookup

    recipe = lookup(method)
    recipe.check_options(options)
    group = {**recipe.defaults, **options}
    composition = recipe.compose(group)
    count = dist.get_world_size() if ranks is None else ranks

    def place(parameter: Tensor) -> Cut | None:
        if parameter.dim() != 2 or parameter.shape[1] % count or not composition.selective:
            return None
        layout = lay_out(group, composition, parameter, "", 0, True)
        return Cut(1) if composition.parts_for(layout).works_on_slices(layout, 1) else None

    return place
