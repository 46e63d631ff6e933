"""What is in the error buffer, and what parts that read the gradient late still see."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from subspan.optim import Composed, Composition
from subspan.optim.parts.inner import Adam
from subspan.optim.parts.output import ErrorFeedback
from subspan.optim.parts.refresh import Every
from subspan.optim.parts.transport import Keep, ProjectionAware
from subspan.subspaces.bases import Dense, Subspace
from subspan.subspaces.finders import Replay, Sight, WarmPowerIteration


@dataclass(frozen=True)
class Following(Replay):
    """Notes the gradient that `follow` sees; the subspace stays."""

    seen: list[torch.Tensor] = field(default_factory=list)
    follows = True

    def follow(self, sight: Sight) -> Subspace:
        self.seen.append(sight.gradient.clone())
        return sight.previous


def draws(seed: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 8, 12, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_buffer_holds_what_the_new_basis_misses_of_gradient_and_momentum(seed, share, side):
    b1, size = 0.8, {"left": 8, "right": 12}[side]
    bases = [torch.linalg.qr(draw[:, :size].mT @ draw)[0][:, :3] for draw in draws(seed + 50, 4)]
    finder = Replay({0: dict(enumerate(bases, start=1))})
    parts = Composition(
        Adam((b1, 0.9)),
        finder=finder,
        rank=3,
        proj_type=side,
        refresh=Every(1),
        transport=ProjectionAware(),
        remainder=ErrorFeedback(share=share),
    )
    weight = torch.nn.Parameter(torch.zeros(8, 12, dtype=torch.float64))
    optimizer = Composed([weight], lr=0.1, composition=parts)
    error = torch.zeros(8, 12, dtype=torch.float64)
    lifted = torch.zeros_like(error)  # the first moment in full size
    for gradient, basis in zip(draws(seed, 4), bases, strict=True):
        inside = basis @ basis.mT
        project = (lambda x, p=inside: p @ x) if side == "left" else (lambda x, p=inside: x @ p)
        total = gradient + error
        kept = project(lifted)
        error = total - share * project(total) + b1 / (1 - b1) * (lifted - kept)
        lifted = b1 * kept + (1 - b1) * project(total)
        weight.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(optimizer.state[weight]["error"], error)
        assert torch.equal(weight.grad, gradient)


def test_a_finder_that_follows_sees_gradient_and_error_together():
    basis = torch.linalg.qr(draws(9, 1)[0][:, :3])[0]
    finder = Following({0: {1: basis}})
    parts = Composition(Adam(), finder=finder, rank=3, proj_type="left", remainder=ErrorFeedback())
    weight = torch.nn.Parameter(torch.zeros(8, 12, dtype=torch.float64))
    optimizer = Composed([weight], lr=0.1, composition=parts)
    error = torch.zeros(8, 12, dtype=torch.float64)
    for number, gradient in enumerate(draws(4, 3)):
        weight.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(finder.seen[number], gradient + error)
        error = optimizer.state[weight]["error"].clone()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("side", ["left", "right"])
def test_power_iteration_spans_what_the_blended_matrix_written_out_gives(seed, side):
    blend, (old, gradient, momentum) = 0.7, draws(seed, 3)
    old = torch.linalg.qr(old if side == "left" else old.mT)[0][:, :3]
    first = torch.nn.Parameter(torch.zeros(8, 12, dtype=torch.float64))
    parts = Composition(Adam(), finder=WarmPowerIteration(blend), rank=3, proj_type=side)
    layout = Composed([first], lr=0.1, composition=parts).layout_of(first)
    coordinates = momentum[:3] if side == "left" else momentum[:, :3]
    sight = Sight(gradient, layout, [layout], Dense(side, old), coordinates, [0], {}, 2)
    found = WarmPowerIteration(blend).find(sight).dense()
    lifted = old @ coordinates if side == "left" else coordinates @ old.mT
    blended = blend * lifted + (1 - blend) * gradient
    image = blended @ blended.mT @ old if side == "left" else blended.mT @ blended @ old
    q = torch.linalg.qr(image)[0]
    torch.testing.assert_close(found @ found.mT, q @ q.mT)


def test_without_momentum_loss_the_buffer_holds_the_plain_residual():
    basis = torch.linalg.qr(draws(9, 1)[0][:, :3])[0]
    parts = Composition(
        Adam(),
        finder=Replay({0: {1: basis}}),
        rank=3,
        proj_type="left",
        refresh=Every(1),
        transport=Keep(),
        remainder=ErrorFeedback(momentum=False),
    )
    weight = torch.nn.Parameter(torch.zeros(8, 12, dtype=torch.float64))
    optimizer = Composed([weight], lr=0.1, composition=parts)
    (gradient,) = draws(2, 1)
    weight.grad = gradient.clone()
    optimizer.step()
    expected = gradient - basis @ (basis.mT @ gradient)
    torch.testing.assert_close(optimizer.state[weight]["error"], expected)
