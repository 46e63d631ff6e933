"""Parameters that are sharded over processes: FSDP2's DTensors.

Every parameter is updated in one of three ways, chosen once from what its parts declare:

- "entries": the update of an entry depends on that entry alone. Every rank updates its shard, as if
  it were a parameter of its own; nothing is communicated.
- "slices": a projected matrix whose projected side is whole on every rank. Rows (right side) or
  columns (left) of coordinates, moments and residual belong to the rank that holds those of the
  matrix, and project and lift need no other. At a refresh the matrix is gathered on one rank, which
  finds the basis and broadcasts it; every rank keeps the basis. Norms of a matrix are summed.
- "whole": all others. One rank owns the parameter's state; in every step gradient and weight are
  gathered there, one parameter per rank at a time, and the new weight is scattered.

What is gathered in one round is one parameter per rank, never the model. The arithmetic of "whole"
is that of one process; the other two differ from it in the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from subspan.linalg import compute_dtype
from subspan.optim.bucket import FIND, Bucket, is_quantised
from subspan.optim.composition import Composition
from subspan.optim.placing import (
    Place,
    Shard,
    Way,
    is_sharded,
    local,
    shard_of,
    sliced,
    way_of,
)
from subspan.subspaces.bases import Subspace
from subspan.subspaces.finder import Sight
from subspan.subspaces.layout import Layout
from subspan.subspaces.ranks import EnergyRank

if TYPE_CHECKING:
    from subspan.optim.engine import SubspaceOptimizer


@dataclass
class Standin:
    """Plain tensors that stand in for a sharded parameter in a step.

    Args:
        weight: its piece, or a gathered copy of all of it.
        gradient: the same of its gradient.
        blank: whether the whole gradient is zero; None: not known.
        found: the new subspace, found from the whole gradient.
    """

    weight: Tensor
    gradient: Tensor
    blank: bool | None = None
    found: Subspace | None = None


class Sharding:
    """What an optimizer with sharded parameters does around its steps.

    Args:
        optimizer: whose parameters they are.

    Attributes:
        traffic: bytes that this rank has sent, by purpose: "gather", "scatter", "basis", and
            "sums", which counts what it has put into an all-reduce.
    """

    def __init__(self, optimizer: SubspaceOptimizer) -> None:
        self._optimizer = optimizer
        self._standins: dict[Tensor, Standin] = {}
        self.places: dict[Tensor, Place] = {}
        self.traffic: dict[str, int] = {}
        self._load: dict[int, int] = {}  # bytes of state that each rank owns
        self._unowned: dict[Tensor, int] = {}  # the same of parameters that have no owner yet

    # ------------------------------------------------------------------ placing

    def place(
        self, parameter: Tensor, layouts: Sequence[tuple[Layout, Composition]]
    ) -> list[Layout]:
        """Decide how a new parameter is updated; its layouts as this rank sees them.

        Args:
            parameter: new to the optimizer.
            layouts: its layout and parts while active, and while idle if these differ.

        Raises:
            ValueError: its placement, or its parts, cannot be served.
        """
        name = layouts[0][0].name
        shard = shard_of(parameter, name)  # type: ignore[arg-type]
        if any(isinstance(parts.rank, EnergyRank) for _, parts in layouts):
            raise ValueError(
                f"parameter {name!r} is sharded, and rank=EnergyRank compares whole gradients of "
                "all matrices: give a number as rank"
            )
        if is_quantised(local(parameter)):
            raise ValueError(
                f"parameter {name!r} is sharded and held in int8: shard float weights instead"
            )
        if shard is None or shard.ranks == 1:
            self.places[parameter] = Place(None, "entries")
            return [layout for layout, _ in layouts]
        self._check_processes(shard, name)
        ways = {way_of(layout, parts, shard.dim) for layout, parts in layouts}
        way: Way = ways.pop() if len(ways) == 1 else "whole"
        if way == "whole":
            slots = layouts[0][1].slots(layouts[0][0], parameter.dtype).values()
            size = sum(torch.Size(shape).numel() * kind.itemsize for _, (shape, kind) in slots)
            self._unowned[parameter] = max(size, 1)
        self.places[parameter] = Place(shard, way)
        return [sliced(layout, way, shard) for layout, _ in layouts]

    def share_out(self) -> None:
        """Give every new "whole" parameter an owner: the largest state first, to who has least."""
        for parameter in sorted(self._unowned, key=self._unowned.__getitem__, reverse=True):
            owner = min(range(self.ranks), key=lambda rank: self._load.get(rank, 0))
            self._load[owner] = self._load.get(owner, 0) + self._unowned[parameter]
            self.places[parameter] = replace(self.places[parameter], owner=owner)
        self._unowned.clear()

    def forget(self, parameter: Tensor) -> None:
        """Drop a parameter that was refused after all."""
        self.places.pop(parameter, None)
        self._unowned.pop(parameter, None)

    def _check_processes(self, shard: Shard, name: str) -> None:
        """Refuse a parameter that other processes share than the parameters before it."""
        if self.group is None:
            return
        before, now = (dist.get_process_group_ranks(g) for g in (self.group, shard.group))
        if before != now:
            raise ValueError(
                f"parameter {name!r} is sharded over processes {now}, others over {before}: give "
                "each mesh an optimizer of its own"
            )

    def place_of(self, parameter: Tensor) -> Place:
        """How a parameter is updated; one that is not sharded like a piece of its own."""
        return self.places.get(parameter, _WHOLE_HERE)

    def is_mine(self, parameter: Tensor) -> bool:
        """Whether this rank keeps state for a parameter."""
        return self.place_of(parameter).is_mine

    def keeps_way(self, parameter: Tensor, layout: Layout, parts: Composition) -> bool:
        """Whether other parts could still update a parameter in the way that was chosen for it."""
        place = self.place_of(parameter)
        if place.shard is None or place.way == "whole":
            return True
        whole = replace(layout, natural=layout.whole or layout.natural, whole=None)
        return way_of(replace(whole, view=whole.natural), parts, place.shard.dim) == place.way

    def as_placed(self, parameter: Tensor, layout: Layout) -> Layout:
        """This rank's view of a whole layout of a parameter that has a place."""
        place = self.place_of(parameter)
        if place.shard is None:
            return layout
        return sliced(layout, place.way, place.shard)

    def weight(self, parameter: Tensor) -> Tensor:
        """What stands in for a weight now; outside a step its piece."""
        standin = self._standins.get(parameter)
        return local(parameter) if standin is None else standin.weight

    def standin(self, parameter: Tensor) -> Standin:
        """What stands in for a parameter that has a gradient."""
        standin = self._standins.get(parameter)
        return standin or Standin(local(parameter), self._gradient(parameter))

    # ------------------------------------------------------------------ the step

    def presented(
        self, parameters: Sequence[Tensor], group: dict[str, Any], parts: Composition
    ) -> Iterator[list[Tensor]]:
        """Lists of parameters whose stand-ins are at hand until the next list is asked for.

        All ranks must ask for all of them. First come those that are updated in place, then, in
        rounds, those that are gathered: each rank gets the one that it owns.
        """
        near = [p for p in parameters if self.place_of(p).way != "whole"]
        for parameter in near:
            self._standins[parameter] = self.standin(parameter)
        try:
            self._refresh(near, group, parts)
            yield near
            self._standins.clear()
            for members in self._rounds([p for p in parameters if self.place_of(p).way == "whole"]):
                yield self._gather_round(members)
                self._scatter_round(members)
                self._standins.clear()
        finally:
            self._standins.clear()

    def _gradient(self, parameter: Tensor) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        if is_sharded(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
            gradient = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
        return local(gradient)

    def _rounds(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """At most one parameter of every owner at a time."""
        queues: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            queues.setdefault(self.places[parameter].owner, []).append(parameter)
        for turn in range(max(map(len, queues.values()), default=0)):
            yield [queue[turn] for _, queue in sorted(queues.items()) if turn < len(queue)]

    def _gather_round(self, members: Sequence[Tensor]) -> list[Tensor]:
        owners = [self.places[p].owner for p in members]
        weights = self._gather([local(p) for p in members], members, owners)
        gradients = self._gather([self._gradient(p) for p in members], members, owners)
        for parameter, weight in weights.items():
            self._standins[parameter] = Standin(weight, gradients[parameter])
        return list(weights)

    def _gather(
        self, pieces: Sequence[Tensor], members: Sequence[Tensor], targets: Sequence[int]
    ) -> dict[Tensor, Tensor]:
        """Gather pieces of some parameters, each on its own rank; those that this rank has got."""
        pending, mine = [], {}
        for piece, parameter, target in zip(pieces, members, targets, strict=True):
            shard = self._shard(parameter)
            padded, receive = shard.padded(piece), None
            if target == shard.group.rank():
                receive = padded.new_empty((shard.ranks, *padded.shape))
                mine[parameter] = receive
            else:
                self._count("gather", padded)
            pieces_of = None if receive is None else list(receive.unbind())
            pending.append(
                dist.gather(padded, pieces_of, group=shard.group, group_dst=target, async_op=True)
            )
        _wait(pending)
        return {p: _joined(received, self._shard(p)) for p, received in mine.items()}

    def _scatter_round(self, members: Sequence[Tensor]) -> None:
        """Give every rank its piece of the weights that were updated elsewhere."""
        pending, received = [], []
        for parameter in members:
            place, shard, piece = self.places[parameter], self._shard(parameter), local(parameter)
            receive = piece.new_empty(shard.padded_shape(piece))
            send = None
            if place.is_mine:
                weight = self._standins[parameter].weight
                send = [shard.padded(shard.piece(weight, rank)) for rank in range(shard.ranks)]
                self._count("scatter", *send[1:])
            pending.append(
                dist.scatter(receive, send, group=shard.group, group_src=place.owner, async_op=True)
            )
            received.append((piece, receive.narrow(shard.dim, 0, piece.shape[shard.dim])))
        _wait(pending)
        for piece, new in received:
            piece.copy_(new)

    def _shard(self, parameter: Tensor) -> Shard:
        shard = self.places[parameter].shard
        assert shard is not None
        return shard

    def _count(self, purpose: str, *tensors: Tensor) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.traffic[purpose] = self.traffic.get(purpose, 0) + size

    # ------------------------------------------------------------------ refreshes of slices

    def _refresh(
        self, parameters: Sequence[Tensor], group: dict[str, Any], parts: Composition
    ) -> None:
        """Find the subspaces that are due, each from its whole gradient on one rank."""
        from subspan.optim.collect import refresh_is_due, state_of

        finder = parts.finder
        if finder is None or not finder.reads_gradient:
            return
        due = []
        for parameter in parameters:
            if self.place_of(parameter).way == "slices":
                state = state_of(self._optimizer, parameter, parts, group)
                if refresh_is_due(self._optimizer, parameter, parts, state):
                    due.append(parameter)
        if not due:
            return
        blank = self.agree([~self._standins[p].gradient.any() for p in due], everyone=True)
        for parameter, is_blank in zip(due, blank, strict=True):
            standin = self._standins[parameter]
            standin.blank = is_blank
            if is_blank and not self._optimizer.state[parameter]["refreshed"]:
                # As one process does: any basis, until there is a gradient to look at.
                layout = self._optimizer.layout_of(parameter)
                zero = torch.zeros(layout.whole or (), device=standin.weight.device)
                standin.found = self._find(parameter, zero, None, group, parts)
        due = [p for p, is_blank in zip(due, blank, strict=True) if not is_blank]
        for start in range(0, len(due), self.ranks):
            self._find_round(due[start : start + self.ranks], group, parts)

    def _find_round(
        self, members: Sequence[Tensor], group: dict[str, Any], parts: Composition
    ) -> None:
        """Find one subspace on every rank and broadcast them."""
        finder = parts.finder
        assert finder is not None
        gradients = [self._with_error(parameter) for parameter in members]
        gathered = self._gather(gradients, members, range(len(members)))
        momenta = self._gather_momenta(members, parts)
        pending, arriving = [], []
        for rank, parameter in enumerate(members):
            bucket, packed = self._bucket(parameter), {}
            layout, shard = bucket.layout, self._shard(parameter)
            if parameter in gathered:
                whole = gathered[parameter], momenta.get(parameter)
                found = self._find(parameter, *whole, group, parts)
                packed = {name: value.contiguous() for name, value in finder.pack(found).items()}
                self._count("basis", *(list(packed.values()) * (shard.ranks - 1)))
            for item in finder.declare(layout):
                if parameter not in gathered:
                    kind = torch.int64 if item.dtype == torch.int32 else bucket.dtype
                    shape = layout.shape(item.shape)
                    packed[item.name] = torch.empty(shape, dtype=kind, device=bucket.device)
                pending.append(
                    dist.broadcast(
                        packed[item.name], group=shard.group, group_src=rank, async_op=True
                    )
                )
            arriving.append((parameter, packed, bucket))
        _wait(pending)
        for parameter, packed, bucket in arriving:
            found = finder.unpack(packed, bucket.layout, bucket.dtype, bucket.device)
            self._standins[parameter].found = found

    def _with_error(self, parameter: Tensor) -> Tensor:
        """A piece of the gradient with the error that is fed back to it."""
        gradient = self._standins[parameter].gradient
        error = self._optimizer.state[parameter].get("error")
        if error is None:
            return gradient
        dtype = compute_dtype(gradient.dtype)
        return gradient.to(dtype) + error.to(dtype)

    def _bucket(self, parameter: Tensor) -> Bucket:
        state, layout = self._optimizer.state[parameter], self._optimizer.layout_of(parameter)
        return Bucket([local(parameter)], [], [state], [layout], state["step"] + 1, 1)

    def _gather_momenta(
        self, members: Sequence[Tensor], parts: Composition
    ) -> dict[Tensor, Tensor]:
        """First moments for finders that read them; those that this rank needs."""
        finder, name = parts.finder, parts.inner.first_moment
        if finder is None or not finder.reads_momentum or name is None:
            return {}
        pieces, owners, targets = [], [], []
        for rank, parameter in enumerate(members):
            state = self._optimizer.state[parameter]
            # As in one process: none at the first refresh, or when the moments start with it.
            if state["refreshed"] and state["step"] > state.get("restarted", 0):
                pieces.append(state[name])
                owners.append(parameter)
                targets.append(rank)
        return self._gather(pieces, owners, targets)

    def _find(
        self,
        parameter: Tensor,
        gradient: Tensor,
        momentum: Tensor | None,
        group: dict[str, Any],
        parts: Composition,
    ) -> Subspace:
        """The subspace that one process would find."""
        finder, bucket = parts.finder, self._bucket(parameter)
        assert finder is not None and bucket.layout.whole is not None
        whole = bucket.layout.whole
        layout = replace(bucket.layout, natural=whole, view=whole, whole=None)
        state = bucket.load()
        previous = None
        if state["refreshed"][0]:
            previous = finder.unpack(state, layout, bucket.dtype, bucket.device)
        if momentum is not None:
            age = bucket.step - state.get("restarted", [0])[0]
            momentum = momentum.to(bucket.dtype) * parts.inner.momentum_correction(age - 1)
        seeds = bucket.seeds(group["seed"], FIND)
        gradient = gradient.to(bucket.dtype)
        return finder.find(
            Sight(gradient, layout, [layout], previous, momentum, seeds, state, bucket.step)
        )

    # ------------------------------------------------------------------ agreeing

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes that share the parameters; None if no parameter is cut."""
        shards = (place.shard for place in self.places.values())
        return next((shard.group for shard in shards if shard is not None), None)

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return 0 if self.group is None else self.group.rank()

    @property
    def ranks(self) -> int:
        """How many they are."""
        return 1 if self.group is None else self.group.size()

    def sum_scalars(self, parameters: Sequence[Tensor]) -> None:
        """Make sums over a piece, which are states without dimensions, sums over the parameter."""
        places = ((p, self.place_of(p)) for p in parameters)
        partial = [p for p, place in places if place.shard and place.way == "entries"]
        sums = [
            value
            for p in partial
            for value in self._optimizer.state[p].values()
            if isinstance(value, Tensor) and not value.dim()
        ]
        if sums:
            for value, total in zip(sums, self.total(torch.stack(sums)).unbind(), strict=True):
                value.copy_(total)

    def total(self, value: Tensor) -> Tensor:
        """The sum over all ranks of a number per matrix, in place."""
        self._count("sums", value)
        dist.all_reduce(value, group=self.group)
        return value

    def agree(self, flags: Sequence[bool | Tensor], *, everyone: bool) -> list[bool]:
        """For each flag, whether it is set on some rank, or on every one."""
        group = self.group
        if group is None or not flags:
            return [bool(flag) for flag in flags]
        device = self._optimizer.param_groups[0]["params"][0].device
        seen = torch.stack([torch.as_tensor(flag, device=device).to(torch.int32) for flag in flags])
        self._count("sums", seen)
        dist.all_reduce(seen, dist.ReduceOp.MIN if everyone else dist.ReduceOp.MAX, group=group)
        return [bool(flag) for flag in seen.tolist()]


_WHOLE_HERE = Place(None, "entries")


def _wait(pending: Sequence[dist.Work | None]) -> None:
    for work in pending:
        if work is not None:
            work.wait()


def _joined(received: Tensor, shard: Shard) -> Tensor:
    """The whole tensor of the padded pieces (ranks, ...)."""
    if shard.dim == 0:
        return received.flatten(0, 1)[: shard.size]
    whole = torch.cat(list(received.unbind()), shard.dim)
    return whole.narrow(shard.dim, 0, shard.size).contiguous()
