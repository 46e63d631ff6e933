"""Muon, AuON and FISMO: limits, laws, and literal transcriptions of their equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import subspan.optim as optim
from subspan import linalg
from subspan.optim import Composed, Composition
from subspan.optim.parts.auon import AuON
from subspan.optim.parts.fismo import FISMO, inverse_root, polar_factor
from subspan.optim.parts.muon import Muon

SHAPES = [(12, 20), (20, 12), (9, 9)]


def gradient(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: int = 5, scale: float = 1.0
) -> torch.Tensor:
    for step in range(1, steps + 1):
        weight.grad = scale * gradient(step, *weight.shape, dtype=weight.dtype)
        optimizer.step()
    return weight.detach()


def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


def moved(method: str, shape: tuple[int, ...], scale: float = 1.0, **options: Any) -> torch.Tensor:
    weight = zeros(*shape)
    return run(optim.build(method, [weight], **options), weight, scale=scale)


# ---------------------------------------------------------------- Muon


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch.optim.Muon (torch 2.9)")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}, {"ns_steps": 3}]
)
def test_muon_in_bfloat16_takes_the_steps_of_torch_muon_bit_for_bit(shape, options):
    ours, theirs = zeros(*shape, dtype=torch.float32), zeros(*shape, dtype=torch.float32)
    run(optim.Muon([ours], lr=0.02, dtype="bfloat16", **options), ours)
    run(torch.optim.Muon([theirs], lr=0.02, **options), theirs)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", ["muon", "auon", "hybrid_auon", "fismo", "polynomial"])
def test_what_is_no_block_matrix_is_trained_by_adamw(method):
    names = ("embed_tokens.weight", "layers.0.mlp.bias", "lm_head.weight", "model.norm.weight")
    shapes = ((6, 4), (5,), (6, 4), (4,))
    options = {"lr": 0.01, "weight_decay": 0.1}
    ours = [(n, zeros(*s)) for n, s in zip(names, shapes, strict=True)]
    theirs = [zeros(*s) for s in shapes]
    adam = {"adam_betas": (0.8, 0.95), "adam_eps": 1e-7}
    first = optim.build(method, ours, **adam, **options)
    second = torch.optim.AdamW(theirs, betas=(0.8, 0.95), eps=1e-7, **options)
    for step in range(4):
        for (_, a), b in zip(ours, theirs, strict=True):
            a.grad, b.grad = gradient(step, *a.shape), gradient(step, *b.shape)
        first.step()
        second.step()
    for (_, a), b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("method", "bad", "message"),
    [
        ("muon", {"momentum": 1.0}, "momentum"),
        ("muon", {"ns_steps": -1}, "ns_steps"),
        ("muon", {"ns_steps": 2.5}, "ns_steps"),
        ("muon", {"adjust_lr_fn": "spectral"}, "adjust"),
        ("muon", {"dtype": "float16"}, "dtype"),
        ("muon", {"ns_coefficients": (1.0, 2.0)}, "ns_coefficients"),
        ("auon", {"gamma": -1.0}, "gamma"),
        ("hybrid_auon", {"ns_steps": True}, "ns_steps"),
        ("fismo", {"polar": "qr"}, "polar"),
        ("fismo", {"gamma": 1.1}, "gamma"),
        ("fismo", {"damping": -0.1}, "damping"),
        ("fismo", {"root_interval": 0}, "root_interval"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(method, bad, message):
    with pytest.raises(ValueError, match=message):
        optim.build(method, [zeros(3, 4)], **bad)


# ---------------------------------------------------------------- AuON


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("as_released", [False, True])
def test_auon_equals_its_formula(shape, steps, as_released):
    m, n = shape
    moment, expected = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape).double()
    for step in range(1, 6):
        g = gradient(step, *shape)
        moment = 0.9 * moment + 0.1 * g
        x = 0.1 * g + 0.9 * moment
        for _ in range(steps):
            u, s, vh = torch.linalg.svd(x / x.norm(), full_matrices=False)
            x = u * (3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5) @ vh
        z = x / (x.norm() + 1e-7)
        if as_released:
            update = x / ((2.0 * z).cosh().square().mean().sqrt() + 1e-8)
        else:
            update = max(1.0, m / n) ** 0.5 * z / (z.cosh().square().mean().sqrt() + 1e-8)
        expected = expected * (1 - 0.3 * 0.1) - 0.3 * update
    options = {"lr": 0.3, "weight_decay": 0.1, "momentum": 0.9, "as_released": as_released}
    extra = {"ns_steps": steps} if steps else {}
    result = moved("hybrid_auon" if steps else "auon", shape, gamma=2.0, **extra, **options)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["auon", "hybrid_auon"])
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_papers_auon_does_not_depend_on_the_gradients_scale_and_the_released_one_does(
    method, scale
):
    # Up to the 1e-7 that is added to norms.
    plain = moved(method, (12, 20))
    torch.testing.assert_close(moved(method, (12, 20), scale), plain, rtol=1e-3, atol=1e-6)
    if method == "auon":
        released = moved(method, (12, 20), scale, as_released=True)
        expected = scale * moved(method, (12, 20), as_released=True)
        torch.testing.assert_close(released, expected, rtol=1e-5, atol=0)


def test_papers_auon_takes_steps_of_fixed_length():
    for m, n in SHAPES:
        weight = zeros(m, n)
        optimizer = optim.AuON([weight], lr=1.0)
        weight.grad = gradient(0, m, n)
        optimizer.step()
        length = weight.detach().norm() / max(1.0, m / n) ** 0.5
        assert 1 - 1.01 / (m * n) < length < 1


def test_divisor_of_released_auon_is_one_to_three_digits():
    for seed in range(3):
        state = {"momentum_buffer": torch.zeros(48, 80)}
        g = gradient(seed, 48, 80, dtype=torch.float32)
        work = optim.engine.Workspace()
        direction = AuON(as_released=True).update(g, state, 1, 0.5, work)
        ahead = 0.05 * g + 0.95 * 0.05 * g
        ratio = (0.5 * ahead / (direction.step * direction.value)).median()
        assert 1 < ratio < 1 + 6e-4


@pytest.mark.parametrize("single", [False, True], ids=["dense", "single entry"])
@pytest.mark.parametrize("options", [{}, {"as_released": True}], ids=["paper", "released"])
@pytest.mark.parametrize("lead", [(), (2,)], ids=["matrix", "stack"])
def test_divisor_of_a_large_matrix_needs_no_cosines(single, options, lead):
    # So large that the norm alone gives it to 64 roundings at worst, which is a single entry.
    for seed in range(2):
        g = gradient(seed, *lead, 300, 515, dtype=torch.float32)
        if single:
            g = g * (g == g.amax((-2, -1), keepdim=True))
        state = {"momentum_buffer": torch.zeros_like(g)}
        work = optim.engine.Workspace()
        direction = AuON(**options).update(g, state, 1, 1.0, work)
        ahead = (0.05 + 0.95 * 0.05) * g.double()
        z = ahead / (torch.linalg.vector_norm(ahead, dim=(-2, -1), keepdim=True) + 1e-7)
        factor = 1.5 if options else 1.0
        divisor = (factor * z).cosh().square().mean((-2, -1), keepdim=True).sqrt() + 1e-8
        expected = (ahead if options else z) / divisor
        moved = (direction.step * direction.value).double()
        torch.testing.assert_close(moved, expected, rtol=8e-6 if single else 3e-6, atol=0)
        assert torch.equal(state["momentum_buffer"], torch.lerp(torch.zeros_like(g), g, 0.05))


def test_auon_without_its_divisor_is_sgd_or_muon():
    for shape in SHAPES:
        plain, moment = torch.zeros(shape).double(), torch.zeros(shape).double()
        for step in range(1, 6):
            g = gradient(step, *shape)
            moment = 0.95 * moment + 0.05 * g
            plain -= 0.1 * (0.05 * g + 0.95 * moment)
        options = {"lr": 0.1, "weight_decay": 0.0, "gamma": 0.0, "as_released": True}
        torch.testing.assert_close(moved("auon", shape, **options), plain, rtol=1e-7, atol=1e-9)
        muon = moved("muon", shape, lr=0.1, weight_decay=0.0, adjust_lr_fn="none")
        hybrid = moved("hybrid_auon", shape, ns_steps=5, **options)
        torch.testing.assert_close(hybrid, muon, rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------- FISMO


def transcribed_fismo(
    shape: tuple[int, int], steps: int, scale: float, damping: float, every: int = 1
) -> torch.Tensor:
    """The published algorithm, literally; roots may be used for `every` steps."""
    m, n = shape
    p, q, weight, moment = torch.eye(m), torch.eye(n), torch.zeros(shape), torch.zeros(shape)
    p, q, weight, moment = p.double(), q.double(), weight.double(), moment.double()
    p_used, q_used = p, q

    def root(a: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(a)
        return vectors @ torch.diag(values**-0.5) @ vectors.T

    for step in range(1, steps + 1):
        g = scale * gradient(step, *shape)
        new = 0.8 * p + 0.2 * (
            g @ torch.linalg.inv(q_used) @ g.T / n + damping * p.trace() / m * torch.eye(m)
        )
        p = m / new.trace() * (new + new.T) / 2
        p_used = p if (step - 1) % every == 0 else p_used
        new = 0.8 * q + 0.2 * (
            g.T @ torch.linalg.inv(p_used) @ g / m + damping * q.trace() / n * torch.eye(n)
        )
        q = n / new.trace() * (new + new.T) / 2
        q_used = q if (step - 1) % every == 0 else q_used
        moment = 0.9 * moment + 0.1 * root(p_used) @ g @ root(q_used)
        u, _, vh = torch.linalg.svd(moment, full_matrices=False)
        weight = weight - 0.1 * root(p_used) @ u @ vh @ root(q_used)
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("every", [1, 3])
def test_fismo_equals_its_algorithm(shape, scale, every):
    options = {"momentum": 0.9, "gamma": 0.8, "damping": 0.05, "polar": "svd", "lr": 0.1}
    result = moved("fismo", shape, scale, root_interval=every, **options)
    expected = transcribed_fismo(shape, 5, scale, 0.05, every)
    torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-9)
    stale = transcribed_fismo(shape, 5, scale, 0.05, 4 - every)
    assert (result - stale).abs().max() > 1e-4  # the interval matters here


@pytest.mark.parametrize("shape", SHAPES)
def test_fismo_with_factors_that_never_move_is_muon(shape):
    fismo = moved("fismo", shape, gamma=1.0, lr=0.1)
    muon = moved("muon", shape, nesterov=False, adjust_lr_fn="none", lr=0.1, weight_decay=0.0)
    torch.testing.assert_close(fismo, muon, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("seed", [0, 1])
def test_fismo_follows_rotations_of_rows_and_columns(seed):
    left = linalg.orthonormalise(gradient(50 + seed, 8, 8))
    right = linalg.orthonormalise(gradient(60 + seed, 11, 11))
    straight, turned = zeros(8, 11), zeros(8, 11)
    first, second = (optim.FISMO([w], polar="svd", lr=0.1) for w in (straight, turned))
    for step in range(4):
        straight.grad = gradient(100 * seed + step, 8, 11)
        turned.grad = left @ straight.grad @ right.T
        first.step()
        second.step()
    torch.testing.assert_close(turned.detach(), left @ straight.detach() @ right.T)


def test_fismo_in_float32_stays_close_to_float64():
    results = []
    for dtype in (torch.float32, torch.float64):
        weight = zeros(40, 24, dtype=dtype)
        optimizer = optim.FISMO([weight], polar="svd", damping=1e-3, lr=0.1)
        for step in range(20):
            # Condition number 1e4 on both sides.
            g = gradient(step, 40, 24) * torch.logspace(0, -2, 24, dtype=torch.float64)
            weight.grad = (g * torch.logspace(0, -2, 40, dtype=torch.float64)[:, None]).to(dtype)
            optimizer.step()
        results.append(weight.detach().double())
    assert (results[0] - results[1]).norm() < 1e-3 * results[1].norm()


def test_fismos_factors_and_roots_are_what_its_memory_formula_says():
    for interval, expected in ((1, 12 * 20 + 144 + 400), (5, 12 * 20 + 2 * (144 + 400))):
        weight = zeros(12, 20, dtype=torch.float32)
        optimizer = optim.FISMO([weight], root_interval=interval, storage={"second_moment": "int8"})
        run(optimizer, weight, steps=2)
        assert optimizer.state_bytes()["total"] == 4 * expected


def test_inverse_root_and_polar_factor_of_degenerate_matrices_are_finite():
    direction = gradient(0, 6, 1)
    flat = (direction @ direction.T).expand(2, 6, 6)
    assert inverse_root(flat).isfinite().all()
    x = gradient(1, 5, 2) @ gradient(2, 2, 7)
    factor = polar_factor(torch.stack([x, torch.zeros_like(x)]))
    assert torch.linalg.matrix_rank(factor[0]) == 2
    torch.testing.assert_close(factor[0] @ x.T, (factor[0] @ x.T).T)  # x = (x f^T) f, symmetric
    assert torch.equal(factor[1], torch.zeros(5, 7, dtype=torch.float64))


@pytest.mark.parametrize("inner", [Muon(), AuON(steps=1), FISMO(), FISMO(every=2)], ids=repr)
def test_stacked_matrices_are_treated_one_by_one(inner):
    together, apart = zeros(3, 6, 9), [zeros(6, 9) for _ in range(3)]
    stacked = [{"params": [together], "stacked": True, "project": True}]
    parts = Composition(inner)
    first, second = (Composed(params, lr=0.1, composition=parts) for params in (stacked, apart))
    for step in range(3):
        together.grad = gradient(step, 3, 6, 9)
        for weight, own in zip(apart, together.grad, strict=True):
            weight.grad = own.clone()
        first.step()
        second.step()
    expected = torch.stack([weight.detach() for weight in apart])
    torch.testing.assert_close(together.detach(), expected)
