"""Polynomial preconditioning as an inner optimizer, and the curvature that it needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from subspan.linalg.polynomials import (
    Product,
    conjugate_gradients,
    scaled_preconditioner,
    trace,
)
from subspan.linalg.products import add_symmetric_product_, product
from subspan.optim.parts.inner import Adam, Direction, Inner, Rate, check_non_negative
from subspan.optim.parts.muon import check_steps
from subspan.optim.parts.workspace import Workspace
from subspan.subspaces.layout import Layout, StateDeclaration


@dataclass(frozen=True, eq=False)
class Curvature:
    """Curvature matrices B, symmetric positive semidefinite, by parameter name.

    A k x k matrix serves a vector of k entries, or an m x n matrix: its columns' space (`G B`, as
    with the covariance of a layer's inputs) if k = n, else its rows' (`B G`) if k = m, else all of
    its entries if k = mn. A function takes the gradient's matrix view and returns B times it.

    Two such objects are equal only if they are the same one. A matrix that is changed in place is
    noticed.

    Args:
        matrices: name -> matrix or function.

    Raises:
        ValueError: an entry is neither, or a matrix is not square and symmetric.
    """

    matrices: Mapping[str, Tensor | Product]
    _known: dict[Any, tuple[int, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, given in self.matrices.items():
            if not isinstance(given, Tensor):
                if not callable(given):
                    raise ValueError(f"curvature of {name!r} must be a matrix or a function")
                continue
            if given.dim() != 2 or given.shape[0] != given.shape[1]:
                raise ValueError(
                    f"curvature of {name!r} has shape {tuple(given.shape)}; it must be square"
                )
            if not torch.allclose(given, given.mT, atol=1e-5 * float(given.abs().max())):
                raise ValueError(f"curvature of {name!r} must be symmetric")

    def __repr__(self) -> str:
        """Names and sizes, which a checkpoint can hold."""
        sizes = (
            f"{name!r}: {len(given) if isinstance(given, Tensor) else 'function'}"
            for name, given in self.matrices.items()
        )
        return f"Curvature({{{', '.join(sizes)}}})"

    def preconditioner(self, name: str, degree: int, like: Tensor) -> Tensor:
        """`scaled_preconditioner` of a matrix in the dtype and on the device of `like`.

        It is kept until the matrix changes.
        """
        matrix = self.matrices[name]
        assert isinstance(matrix, Tensor)
        key = (name, degree, like.dtype, like.device)
        version, found = self._known.get(key, (-1, matrix))
        if version != matrix._version:
            found = scaled_preconditioner(matrix.to(like), degree)
            self._known[key] = (matrix._version, found)
        return found


@dataclass(frozen=True)
class Polynomial(Inner):
    """Polynomial preconditioning (Doikov, Rodomanov, 2023, arXiv 2301.13194).

    With the elementary symmetric polynomials e_k of the eigenvalues of a curvature matrix B,

        P_0 = I;  P_k = e_k I - B P_{k-1},  e_k = tr(B P_{k-1}) / k
        value = P_degree R / lambda_max(P_degree B)                        "symmetric"

    On an eigenvector of B, P is e_degree of all *other* eigenvalues: P B has `degree` outliers
    fewer, and the step length is 1 along the steepest direction that is left (lambda_max is bounded
    from above, by at most k^(1/32) for k x k matrices). "krylov" finds the best polynomial for each
    gradient instead, without traces,

        value = argmin_h  -<R, h> + <B h, h> / 2    over the span of R, B R, ..., B^degree R

    which `degree + 1` steps of conjugate gradients do. Both step with `lr = 1/L` where the Hessian
    is at most L B: 1 for a quadratic whose Hessian is B.

    Without a given curvature B is `C / sqrt(tr C)`, where C is the running average of `R R^T`
    (m <= n) or `R^T R`, plus `damping` times its mean eigenvalue: steps then do not depend on the
    gradient's scale, and a gradient of low rank leaves some curvature.

    Args:
        degree: of the polynomial; at most k - 1 is of use for k x k matrices.
        form: "symmetric" or "krylov".
        curvature: of the parameters that this optimizer is to train; Adam trains all others. None:
            as above, for matrices.
        beta: averaging rate of C.
        damping: see above.
    """

    degree: int = 2
    form: Literal["symmetric", "krylov"] = "symmetric"
    curvature: Curvature | None = None
    beta: float = 0.99
    damping: float = 1e-3

    needs_matrix: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_steps("degree", self.degree)
        if self.form not in ("symmetric", "krylov"):
            raise ValueError(f"form={self.form!r} must be symmetric or krylov")
        if self.curvature is not None and not isinstance(self.curvature, Curvature):
            raise ValueError(
                f"curvature={type(self.curvature).__name__} must be a subspan.optim.Curvature, "
                "made from a mapping of parameter names to matrices"
            )
        if not isinstance(self.beta, (int, float)) or not 0.0 <= self.beta < 1.0:
            raise ValueError(f"beta={self.beta!r} must lie in [0, 1)")
        check_non_negative(damping=self.damping)

    def fallback(self) -> Inner:
        """Adam, for vectors."""
        return Adam()

    def claims(self, name: str | None) -> bool | None:
        """Whether a parameter's curvature is given; None if none is."""
        if self.curvature is None:
            return None
        if name is None:
            raise ValueError("curvature is given by name: pass named parameters")
        return name in self.curvature.matrices

    def names(self) -> Collection[str]:
        """Those whose curvature is given."""
        return () if self.curvature is None else self.curvature.matrices.keys()

    def check(self, layout: Layout) -> None:
        """Refuse a curvature that does not fit the parameter.

        Raises:
            ValueError: naming the parameter, both shapes and what is allowed.
        """
        if self.curvature is None:
            return
        given, shape = self.curvature.matrices[layout.name], layout.coordinates
        if not isinstance(given, Tensor):
            if self.form == "symmetric":
                raise ValueError(
                    f"curvature of {layout.name!r} is a function, whose traces are not known: "
                    "use form='krylov'"
                )
            return
        if len(given) not in (*shape[-2:], shape[-1] * (shape[-2] if len(shape) > 1 else 1)):
            raise ValueError(
                f"curvature of {layout.name!r} is {len(given)} x {len(given)}, which fits neither "
                f"side nor all entries of its shape {shape}"
            )

    def declare(self, layout: Layout) -> tuple[StateDeclaration, ...]:
        """The running average C, unless the curvature is given."""
        if self.curvature is not None:
            return ()
        *lead, m, n = layout.coordinates
        size = min(m, n)
        shape = (*lead, size, size)
        return (StateDeclaration("gram", "second_moment", shape, dtype="compute"),)

    def counters(self, layout: Layout) -> dict[str, Any]:
        """Which of the given matrices is the parameter's."""
        if self.curvature is None:
            return {}
        return {"curvature": list(self.curvature.matrices).index(layout.name)}

    def update(
        self, coordinates: Tensor, state: dict[str, Any], age: int, lr: Rate, work: Workspace
    ) -> Direction:
        """See the class."""
        if self.curvature is None:
            return Direction(self._own(coordinates, state["gram"], age, work), lr)
        names = list(self.curvature.matrices)
        numbers = state["curvature"]
        if len(numbers) == 1:
            return Direction(self._given(names[numbers[0]], coordinates), lr)
        rows = [self._given(names[i], row) for i, row in zip(numbers, coordinates, strict=True)]
        return Direction(torch.stack(rows), lr)

    def _own(self, gradient: Tensor, gram: Tensor, age: int, work: Workspace) -> Tensor:
        """The direction with the running average as curvature."""
        wide = gradient.shape[-2] <= gradient.shape[-1]
        short = gradient if wide else gradient.mT
        add_symmetric_product_(gram, short, short.mT, alpha=1.0 - self.beta, beta=self.beta)
        weight = 1.0 - self.beta**age
        total = trace(gram) / weight
        curvature = work.like(gram)
        tiny = torch.finfo(gram.dtype).tiny
        torch.div(gram, total.sqrt().clamp_(min=tiny).mul_(weight), out=curvature)
        mean = total.sqrt_().div_(gram.shape[-1])
        curvature.diagonal(dim1=-2, dim2=-1).add_(mean.squeeze(-1), alpha=self.damping)
        if self.form == "symmetric":
            scratch = work.take((3, *gram.shape), gram.dtype, gram.device)
            found, out = scaled_preconditioner(curvature, self.degree, scratch), work.like(gradient)
            return product(found, gradient, out) if wide else product(gradient, found, out)
        value = conjugate_gradients(curvature.matmul, short, self.degree + 1)
        return value if wide else value.mT

    def _given(self, name: str, gradient: Tensor) -> Tensor:
        """The direction of one parameter with the given curvature."""
        assert self.curvature is not None
        given = self.curvature.matrices[name]
        if not isinstance(given, Tensor):
            return conjugate_gradients(given, gradient, self.degree + 1)
        columns = _as_columns(gradient, len(given))
        if self.form == "symmetric":
            value = self.curvature.preconditioner(name, self.degree, gradient) @ columns
        else:
            value = conjugate_gradients(given.to(gradient).matmul, columns, self.degree + 1)
        turned = gradient.dim() > 1 and len(given) == gradient.shape[-1]
        return (value.mT if turned else value).reshape(gradient.shape)


def _as_columns(gradient: Tensor, size: int) -> Tensor:
    """The gradient with the space of a curvature matrix of that size as its rows."""
    if gradient.dim() == 1:
        return gradient.unsqueeze(-1)
    m, n = gradient.shape[-2:]
    if size == n:
        return gradient.mT
    return gradient if size == m else gradient.flatten(-2).unsqueeze(-1)
