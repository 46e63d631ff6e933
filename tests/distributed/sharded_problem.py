"""The contract suite's problem on several ranks: what the processes of the pool call.

Every function but `alone` is called on all ranks, with their mesh; weights come back from rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from problem import Problem, Tiny
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from subspan.optim import SubspaceOptimizer, build, methods
from subspan.optim.sharded_checkpoint import load_sharded, save_sharded

STEPS, FIRST_SAVE, SECOND_SAVE = 20, 7, 14
Weights = dict[str, Tensor]


def shard(model: Tiny, mesh: DeviceMesh, **how: Any) -> None:
    """FSDP2 on the two equal matrices together, and on the rest."""
    fully_shard([model.first, model.second], mesh=mesh, **how)
    fully_shard(model, mesh=mesh, **how)


def sharded(
    method: str, mesh: DeviceMesh, how: dict[str, Any] | None = None, **options: Any
) -> Problem:
    """The problem with its model sharded, each rank with its share of every batch."""
    # In a mesh of two dimensions all ranks, replicas or not, have data of their own.
    share = (int((mesh.mesh == torch.distributed.get_rank()).nonzero().sum()), mesh.size())
    if mesh.ndim > 1:
        share = (torch.distributed.get_rank(), mesh.size())
    return Problem(method, prepare=partial(shard, mesh=mesh, **(how or {})), share=share, **options)


def whole(problem: Problem) -> Weights:
    """All weights; every rank has to call it."""
    named = problem.model.named_parameters()
    return {name: full(parameter.detach()).clone() for name, parameter in named}


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def difference(first: Weights, second: Weights) -> float:
    """The largest of any parameter, relative to its largest entry."""
    pairs = ((first[name], second[name]) for name in second)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def alone(method: str, parts: Sequence[int] = (1,) * STEPS, noise: float = 0.0) -> Weights:
    """One process.

    Args:
        method: a recipe.
        parts: for every step, the number of parts of the batch whose gradients are summed.
        noise: sum them in reverse, and let the sum be off by a relative error of about so much.
    """
    problem = Problem(method)
    draw = torch.Generator().manual_seed(1)
    for step, count in enumerate(parts):
        problem.optimizer.zero_grad()
        for part in range(count)[:: -1 if noise else 1]:
            problem.share = (part, count)
            (problem.loss(step) / count).backward()
        for parameter in problem.model.parameters():
            if noise and parameter.grad is not None:
                parameter.grad.mul_(1.0 + noise * torch.randn(parameter.shape, generator=draw))
        problem.optimizer.step()
    return whole(problem)


def train(mesh: DeviceMesh, method: str, folder: Path | None = None) -> Weights:
    """All steps; with a folder, a checkpoint is written on the way."""
    problem = sharded(method, mesh)
    problem.run(range(FIRST_SAVE))
    if folder is not None:
        save_sharded(folder, problem.model, problem.optimizer, {"step": FIRST_SAVE})
    problem.run(range(FIRST_SAVE, STEPS))
    return whole(problem)


def resume(mesh: DeviceMesh, method: str, source: Path, target: Path) -> None:
    """From one checkpoint to the next."""
    problem = sharded(method, mesh)
    extra = load_sharded(source, problem.model, problem.optimizer)
    assert extra == {"step": FIRST_SAVE}
    problem.run(range(FIRST_SAVE, SECOND_SAVE))
    save_sharded(target, problem.model, problem.optimizer, {"step": SECOND_SAVE})


def finish(method: str, source: Path) -> Weights:
    """From the second checkpoint to the end, on one process."""
    problem = Problem(method)
    extra = load_sharded(source, problem.model, problem.optimizer)
    assert extra == {"step": SECOND_SAVE}
    problem.run(range(SECOND_SAVE, STEPS))
    return whole(problem)


# ---------------------------------------------------------------------- given gradients

SHAPES = {
    "embed.weight": (30, 12),
    "block.0.q.weight": (24, 12),
    "block.0.down.weight": (12, 20),
    "block.0.norm.weight": (12,),
    "block.0.gate.weight": (2,),
    "block.1.q.weight": (13, 12),
    "block.1.square.weight": (12, 12),
    "block.1.few.weight": (2, 12),
    "lm_head.weight": (30, 12),
}


def given_gradients(step: int) -> Weights:
    """Of fast falling spectra, so that subspaces are well defined."""
    draw = torch.Generator().manual_seed(100 + step)
    gradients = {}
    for name, shape in SHAPES.items():
        decay = 0.7 ** torch.arange(shape[-1]) if len(shape) == 2 else 1.0
        gradients[name] = torch.randn(shape, generator=draw) * decay
    return gradients


def train_on_given(
    mesh: DeviceMesh | None,
    method: str,
    steps: int = STEPS,
    dim: int = 0,
    plain: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Weights, SubspaceOptimizer]:
    """Steps with given gradients, pieces of which every rank gets; on one process if mesh is None.

    Args:
        mesh: of the ranks.
        method: a recipe.
        steps: how many.
        dim: dimension along which matrices are cut.
        plain: names of parameters that are not cut.
        dtype: of weights and gradients.
        options: of the recipe.
    """

    def placed(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype)
        if mesh is None or name in plain:
            return tensor.clone()
        return distribute_tensor(tensor, mesh, [Shard(dim if tensor.dim() == 2 else 0)])

    draw = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=draw) * 0.1 for name, shape in SHAPES.items()}
    parameters = {name: torch.nn.Parameter(placed(name, w)) for name, w in weights.items()}
    optimizer = build(method, list(parameters.items()), **given_options(method) | options)
    for step in range(steps):
        for name, gradient in given_gradients(step).items():
            parameters[name].grad = placed(name, gradient)
        optimizer.step()
    return {name: full(weight.detach()) for name, weight in parameters.items()}, optimizer


def given_options(method: str) -> dict[str, Any]:
    """A small rank, refreshes every five steps, and a learning rate for all."""
    defaults = methods()[method].defaults
    own = {"rank": 4, "update_proj_gap": 5}
    return {"lr": 0.01, "weight_decay": 0.01} | {k: v for k, v in own.items() if k in defaults}


def compare_on_given(
    mesh: DeviceMesh, method: str, dim: int = 0, **options: Any
) -> tuple[float, dict[str, str]]:
    """Difference from one process, and the way in which every parameter was updated."""
    weights, optimizer = train_on_given(mesh, method, dim=dim, **options)
    expected, _ = train_on_given(None, method, **options)
    assert optimizer.sharding is not None
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    ways = {
        name: optimizer.sharding.place_of(parameter).way
        for name, parameter in zip(SHAPES, parameters, strict=True)
    }
    return difference(weights, expected), ways


def refused(mesh: DeviceMesh, function: Callable[..., Any], *arguments: Any) -> str:
    """The message with which a function is refused on this rank."""
    try:
        function(mesh, *arguments)
    except (ValueError, RuntimeError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"
