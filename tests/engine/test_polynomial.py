"""Polynomial preconditioning: what it does to a quadratic, and where its curvature comes from."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import subspan.optim as optim
from subspan import linalg
from subspan.linalg.polynomials import (
    conjugate_gradients,
    largest_eigenvalue,
    scaled_preconditioner,
)
from subspan.optim.parts.polynomial import Curvature


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values: list[float], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix with those eigenvalues, and its eigenvectors as columns."""
    vectors = linalg.orthonormalise(random(seed, len(values), len(values)))
    return vectors @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ vectors.T, vectors


def steps_to_converge(values: list[float], degree: int, form: str) -> int:
    """Steps until the error of `x^T B x / 2` has lost six digits, at most 400."""
    b, _ = with_spectrum(values)
    x = nn.Parameter(random(5, len(values)))
    optimizer = optim.Polynomial(
        [("x", x)], lr=1.0, degree=degree, form=form, curvature=Curvature({"x": b})
    )
    first = x.detach().norm()
    for step in range(400):
        x.grad = b @ x.detach()
        if x.detach().norm() < 1e-6 * first:
            return step
        optimizer.step()
    return 400


@pytest.mark.parametrize("form", ["symmetric", "krylov"])
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_outliers_no_longer_slow_a_quadratic_down(form, degree):
    rest = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    outliers = [1e3 * 10**i for i in range(degree)]
    assert steps_to_converge(rest, 0, form) < 50
    # The condition number that is left is that of sum(rest) : min(rest), 9.
    steps = steps_to_converge(outliers + rest, degree, form)
    assert steps < 130
    assert steps_to_converge(outliers + rest, degree - 1, form) > 2 * steps


def test_degree_zero_is_gradient_descent():
    b, _ = with_spectrum([4.0, 2.0, 1.0])
    x = nn.Parameter(random(0, 3))
    before = x.detach().clone()
    optimizer = optim.Polynomial([("x", x)], lr=0.5, degree=0, curvature=Curvature({"x": b}))
    x.grad = random(1, 3)
    optimizer.step()
    bound = largest_eigenvalue(b).view(())
    torch.testing.assert_close(x.detach(), before - 0.5 / bound * x.grad)


@pytest.mark.parametrize("form", ["symmetric", "krylov"])
def test_given_curvature_acts_on_rows_columns_or_all_entries(form):
    g, right, left = random(0, 4, 6), random(1, 6, 6), random(2, 4, 4)
    right, left, whole = right @ right.T, left @ left.T, random(3, 24, 24)
    whole = whole @ whole.T
    result = {}
    for name, given, columns in (
        ("right", right, g.T), ("left", left, g), ("whole", whole, g.reshape(24, 1)),
    ):  # fmt: skip
        weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
        optimizer = optim.Polynomial(
            [("w", weight)], lr=1.0, form=form, curvature=Curvature({"w": given})
        )
        weight.grad = g.clone()
        optimizer.step()
        value = (
            scaled_preconditioner(given, 2) @ columns
            if form == "symmetric"
            else conjugate_gradients(given.matmul, columns, 3)
        )
        result[name] = -(value.T if name == "right" else value).reshape(4, 6)
        torch.testing.assert_close(weight.detach(), result[name])
    assert not torch.allclose(result["left"], result["whole"])


def test_a_function_serves_like_its_matrix():
    b, _ = with_spectrum([4.0, 2.0, 1.0])
    moved = []
    for given in (b, lambda v: b @ v):
        x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        curvature = Curvature({"x": given})
        optimizer = optim.Polynomial([("x", x)], lr=0.5, form="krylov", curvature=curvature)
        for step in range(3):
            x.grad = random(step, 3)
            optimizer.step()
        moved.append(x.detach())
    assert torch.equal(*moved)


def test_equal_shapes_with_different_curvature_keep_their_own():
    given = {name: with_spectrum([3.0, 2.0, 1.0 + i], seed=i)[0] for i, name in enumerate("abc")}
    weights = [(name, nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))) for name in "abc"]
    optimizer = optim.Polynomial(weights, lr=1.0, curvature=Curvature(given))
    for _, weight in weights:
        weight.grad = random(0, 5, 3)
    optimizer.step()
    for name, weight in weights:
        expected = -random(0, 5, 3) @ scaled_preconditioner(given[name], 2)
        torch.testing.assert_close(weight.detach(), expected)


def test_curvature_changed_in_place_is_noticed():
    b, _ = with_spectrum([3.0, 2.0, 1.0])
    x = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = optim.Polynomial([("x", x)], lr=1.0, curvature=Curvature({"x": b}))
    x.grad = random(0, 3)
    optimizer.step()
    first = x.detach().clone()
    b.mul_(2.0)
    optimizer.step()
    torch.testing.assert_close(x.detach() - first, first / 2)


