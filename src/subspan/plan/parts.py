"""What training holds, parameter by parameter: weights, gradients, optimizer states.

Exact, and from nothing but the optimizer that will run: it is built for the model without memory,
and what its parts declare is what it will allocate (`subspan.optim.listing`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from subspan.layers import QuantisedWeight
from subspan.linalg import compute_dtype
from subspan.optim import for_model
from subspan.optim.collect import PIECE, SMALL
from subspan.optim.listing import active_in, fullest_period, slot_bytes, weight_bytes
from subspan.train.errors import JobError, one_line

if TYPE_CHECKING:
    from subspan.optim import SubspaceOptimizer

# Float32 tensors of the size of a piece that an elementwise update needs.
_PIECE_TENSORS = 8
# What a step may allocate, in float32 copies of the largest tensor it works on: with float32
# weights, and with others, of which gradient and weight have to be widened. The bounds of
# tests/engine/test_memory.py, which every registered method keeps.
COPIES = {"exact": 3, "widened": 5}


@dataclass(frozen=True)
class Held:
    """What training holds of one parameter; all sizes in bytes.

    Args:
        name: in the model.
        shape: of the parameter.
        weight: its bytes.
        gradient: bytes of its gradient; 0 if it is frozen or rests.
        coordinates: bytes of its projected gradient; None if it is not projected.
        states: what the optimizer keeps, by kind.
        widened: whether arithmetic needs float32 copies.
        elementwise: whether an update may cut it anywhere.
    """

    name: str
    shape: tuple[int, ...]
    weight: int
    gradient: int
    coordinates: int | None
    states: Mapping[str, int]
    widened: bool
    elementwise: bool

    @property
    def entries(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def copies(self) -> int:
        """Float32 copies of it that an update allocates at most."""
        return COPIES["widened" if self.widened else "exact"]


@dataclass(frozen=True)
class Parts:
    """All parameters of a model under an optimizer.

    Args:
        parameters: see `Held`.
        buffers: bytes of what is neither weight nor state (tables of rotations, ...).
        optimizer: built on the meta device.
        period: which turn it is, for methods whose parameters take turns.
        turns: whether the method is such a one.
        resting: names of the parameters that rest in that period and need no gradient.
    """

    parameters: tuple[Held, ...]
    buffers: int
    optimizer: SubspaceOptimizer
    period: int
    turns: bool
    resting: frozenset[str]

    @cached_property
    def weights(self) -> int:
        """Bytes of all weights, frozen ones included."""
        return sum(held.weight for held in self.parameters)

    @cached_property
    def gradients(self) -> int:
        """Bytes of all gradients together."""
        return sum(held.gradient for held in self.parameters)

    @cached_property
    def largest_gradient(self) -> int:
        """Bytes of the largest gradient."""
        return max((held.gradient for held in self.parameters), default=0)

    @cached_property
    def between_refreshes(self) -> int:
        """Bytes kept until a step that waits, while subspaces stay.

        Coordinates of what is projected, and the gradients of everything else.
        """
        return sum(
            held.gradient if held.coordinates is None else held.coordinates
            for held in self.parameters
        )

    @cached_property
    def states(self) -> Mapping[str, int]:
        """Bytes of the optimizer's state by kind."""
        sizes: dict[str, int] = {}
        for held in self.parameters:
            for kind, size in held.states.items():
                sizes[kind] = sizes.get(kind, 0) + size
        return sizes

    def scratch(self, held: Held, device: str) -> int:
        """Bytes that updating one parameter allocates at most."""
        if held.elementwise:
            piece = PIECE.get(device, PIECE["other"])
            return 4 * _PIECE_TENSORS * min(held.entries, piece)
        return 4 * held.copies * held.entries

    def step_scratch(self, device: str) -> int:
        """Bytes that a step of all parameters allocates at most.

        Equal matrices are updated in batches that together are no larger than the largest
        parameter; on the CPU only small ones are.
        """
        trained = [held for held in self.parameters if held.gradient]
        largest = max((held.entries for held in trained), default=0)
        sizes = [self.scratch(held, device) for held in trained]
        for held in trained:
            if not held.elementwise and (device != "cpu" or held.entries < SMALL):
                sizes.append(4 * held.copies * largest)
        return max(sizes, default=0)


def build_on(module: nn.Module, method: str, options: Mapping[str, Any]) -> SubspaceOptimizer:
    """The optimizer of a model.

    Raises:
        JobError: unknown method, or an option or value that it does not allow.
    """
    try:
        return for_model(module, method, **options)
    except (ValueError, TypeError) as error:
        raise JobError(f"method {method}: {one_line(error)}") from None


def parts_of(
    module: nn.Module,
    method: str,
    options: Mapping[str, Any],
    period: int | None = None,
) -> Parts:
    """What training a model with a method holds.

    Args:
        module: on the meta device.
        method: registered name.
        options: its hyper-parameters.
        period: for methods whose parameters take turns, the period; None: the fullest of the first
            64.

    Raises:
        JobError: see `build_on`.
    """
    optimizer = build_on(module, method, options)
    turn = fullest_period(optimizer) if period is None else period
    active = active_in(optimizer, turn)
    known: dict[Any, dict[str, int]] = {}
    pairs = [
        (_held(optimizer, name, parameter, active.get(parameter), known), parameter)
        for name, parameter in module.named_parameters()  # a shared one comes once
    ]
    groups = range(len(optimizer.param_groups))
    turns = any(optimizer.composition(position).activity is not None for position in groups)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    resting = frozenset(
        held.name
        for held, parameter in pairs
        if parameter in active and optimizer.parts_in(parameter, active[parameter]) is None
    )
    held = tuple(held for held, _ in pairs)
    return Parts(held, buffers, optimizer, turn, turns, resting)


def _held(
    optimizer: SubspaceOptimizer,
    name: str,
    parameter: Tensor,
    active: bool | None,
    known: dict[Any, dict[str, int]],
) -> Held:
    """What training holds of one parameter; `known` are the states of those seen before."""
    shape, weight = tuple(parameter.shape), _weight(parameter)
    parts = None if active is None else optimizer.parts_in(parameter, active)
    if active is None or parts is None:
        return Held(name, shape, weight, 0, None, {}, False, True)
    layout = optimizer.layout_in(parameter, active)
    key = (id(parts), replace(layout, index=0, name=""), parameter.dtype)
    if key not in known:
        known[key] = slot_bytes(parts, layout, parameter.dtype)
    compute = compute_dtype(parameter.dtype)
    inside = layout.projected and parts.finder is not None and parts.activity is None
    coordinates = math.prod(layout.coordinates) * compute.itemsize if inside else None
    widened = parameter.dtype != compute or isinstance(parameter, QuantisedWeight)
    gradient = parameter.numel() * parameter.dtype.itemsize
    return Held(name, shape, weight, gradient, coordinates, known[key], widened, parts.elementwise)


def _weight(parameter: Tensor) -> int:
    """Bytes of a weight; of a frozen one in 4 bits, as bitsandbytes holds it.

    That is two codes per byte and a float32 per group, which this library only plans.
    """
    if isinstance(parameter, QuantisedWeight) and parameter.bits == 4:
        return -(-parameter.codes.numel() // 2) + parameter.scale.numel() * 4
    return weight_bytes(parameter)
