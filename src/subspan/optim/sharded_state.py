"""State of sharded parameters in checkpoints: DTensors, which torch.distributed.checkpoint saves in
pieces and loads on any number of processes.

In a checkpoint every state tensor has the shape that it has in one process:

- states of "entries" and "slices" that are cut with the parameter are DTensors of the parameter's
  own placement; bases and norms are the same on every rank and stay plain tensors;
- states of "whole" parameters, which one rank holds, are handed out in equal pieces along their
  first dimension, so that no rank has to write more than its share.

So a checkpoint of any number of processes loads in any other number, one included. All ranks must
take part in saving and loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from subspan.optim.placing import Place, Shard, is_sharded, local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

    from subspan.optim.roster import Roster

State = dict[str, Any]
# What every rank keeps of a parameter that another one owns.
_COMMON = ("period", "active", "kept_step")


def spread(optimizer: Roster, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose tensors are DTensors, or plain and the same on every rank.

    Args:
        optimizer: whose state it is.
        state_dict: as torch.optim makes it: what this rank holds.
    """
    members = dict(_numbered(optimizer))
    held: dict[int, State] = state_dict["state"]
    assert optimizer.sharding is not None
    owned = {
        number: {name: _outline(value) for name, value in held.get(number, {}).items()}
        for number, parameter in members.items()
        if optimizer.sharding.place_of(parameter).way == "whole"
        and optimizer.sharding.is_mine(parameter)
    }
    gathered: list[Any] = [None] * optimizer.sharding.ranks
    dist.all_gather_object(gathered, owned, group=optimizer.sharding.group)
    outlines = {number: outline for part in gathered for number, outline in part.items()}
    spread_state: dict[int, State] = {}
    for number, parameter in members.items():
        place = optimizer.sharding.place_of(parameter)
        own = held.get(number, {})
        if place.shard is None:
            state = own
        elif place.way == "whole":
            state = _handed_out(parameter, place, own, outlines[number])
        else:
            state = _as_cut(optimizer, parameter, place, own)
        if state:
            spread_state[number] = state
    return {**state_dict, "state": spread_state}


def gather(optimizer: Roster, parameter: Tensor, saved: Mapping[str, Any]) -> State:
    """A parameter's saved state as this rank sees it: its pieces, or all that an owner holds.

    All ranks get the same of a "whole" parameter, so that all refuse what does not fit; see `kept`.

    Args:
        optimizer: whose parameter it is.
        parameter: of the optimizer.
        saved: its entry of a state dict: DTensors, or whole tensors.
    """
    assert optimizer.sharding is not None
    place = optimizer.sharding.place_of(parameter)
    if place.shard is None or place.way == "whole":
        return {name: _full(value) for name, value in saved.items()}
    cuts = _cuts(optimizer, parameter, place.shard)
    return {
        name: _piece(value, place.shard, cuts.get(name), parameter)  # type: ignore[arg-type]
        for name, value in saved.items()
    }


def kept(optimizer: Roster, parameter: Tensor, state: State) -> State:
    """What this rank keeps of a state that `gather` returned."""
    assert optimizer.sharding is not None
    if optimizer.sharding.is_mine(parameter):
        return state
    return {name: value for name, value in state.items() if name in _COMMON}


def _numbered(optimizer: Roster) -> Iterator[tuple[int, Tensor]]:
    """The parameters with their numbers in a state dict."""
    return enumerate(p for group in optimizer.param_groups for p in group["params"])


def _outline(value: Any) -> Any:
    """A number itself, of a tensor its shape and dtype."""
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _is_outline(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.dtype)


def _placements(parameter: DTensor, dim: int) -> list[Placement]:
    """The parameter's, with its pieces along `dim`."""
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate() if p == Replicate() else Shard(dim) for p in parameter.placements]


def _dtensor(piece: Tensor, parameter: DTensor, shard: Shard) -> DTensor:
    from torch.distributed.tensor import DTensor

    shape = list(piece.shape)
    shape[shard.dim] = shard.size
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        piece,
        parameter.device_mesh,
        _placements(parameter, shard.dim),
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def _handed_out(parameter: Tensor, place: Place, own: State, outline: State) -> State:
    """The owner's state in equal pieces; scalars and numbers on every rank."""
    assert place.shard is not None
    group, found = place.shard.group, dict(outline)
    for name, about in outline.items():
        if not _is_outline(about):
            continue
        shape, dtype = about
        value = own[name] if place.is_mine else None
        if not shape:
            number = torch.empty((), dtype=dtype, device=parameter.device)
            if value is not None:
                number.copy_(value)
            dist.broadcast(number, group=group, group_src=place.owner)
            found[name] = number
            continue
        shard = Shard(0, shape[0], group)
        receive = torch.empty((shard.chunk, *shape[1:]), dtype=dtype, device=parameter.device)
        send = None
        if value is not None:
            send = [shard.padded(shard.piece(value, rank)) for rank in range(shard.ranks)]
        dist.scatter(receive, send, group=group, group_src=place.owner)
        piece = receive[: shard.length(group.rank())]
        found[name] = _dtensor(piece, parameter, shard)  # type: ignore[arg-type]
    return found


def _cuts(optimizer: Roster, parameter: Tensor, shard: Shard) -> dict[str, int]:
    """The dimension along which each state is cut with the parameter; absent: not at all."""
    from dataclasses import replace

    layout, parts = optimizer.layout_of(parameter), optimizer.parts_of(parameter)
    if parts is None:
        return {}
    whole = replace(layout, natural=tuple(parameter.shape), view=tuple(parameter.shape))
    larger = list(parameter.shape)
    larger[shard.dim] += 1
    grown = replace(layout, natural=tuple(larger), view=tuple(larger))
    before, after = (parts.slots(each, parameter.dtype) for each in (whole, grown))
    found = {}
    for name, (_, (shape, _)) in before.items():
        changed = [
            d for d, (a, b) in enumerate(zip(shape, after[name][1][0], strict=True)) if a != b
        ]
        if changed:
            found[name] = changed[0]
    return found


def _as_cut(optimizer: Roster, parameter: Tensor, place: Place, own: State) -> State:
    """States that are cut as DTensors of the same pieces."""
    assert place.shard is not None
    cuts = _cuts(optimizer, parameter, place.shard)
    found = dict(own)
    for name, dim in cuts.items():
        if name in own:
            shard = Shard(dim, place.shard.size, place.shard.group)
            found[name] = _dtensor(own[name], parameter, shard)  # type: ignore[arg-type]
    return found


def _full(value: Any) -> Any:
    return value.full_tensor() if is_sharded(value) else value


def _piece(value: Any, shard: Shard, dim: int | None, parameter: DTensor) -> Any:
    """This rank's piece of a state along `dim`."""
    if not isinstance(value, Tensor) or dim is None:
        return _full(value)
    if is_sharded(value):
        return local(value.redistribute(placements=_placements(parameter, dim)))  # type: ignore[attr-defined]
    return Shard(dim, shard.size, shard.group).piece(value, shard.group.rank())