def test_parameters_without_given_curvature_are_trained_by_adamw():
    b, _ = with_spectrum([3.0, 2.0, 1.0])
    listed, other, twin = (nn.Parameter(torch.zeros(4, 3, dtype=torch.float64)) for _ in range(3))
    params = [("listed", listed), ("other", other)]
    optimizer = optim.Polynomial(params, lr=0.1, curvature=Curvature({"listed": b}))
    adam = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.0)
    for step in range(3):
        listed.grad = other.grad = twin.grad = random(step, 4, 3)
        optimizer.step()
        adam.step()
    torch.testing.assert_close(other, twin)
    assert not torch.allclose(listed, twin)


@pytest.mark.parametrize("form", ["symmetric", "krylov"])
@pytest.mark.parametrize("scale", [1e-5, 1e5])
def test_own_curvature_makes_steps_independent_of_scale_and_orientation(form, scale):
    moved: list[Any] = []
    for factor, turned in ((1.0, False), (scale, False), (1.0, True)):
        shape = (9, 5) if turned else (5, 9)
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = optim.Polynomial([weight], lr=0.1, form=form)
        for step in range(4):
            g = factor * random(step, 5, 9)
            weight.grad = g.T.contiguous() if turned else g
            optimizer.step()
        assert optimizer.state_bytes() == {"second_moment": 8 * 25, "total": 8 * 25}
        moved.append(weight.detach().T if turned else weight.detach())
    torch.testing.assert_close(moved[0], moved[1])
    torch.testing.assert_close(moved[0], moved[2])


@pytest.mark.parametrize("form", ["symmetric", "krylov"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_low_rank_take_bounded_steps(form, dtype):
    weight = nn.Parameter(torch.zeros(30, 40, dtype=dtype))
    optimizer = optim.Polynomial([weight], lr=0.1, form=form, degree=4)
    weight.grad = (random(0, 30, 1) @ random(1, 1, 40)).to(dtype)
    optimizer.step()
    # One singular value s: B is s there, and the step lr G / s is lr long.
    torch.testing.assert_close(
        weight.detach().norm(), torch.tensor(0.1, dtype=dtype), rtol=0.15, atol=0
    )


def test_checkpoint_with_a_curvature_loads_with_weights_only():
    b, _ = with_spectrum([3.0, 2.0, 1.0])

    def build(matrix: torch.Tensor) -> tuple[nn.Parameter, optim.SubspaceOptimizer]:
        x = nn.Parameter(torch.zeros(len(matrix), dtype=torch.float64))
        return x, optim.Polynomial([("x", x)], curvature=Curvature({"x": matrix}))

    x, optimizer = build(b)
    x.grad = random(0, 3)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    _, other = build(b)
    other.load_state_dict(saved)
    with pytest.raises(ValueError, match="Curvature"):
        build(with_spectrum([1.0, 2.0])[0])[1].load_state_dict(saved)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"degree": -1}, "degree"),
        ({"form": "newton"}, "form"),
        ({"beta": 1.0}, "beta"),
        ({"damping": -1.0}, "damping"),
        ({"curvature": {"x": torch.eye(3)}}, "Curvature"),
        ({"curvature": Curvature({"x": torch.eye(4)})}, "4 x 4"),
        ({"curvature": Curvature({"x": lambda v: v})}, "krylov"),
    ],
    ids=["degree", "form", "beta", "damping", "mapping", "size", "function"],
)
def test_impossible_values_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        optim.Polynomial([("x", nn.Parameter(torch.zeros(3)))], **bad)
    with pytest.raises(ValueError, match="named"):
        curvature = Curvature({"x": torch.eye(3)})
        optim.Polynomial([nn.Parameter(torch.zeros(3))], curvature=curvature)


def test_impossible_curvature_is_refused():
    for given in (
        torch.ones(2, 3),
        torch.ones(2),
        "matrix",
        torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
    ):
        with pytest.raises(ValueError, match="curvature of 'x'"):
            Curvature({"x": given})


def test_curvature_of_a_parameter_that_does_not_exist_is_refused():
    x, y = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    misspelt = Curvature({"layer.wieght": torch.eye(3)})
    with pytest.raises(ValueError, match=r"'layer.wieght'.*'layer.weight', 'layer.bias'"):
        optim.Polynomial([("layer.bias", y), ("layer.weight", x)], curvature=misspelt)
    # It may be a name of any group, but of a group that there is.
    both = Curvature({"x": torch.eye(3), "y": torch.eye(3)})
    groups = [{"params": [("x", x)]}, {"params": [("y", y)]}]
    optimizer = optim.Polynomial(groups, curvature=both)
    with pytest.raises(ValueError, match="'q'"):
        z = nn.Parameter(torch.zeros(3))
        added = {"params": [("z", z)], "curvature": Curvature({"q": torch.eye(3)})}
        optimizer.add_param_group(added)
    assert len(optimizer.param_groups) == 2
