"""What a rank holds: its share of the state, and what every rank keeps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from worker_pool import Pool

from subspan.optim import SubspaceOptimizer, build, methods

# As many matrices as eight blocks of a transformer have, all of a size that four ranks can share.
SHAPES = {
    f"block.{block}.{name}.weight": shape
    for block in range(8)
    for name, shape in (("q", (24, 24)), ("up", (48, 24)), ("down", (24, 48)), ("gate", (48, 24)))
} | {"embed.weight": (64, 24), "norm.weight": (64,)}


def after_one_step(mesh: DeviceMesh | None, method: str) -> SubspaceOptimizer:
    def placed(tensor: Tensor) -> Tensor:
        return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])

    torch.manual_seed(0)
    parameters = {n: torch.nn.Parameter(placed(torch.randn(s))) for n, s in SHAPES.items()}
    rank = {"rank": 4} if "rank" in methods()[method].defaults else {}
    optimizer = build(method, list(parameters.items()), **rank)
    for parameter in parameters.values():
        if parameter.requires_grad:
            parameter.grad = placed(torch.randn(parameter.shape))
    optimizer.step()
    return optimizer


def allocated_for(optimizer: SubspaceOptimizer, parameter: Tensor) -> int:
    """Bytes of every tensor in a parameter's state."""
    tensors = [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def allocated(optimizer: SubspaceOptimizer) -> int:
    """The same of all parameters."""
    return sum(allocated_for(optimizer, parameter) for parameter in optimizer.state)


def replicated(optimizer: SubspaceOptimizer) -> int:
    """Bytes of bases and scalars of what is updated in pieces."""
    assert optimizer.sharding is not None
    size = 0
    for parameter, state in optimizer.state.items():
        place, parts = optimizer.sharding.place_of(parameter), optimizer.parts_of(parameter)
        slots = parts.slots(optimizer.layout_of(parameter), parameter.dtype) if parts else {}
        for name, (kind, _) in slots.items():
            value = state.get(name)
            if place.way != "whole" and value is not None:
                common = kind == "basis" or not value.dim()
                size += common * value.numel() * value.element_size()
    return size


def sizes(mesh: DeviceMesh, method: str) -> tuple[int, int, int, int]:
    """Bytes allocated, those of them that every rank keeps, and what `memory()` and
    `state_bytes()` say."""
    optimizer = after_one_step(mesh, method)
    told = optimizer.memory()
    apart = ("weights", "largest_gradient", "all_gradients", "total")
    planned = sum(size for kind, size in told.items() if kind not in apart)
    shapes = [torch.Size(shape) for shape in SHAPES.values()]
    assert told["weights"] == sum(shape.numel() for shape in shapes)  # 4 bytes on 4 ranks
    return (
        allocated(optimizer),
        replicated(optimizer),
        planned,
        optimizer.state_bytes()["total"],
    )


def test_ranks_share_the_state_and_know_how_much_they_hold(pool: Pool, method: str) -> None:
    alone = after_one_step(None, method)
    total = allocated(alone)
    # Who is drawn to have a larger state for a period is not known when the owners are chosen.
    lump = 0
    if alone.composition(0).activity is not None:
        lump = max(allocated_for(alone, parameter) for parameter in alone.state)
    for own, common, planned, told in pool.run(sizes, method, ranks=4):
        assert own == planned == told
        assert own <= 1.05 * (total - common) / 4 + common + lump
