"""Polynomial preconditioners against formulas for their eigenvalues and the published recursion."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from subspan import linalg
from subspan.linalg.polynomials import (
    conjugate_gradients,
    largest_eigenvalue,
    scaled_preconditioner,
    symmetric_preconditioner,
)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(values: list[float], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix with those eigenvalues, and its eigenvectors as columns."""
    vectors = linalg.orthonormalise(random(seed, len(values), len(values)))
    return vectors @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ vectors.T, vectors


def elementary(values: list[float], degree: int) -> float:
    """Sum of the products of all choices of `degree` values."""
    return sum(math.prod(chosen) for chosen in itertools.combinations(values, degree))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_first_and_last_polynomial_are_those_of_newton(seed):
    size = 6
    b = random(seed, size, size)
    b = b @ b.T
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(symmetric_preconditioner(b, 0), eye)
    torch.testing.assert_close(symmetric_preconditioner(b, 1), b.trace() * eye - b)
    last = symmetric_preconditioner(b, size - 1)
    torch.testing.assert_close(last, torch.linalg.det(b) * torch.linalg.inv(b))
    torch.testing.assert_close(symmetric_preconditioner(b, size), 0 * b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("degree", range(6))
def test_eigenvalues_are_the_elementary_polynomials_of_the_others(degree):
    values = [7.0, 3.0, 2.0, 1.0, 0.5, 0.1]
    b, vectors = with_spectrum(values)
    p = symmetric_preconditioner(b, degree)
    for i, vector in enumerate(vectors.T):
        others = values[:i] + values[i + 1 :]
        torch.testing.assert_close(p @ vector, elementary(others, degree) * vector)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_it_equals_the_published_recursion(degree):
    b = random(3, 7, 7)
    b = b @ b.T
    eye = torch.eye(7, dtype=torch.float64)
    powers = [torch.linalg.matrix_power(b, i) for i in range(degree + 1)]
    polynomials = [eye]
    for order in range(1, degree + 1):
        terms = (
            (-1) ** (i - 1) * polynomials[order - i] @ (powers[i].trace() * eye - powers[i])
            for i in range(1, order + 1)
        )
        polynomials.append(sum(terms) / order)
    torch.testing.assert_close(symmetric_preconditioner(b, degree), polynomials[-1])


@pytest.mark.parametrize("size", [1, 5, 40])
def test_largest_eigenvalue_is_bounded_from_above_and_closely(size):
    for seed in range(3):
        stack = random(seed, 4, size, size + 2)
        stack = stack @ stack.mT * torch.tensor([1e-12, 1.0, 1e12, 0.0]).view(4, 1, 1)
        exact = torch.linalg.eigvalsh(stack)[:, -1]
        bound = largest_eigenvalue(stack).view(4)
        assert (bound[:3] >= exact[:3] * (1 - 1e-9)).all()
        assert (bound[:3] <= exact[:3] * size ** (1 / 32) * (1 + 1e-9)).all()
        assert bound[3] < 1e-30


@pytest.mark.parametrize("degree", [0, 1, 3, 30])
def test_steps_have_unit_length_along_the_steepest_direction_left(degree):
    b, _ = with_spectrum([100.0, 10.0, 1.0, 0.5, 0.2])
    steepest = torch.linalg.eigvalsh(scaled_preconditioner(b, degree) @ b)[-1]
    assert 5 ** (-1 / 32) <= steepest <= 1 + 1e-9


@pytest.mark.parametrize("degree", [0, 1, 3, 5])
@pytest.mark.parametrize("shape", [(8,), (8, 3)])
def test_krylov_form_solves_the_published_linear_system(degree, shape):
    b, _ = with_spectrum([9.0, 5.0, 3.0, 2.0, 1.0, 0.7, 0.5, 0.3])
    g = random(4, *shape)
    powers = [torch.linalg.matrix_power(b, i) @ g for i in range(2 * degree + 2)]
    inner = [float((g * power).sum()) for power in powers]
    system = [[inner[i + j + 1] for j in range(degree + 1)] for i in range(degree + 1)]
    known = torch.tensor(inner[: degree + 1], dtype=torch.float64)
    weights = torch.linalg.solve(torch.tensor(system, dtype=torch.float64), known)
    expected = sum(weight * power for weight, power in zip(weights, powers, strict=False))
    found = conjugate_gradients(b.matmul, g, degree + 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_krylov_form_stops_where_nothing_is_left():
    for dtype in (torch.float32, torch.float64):
        u = random(0, 6, 1).to(dtype)
        flat = u @ u.T
        found = conjugate_gradients(flat.matmul, u, 5)
        torch.testing.assert_close(found, u / (u * u).sum())
        zero = torch.zeros(2, 6, 3, dtype=dtype)
        assert torch.equal(conjugate_gradients(flat.matmul, zero, 3), zero)


@pytest.mark.parametrize("degree", [0, 2])
def test_without_curvature_there_is_no_step(degree):
    for dtype in (torch.float32, torch.float64):
        zero = torch.zeros(2, 4, 4, dtype=dtype)
        assert torch.equal(scaled_preconditioner(zero, degree), zero)
