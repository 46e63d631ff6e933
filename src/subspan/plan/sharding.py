"""What one of N devices holds under FSDP2, which shards every parameter along its rows.

`torch.distributed.fsdp.fully_shard` on every block and on the rest of the model: a device holds
its share of the rows of weights, gradients and states, and gathers whole weights block by block.

Exact: shares of weights, gradients and of states that have the parameter's rows. Estimates: other
states are taken as whole on every device, and at the fullest moment the weights of two blocks (one
computes, one is prefetched) and of everything outside the blocks are gathered, with the gradients
of one block not yet reduced. `subspan.optim` does not train sharded parameters yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from subspan.plan.parts import Held, Parts, StateTensor


@dataclass(frozen=True)
class Shares:
    """Bytes on the device that holds the most.

    Args:
        weights: its share.
        gradients: its share, reduced.
        states: its share by kind.
        replicated: of the states, what every device holds whole.
        gathered: whole weights at the fullest moment.
        unreduced: whole gradients then.
    """

    weights: int
    gradients: int
    states: dict[str, int]
    replicated: int
    gathered: int
    unreduced: int


def shares(module: nn.Module, parts: Parts, ranks: int) -> Shares:
    """What each of `ranks` devices holds; see the module."""
    states: dict[str, int] = {}
    replicated = 0
    for held in parts.parameters:
        for state in held.states:
            whole = not _has_rows(held, state)
            size = state.size if whole else _share(state.size, held, ranks)
            replicated += size if whole else 0
            states[state.kind] = states.get(state.kind, 0) + size
    blocks = _blocks(module)
    inside = [name for names in blocks for name in names]
    by_name = {held.name: held for held in parts.parameters}
    weights = [sum(by_name[n].weight for n in names if n in by_name) for names in blocks]
    gradients = [sum(by_name[n].gradient for n in names if n in by_name) for names in blocks]
    outside = sum(held.weight for name, held in by_name.items() if name not in set(inside))
    return Shares(
        sum(_share(held.weight, held, ranks) for held in parts.parameters),
        sum(_share(held.gradient, held, ranks) for held in parts.parameters),
        states,
        replicated,
        outside + sum(sorted(weights)[-2:]),
        max(gradients, default=0),
    )


def _has_rows(held: Held, state: StateTensor) -> bool:
    """Whether a state has a row for every row of its parameter.

    A basis of the right side has one for every column.
    """
    if state.kind == "basis" and held.side == "right":
        return False
    return bool(held.shape) and state.shape[:1] == held.shape[:1]


def _share(size: int, held: Held, ranks: int) -> int:
    """Bytes of the largest share: rows are dealt out in chunks of equal length, rounded up."""
    if not held.shape or not held.shape[0]:
        return size
    rows = held.shape[0]
    return -(-size * -(-rows // ranks) // rows)


def _blocks(module: nn.Module) -> list[list[str]]:
    """Names of the parameters of every block: the members of the outermost lists of modules."""
    lists = [name for name, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    outermost = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    found = []
    for path in outermost:
        for number, block in module.get_submodule(path).named_children():
            names = [f"{path}.{number}.{name}" for name, _ in block.named_parameters()]
            if names:
                found.append(names)
    return found
