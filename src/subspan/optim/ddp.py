"""DistributedDataParallel that sends coordinates instead of gradients.

Where a method discards what lies outside its subspace (GaLore and its kin), between two refreshes
the gradient is only ever used as its projection, and projecting commutes with averaging:

    project(mean_k G_k) = mean_k project(G_k)

So each rank projects its own gradient, the r x n (or m x r) coordinates are averaged, and what they
lift to takes the place of the gradient. In steps with a refresh, and for all that is not projected,
whole gradients are sent as always.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from subspan.optim.backward import steady
from subspan.optim.composition import Composition
from subspan.subspaces.bases import Subspace

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

    from subspan.optim.engine import SubspaceOptimizer


class ProjectedAllReduce:
    """Communication hook of a DDP model; made by `project_gradients_in_ddp`.

    Attributes:
        sent: bytes of gradients and coordinates that were averaged so far.
        plain: bytes that plain DDP would have averaged.
    """

    def __init__(self, optimizer: SubspaceOptimizer, group: dist.ProcessGroup) -> None:
        self._optimizer, self._group = optimizer, group
        self.sent = self.plain = 0

    @torch.no_grad()
    def reduce(self, bucket: Any) -> Future[Tensor]:
        """Average one bucket (DDP's `GradBucket`) of gradients over all ranks."""
        gradients, whole = bucket.gradients(), bucket.buffer()
        subspaces = [self._subspace(parameter) for parameter in bucket.parameters()]
        self.plain += whole.numel() * whole.element_size()
        if all(subspace is None for subspace in subspaces):
            self.sent += whole.numel() * whole.element_size()
            whole.div_(self._group.size())
            work = dist.all_reduce(whole, group=self._group, async_op=True)
            assert work is not None
            return work.get_future().then(lambda future: future.value()[0])
        parts = [
            gradient if subspace is None else subspace.project(gradient).to(gradient.dtype)
            for gradient, subspace in zip(gradients, subspaces, strict=True)
        ]
        sent = torch.cat([part.reshape(-1) for part in parts]).div_(self._group.size())
        self.sent += sent.numel() * sent.element_size()
        shapes = [part.shape for part in parts]

        def expand(future: Future[list[Tensor]]) -> Tensor:
            received = future.value()[0].split([shape.numel() for shape in shapes])
            for gradient, subspace, part, shape in zip(
                gradients, subspaces, received, shapes, strict=True
            ):
                value = part.view(shape)
                if subspace is None:
                    gradient.copy_(value)
                else:
                    subspace.lift(value, out=gradient)
            return whole

        work = dist.all_reduce(sent, group=self._group, async_op=True)
        assert work is not None
        return work.get_future().then(expand)

    def _subspace(self, parameter: Tensor) -> Subspace | None:
        """The subspace that is all the coming step uses of a gradient; None: it needs the whole."""
        if not self._optimizer.knows(parameter) or parameter.dim() != 2:
            return None
        seen = steady(self._optimizer, parameter)
        if seen is None or objection(seen[1]) is not None:
            return None
        bucket, parts = seen
        assert parts.finder is not None
        held = {item.name for item in parts.finder.declare(bucket.layout)} | {"seed"}
        (state,) = bucket.states
        basis = {name: value for name, value in state.items() if name in held}
        only = replace(bucket, states=[basis], codecs={})  # moments in few bits stay encoded
        found = parts.finder.unpack(only.load(), bucket.layout, bucket.dtype, bucket.device)
        return found if found.orthonormal else None


def objection(parts: Composition) -> str | None:
    """Why the lifted coordinates cannot take the place of a gradient; None if they can."""
    if parts.finder is None:
        return "it projects nothing"
    if parts.needs_whole_gradient is not None:
        return parts.needs_whole_gradient
    if not parts.finder.orthonormal:
        return f"bases of {type(parts.finder).__name__} are not orthonormal"
    if parts.storage.format("basis").name.startswith("int"):
        return "bases held in few bits are not orthonormal"
    return None if parts.activity is None else "what is projected changes with every period"


def project_gradients_in_ddp(
    model: DistributedDataParallel, optimizer: SubspaceOptimizer
) -> ProjectedAllReduce:
    """Let a DDP model send coordinates where its optimizer needs no more.

    Weights equal those of plain DDP up to rounding. `.grad` then holds the projected gradient, so
    the norm that clipping sees is that of the projection.

    Args:
        model: wrapped, with no communication hook of its own.
        optimizer: of the wrapped model's parameters, with the same state on all ranks.

    Returns:
        The hook, which counts bytes.

    Raises:
        ValueError: no parameter's gradient can be replaced by its coordinates: the method uses the
            residual, refreshes at every step, or its bases are not orthonormal.

    Example:
        >>> model = DistributedDataParallel(model)
        >>> optimizer = subspan.optim.GaLore(model.named_parameters(), lr=0.01, rank=128)
        >>> hook = project_gradients_in_ddp(model, optimizer)
    """
    found = [
        objection(parts)
        for group in optimizer.param_groups
        for parts in map(optimizer.parts_of, optimizer.projected(group))
        if parts is not None
    ]
    if None not in found:
        why = found[0] if found else "it projects nothing"
        raise ValueError(
            f"{optimizer.recipe.title} cannot work on averaged coordinates: {why}; use "
            "DistributedDataParallel as it is"
        )
    hook = ProjectedAllReduce(optimizer, model.process_group)
    # As a function: DDP looks at its annotations.
    model.register_comm_hook(hook, _reduce)
    return hook


def _reduce(hook, bucket):  # type: ignore[no-untyped-def]
    return hook.reduce(bucket)
