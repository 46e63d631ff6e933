"""The laws of a subspace, for every kind of basis and every batch shape."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subspan.linalg import dct_basis, gaussian_basis, random_orthogonal
from subspan.subspaces import (
    Coordinates,
    Dense,
    Entries,
    FixedColumns,
    OneSided,
    Seeded,
    Subspace,
    TwoSided,
    Whole,
)

DOUBLE = torch.float64
seeds = st.integers(0, 2**31)


def close(a: Tensor, b: Tensor, atol: float = 0.0, rtol: float = 0.0) -> bool:
    """torch.allclose without its default relative tolerance, which would hide float32 errors."""
    return torch.allclose(a, b, atol=atol, rtol=rtol)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def orthonormal(seed: int, *shape: int) -> Tensor:
    return torch.linalg.qr(normal(seed, *shape))[0]


def distinct(seed: int, batch: tuple[int, ...], size: int, rank: int) -> Tensor:
    """Distinct indices in no particular order."""
    draw = torch.rand((*batch, size), generator=torch.Generator().manual_seed(seed))
    return draw.argsort(-1)[..., :rank].clone()


Maker = Callable[[int, tuple[int, ...], int, int, int], Subspace]


def one_sided(make: Callable[..., Subspace]) -> dict[str, Maker]:
    def left(seed: int, batch: tuple[int, ...], m: int, n: int, r: int) -> Subspace:
        return make("left", seed, batch, m, r)

    def right(seed: int, batch: tuple[int, ...], m: int, n: int, r: int) -> Subspace:
        return make("right", seed, batch, n, r)

    return {"left": left, "right": right}


def seeded(side: str, seed: int, batch: tuple[int, ...], d: int, r: int, kind: str) -> Seeded:
    count = torch.Size(batch).numel()
    many: int | tuple[int, ...] = tuple(range(seed, seed + count)) if batch else seed
    return Seeded(side, d, r, many, dtype=DOUBLE, distribution=kind, lead=batch[1:])  # type: ignore[arg-type]


@cache
def cosine_rows(d: int, inverse: bool) -> torch.Tensor:
    """One matrix for all subspaces of a size, as the finder has it."""
    return dct_basis(d, inverse=inverse, dtype=DOUBLE).mT.contiguous()


def cosines(side: str, index: torch.Tensor, d: int, inverse: bool = False) -> FixedColumns:
    return FixedColumns(side, index, cosine_rows(d, inverse))  # type: ignore[arg-type]


ONE_SIDED: dict[str, dict[str, Maker]] = {
    "dense": one_sided(lambda s, seed, b, d, r: Dense(s, orthonormal(seed, *b, d, r))),
    "seeded": one_sided(lambda s, seed, b, d, r: seeded(s, seed, b, d, r, "orthogonal")),
    "dct": one_sided(lambda s, seed, b, d, r: cosines(s, distinct(seed, b, d, r), d)),
    "inverse dct": one_sided(lambda s, seed, b, d, r: cosines(s, distinct(seed, b, d, r), d, True)),
    "coordinates": one_sided(lambda s, seed, b, d, r: Coordinates(s, distinct(seed, b, d, r), d)),
}
KINDS: dict[str, Maker] = {
    f"{kind} {side}": maker for kind, pair in ONE_SIDED.items() for side, maker in pair.items()
}
KINDS["two-sided"] = lambda seed, b, m, n, r: TwoSided(
    orthonormal(seed, *b, m, r), orthonormal(seed + 1, *b, n, max(1, r - 1))
)
KINDS["entries"] = lambda seed, b, m, n, r: Entries(distinct(seed, b, m * n, r), (m, n))
KINDS["whole"] = lambda seed, b, m, n, r: Whole()

kinds = st.sampled_from(sorted(KINDS))
one_sided_kinds = st.sampled_from([k for k in sorted(KINDS) if k.endswith(("left", "right"))])


def explicit_lift(subspace: Subspace, c: Tensor, m: int, n: int) -> Tensor:
    """Lift by the definition: a sum of basis matrices, or dense products."""
    if isinstance(subspace, Whole):
        return c
    if isinstance(subspace, Entries):
        one_hot = torch.nn.functional.one_hot(subspace.index, m * n).to(c.dtype)
        return (c.unsqueeze(-2) @ one_hot).unflatten(-1, (m, n)).squeeze(-3)
    if isinstance(subspace, TwoSided):
        left, right = subspace.dense(c.dtype)
        return torch.einsum("...ia,...ab,...jb->...ij", left, c, right)
    assert isinstance(subspace, OneSided)
    columns = subspace.dense(c.dtype)
    if subspace.side == "left":
        return torch.einsum("...ia,...aj->...ij", columns, c)
    return torch.einsum("...ia,...ja->...ij", c, columns)


@st.composite
def cases(
    draw: st.DrawFn, names: st.SearchStrategy[str] = kinds
) -> tuple[Subspace, Tensor, Tensor]:
    """A subspace, a matrix of its space (contiguous or not) and coordinates."""
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    m, n = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    rank = draw(st.integers(1, min(m, n)))
    seed = draw(seeds)
    subspace = KINDS[draw(names)](seed, batch, m, n, rank)
    x = normal(seed + 2, *batch, m, n)
    if draw(st.booleans()):
        x = x.mT.contiguous().mT
    return subspace, x, normal(seed + 3, *batch, *subspace.coordinate_shape(m, n))


@settings(deadline=None, max_examples=80)
@given(cases())
def test_coordinates_have_the_declared_shape_and_survive_a_lift(
    case: tuple[Subspace, Tensor, Tensor],
) -> None:
    subspace, x, c = case
    assert subspace.orthonormal
    assert subspace.project(x).shape == c.shape
    assert subspace.lift(c).shape == x.shape
    assert close(subspace.project(subspace.lift(c)), c, atol=1e-10)


@settings(deadline=None, max_examples=80)
@given(cases())
def test_lift_and_project_are_the_explicit_products(case: tuple[Subspace, Tensor, Tensor]) -> None:
    subspace, x, c = case
    expected = explicit_lift(subspace, c, *x.shape[-2:])
    assert close(subspace.lift(c), expected, atol=1e-12)
    # project is the adjoint of lift: <x, lift(c)> = <project(x), c>.
    inner = (subspace.project(x) * c).sum()
    assert close((x * expected).sum(), inner, atol=1e-10)


@settings(deadline=None, max_examples=80)
@given(cases())
def test_projection_is_idempotent_and_residual_is_orthogonal_to_it(
    case: tuple[Subspace, Tensor, Tensor],
) -> None:
    subspace, x, _ = case
    inside, outside = subspace.lift(subspace.project(x)), subspace.residual(x)
    assert close(subspace.lift(subspace.project(inside)), inside, atol=1e-10)
    assert close(inside + outside, x, atol=1e-12)
    zero = torch.zeros((), dtype=DOUBLE)
    assert close(subspace.project(outside), zero, atol=1e-10)
    assert close((inside * outside).sum(), zero, atol=1e-9)
    assert torch.equal(outside, subspace.residual(x, subspace.project(x)))


@settings(deadline=None, max_examples=120)
@given(cases(), st.sampled_from([0.0, 1.0, -0.5]), st.sampled_from([1.0, 0.0, 0.9]))
def test_add_lift_equals_the_explicit_sum(
    case: tuple[Subspace, Tensor, Tensor], alpha: float, beta: float
) -> None:
    subspace, target, c = case
    expected = beta * target + alpha * explicit_lift(subspace, c, *target.shape[-2:])
    if beta == 0:
        target.fill_(torch.nan)
    assert subspace.add_lift_(target, c, alpha=alpha, beta=beta) is target
    assert close(target, expected, atol=1e-11)


class LargestNewStorage(TorchDispatchMode):
    """Records the size of the largest storage that any operation allocates."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, size)
        return result


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"whole"}))
@pytest.mark.parametrize("beta", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("batch", [(), (1,), (3,)])
def test_add_lift_makes_no_full_size_temporary(
    kind: str, beta: float, batch: tuple[int, ...]
) -> None:
    subspace = KINDS[kind](0, batch, 40, 50, 4)
    target = normal(1, *batch, 40, 50)
    c = subspace.project(target)
    with LargestNewStorage(target) as largest:
        subspace.add_lift_(target, c, alpha=0.5, beta=beta)
    # Columns, cosine tables and coordinates are all far below the 2000 entries of one matrix.
    assert largest.elements < target.numel() / 4


@settings(deadline=None, max_examples=60)
@given(cases())
def test_out_receives_the_result(case: tuple[Subspace, Tensor, Tensor]) -> None:
    subspace, x, c = case
    for dtype in (DOUBLE, torch.float32):
        projected, lifted = torch.empty_like(c, dtype=dtype), torch.empty_like(x, dtype=dtype)
        assert subspace.project(x, out=projected) is projected
        assert subspace.lift(c, out=lifted) is lifted
        assert close(projected, subspace.project(x).to(dtype), atol=1e-6)
        assert close(lifted, subspace.lift(c).to(dtype), atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(kinds, seeds, st.integers(1, 6), st.integers(1, 6), st.data())
def test_batched_equals_looped(kind: str, seed: int, m: int, n: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    batch = (2, 3)
    subspace = KINDS[kind](seed, batch, m, n, rank)
    x = normal(seed + 2, *batch, m, n)
    c = subspace.project(x)
    for i in range(2):
        for j in range(3):
            single = entry_of(subspace, (i, j))
            assert close(c[i, j], single.project(x[i, j]), atol=1e-12)
            assert close(subspace.residual(x)[i, j], single.residual(x[i, j]), atol=1e-12)


def entry_of(subspace: Subspace, at: tuple[int, int]) -> Subspace:
    """The unbatched subspace of one matrix of a (2, 3) batch."""
    match subspace:
        case Dense(side, basis):
            return Dense(side, basis[at])
        case Seeded(side, size, rank, tuple(many)):
            seed = many[at[0] * 3 + at[1]]
            return Seeded(side, size, rank, seed, dtype=DOUBLE, distribution="orthogonal")
        case FixedColumns(side, index, vectors):
            return FixedColumns(side, index[at], vectors)
        case Coordinates(side, index, size):
            return Coordinates(side, index[at], size)
        case TwoSided(left, right):
            return TwoSided(left[at], right[at])
        case Entries(index, shape):
            return Entries(index[at], shape)
    return subspace


@settings(deadline=None, max_examples=40)
@given(kinds, seeds, st.integers(1, 6), st.integers(1, 6))
def test_one_basis_serves_a_whole_batch(kind: str, seed: int, m: int, n: int) -> None:
    subspace = KINDS[kind](seed, (), m, n, 1)
    x = normal(seed + 2, 3, m, n)
    c = subspace.project(x)
    expected = torch.stack([subspace.residual(matrix) for matrix in x])
    assert close(subspace.residual(x), expected, atol=1e-12)
    assert close(subspace.lift(c), x - expected, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(cases(one_sided_kinds))
def test_columns_are_orthonormal(case: tuple[OneSided, Tensor, Tensor]) -> None:
    subspace, x, _ = case
    columns = subspace.dense(DOUBLE)
    assert columns.shape[-2:] == (subspace.size, subspace.rank)
    assert subspace.size == x.shape[-2 if subspace.side == "left" else -1]
    identity = torch.eye(subspace.rank, dtype=DOUBLE)
    assert close(columns.mT @ columns, identity, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(ONE_SIDED)),
    st.sampled_from(sorted(ONE_SIDED)),
    st.sampled_from(["left", "right"]),
    seeds,
    st.sampled_from([(), (2,)]),
    st.data(),
)
def test_change_and_overlap_come_from_the_columns(
    new: str, old: str, side: str, seed: int, batch: tuple[int, ...], data: st.DataObject
) -> None:
    d = data.draw(st.integers(1, 7))
    ranks = data.draw(st.integers(1, d)), data.draw(st.integers(1, d))
    a = ONE_SIDED[new][side](seed, batch, d, d, ranks[0])
    b = ONE_SIDED[old][side](seed + 50, batch, d, d, ranks[1])
    assert isinstance(a, OneSided) and isinstance(b, OneSided)
    change = a.change_from(b)
    expected = torch.einsum("...ia,...ib->...ab", a.dense(DOUBLE), b.dense(DOUBLE))
    assert change.shape == (*batch, *ranks)
    assert close(change.to(DOUBLE), expected, atol=1e-6)
    overlap = a.overlap(b)
    # Independent route: the trace of a product of projectors.
    projectors = (s.dense(DOUBLE) @ s.dense(DOUBLE).mT for s in (a, b))
    trace = torch.einsum("...ij,...ji->...", *projectors) / min(ranks)
    assert overlap.shape == batch
    assert close(overlap.to(DOUBLE), trace, atol=1e-6)
    assert close(a.overlap(a).to(DOUBLE), torch.ones(batch, dtype=DOUBLE), atol=1e-6)


@pytest.mark.parametrize("kind", ["coordinates", "dct", "inverse dct"])
def test_change_between_chosen_columns_is_exactly_zero_or_one(kind: str) -> None:
    a, b = (ONE_SIDED[kind]["left"](seed, (2,), 9, 9, 5) for seed in (1, 2))
    assert isinstance(a, OneSided) and isinstance(b, OneSided)
    change = a.change_from(b)
    assert set(change.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(a.change_from(a), torch.eye(5).expand(2, 5, 5))


def test_change_moves_coordinates_into_the_new_basis() -> None:
    x = normal(0, 6, 8)
    old, new = Dense("left", orthonormal(1, 6, 3)), Dense("left", orthonormal(2, 6, 2))
    c = old.project(x)
    assert close(new.change_from(old) @ c, new.project(old.lift(c)), atol=1e-12)
    old, new = Dense("right", orthonormal(3, 8, 3)), Dense("right", orthonormal(4, 8, 2))
    c = old.project(x)
    assert close(c @ new.change_from(old).mT, new.project(old.lift(c)), atol=1e-12)
    two_old = TwoSided(orthonormal(5, 6, 2), orthonormal(6, 8, 3))
    two_new = TwoSided(orthonormal(7, 6, 3), orthonormal(8, 8, 4))
    left, right = two_new.change_from(two_old)
    c = two_old.project(x)
    assert close(left @ c @ right.mT, two_new.project(two_old.lift(c)), atol=1e-12)


def test_overlap_of_two_sided_is_that_of_the_spanned_matrices() -> None:
    a = TwoSided(orthonormal(0, 5, 2), orthonormal(1, 4, 3))
    b = TwoSided(orthonormal(2, 5, 2), orthonormal(3, 4, 3))
    full = [torch.kron(s.left, s.right) for s in (a, b)]
    expected = (full[0].mT @ full[1]).square().sum() / 6
    assert close(a.overlap(b), expected, atol=1e-12)


def test_overlap_of_entries_is_the_shared_fraction() -> None:
    a = Entries(torch.tensor([[0, 3, 5], [1, 2, 3]]), (2, 3))
    b = Entries(torch.tensor([5, 0]), (2, 3))
    assert torch.equal(a.overlap(b), torch.tensor([1.0, 0.0]))
    assert float(Whole().overlap(Whole())) == 1.0


def test_overlap_does_not_depend_on_which_columns_represent_a_subspace() -> None:
    basis, mix = orthonormal(0, 7, 3), normal(1, 3, 3)
    a, other = Dense("left", basis @ mix, orthonormal=False), Dense("left", orthonormal(2, 7, 3))
    assert close(a.overlap(other), Dense("left", basis).overlap(other), atol=1e-10)
    assert close(other.overlap(a), a.overlap(other), atol=1e-10)


@pytest.mark.parametrize("distribution", ["gaussian", "gaussian_rows", "orthogonal"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_seeded_equals_dense_with_the_drawn_columns(side: str, distribution: str) -> None:
    drawn = {
        "gaussian": lambda seed: gaussian_basis(seed, 6, 2),
        "gaussian_rows": lambda seed: gaussian_basis(seed, 6, 2, rows=True),
        "orthogonal": lambda seed: random_orthogonal(seed, 6, 2),
    }[distribution]
    subspace = Seeded(side, 6, 2, (3, 9), distribution=distribution)  # type: ignore[arg-type]
    dense = Dense(side, torch.stack([drawn(3), drawn(9)]), subspace.orthonormal)  # type: ignore[arg-type]
    x = normal(0, 2, 6, 6).float()
    assert subspace.orthonormal == (distribution == "orthogonal")
    assert torch.equal(subspace.project(x), dense.project(x))
    assert torch.equal(subspace.residual(x), dense.residual(x))
    assert torch.equal(subspace.materialise().basis, dense.basis)
    assert subspace.materialise().orthonormal == subspace.orthonormal
    assert torch.equal(subspace.overlap(dense), dense.overlap(dense))
    with_lead = Seeded(side, 6, 2, (3, 9), distribution=distribution, lead=(2,))  # type: ignore[arg-type]
    assert torch.equal(with_lead.dense(), dense.basis.unsqueeze(0))


def test_gaussian_lift_of_projection_is_unbiased() -> None:
    x = normal(0, 4, 6)
    draws = 4000
    subspace = Seeded("right", 6, 3, tuple(range(draws)), dtype=DOUBLE)
    mean = subspace.lift(subspace.project(x.expand(draws, 4, 6))).mean(0)
    # Entry variance is (|x_i|^2 + x_ij^2) / r.
    deviation = ((x.square().sum(-1, keepdim=True) + x.square()) / 3 / draws).sqrt()
    assert bool(((mean - x).abs() < 5 * deviation).all())


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(kind: str, low: torch.dtype) -> None:
    subspace = in_dtype(KINDS[kind](0, (2,), 6, 5, 3), low)
    reference = in_dtype(subspace, torch.float32)
    x = normal(1, 2, 6, 5).to(low)
    c = subspace.project(x)
    assert c.dtype == subspace.lift(c).dtype == subspace.residual(x).dtype == torch.float32
    assert close(c, reference.project(x.float()), atol=1e-6)
    for beta in (1.0, 0.0, 0.5):
        target = x.clone()
        expected = beta * x.float() + 0.3 * reference.lift(c)
        subspace.add_lift_(target, c, alpha=0.3, beta=beta)
        # One rounding of the exact sum, up to float32 noise near a tie.
        unit = torch.finfo(low).eps
        assert target.dtype == low
        assert close(target.float(), expected, rtol=0.51 * unit, atol=1e-6)


def in_dtype(subspace: Subspace, dtype: torch.dtype) -> Subspace:
    match subspace:
        case Dense(side, basis):
            return Dense(side, basis.to(dtype))
        case FixedColumns(side, index, vectors):
            return FixedColumns(side, index, vectors.to(dtype))
        case TwoSided(left, right):
            return TwoSided(left.to(dtype), right.to(dtype))
        case Seeded():
            return Dense(subspace.side, subspace.dense(dtype))
    return subspace


def test_float32_basis_and_float64_matrix_give_float64() -> None:
    subspace = Dense("left", orthonormal(0, 5, 2).float())
    assert subspace.project(normal(1, 5, 3)).dtype == DOUBLE
    target = normal(1, 5, 3)
    assert subspace.add_lift_(target, torch.ones(2, 3)).dtype == DOUBLE


def test_projection_onto_rank_min_and_rank_one_zero_matrix() -> None:
    full = Dense("right", orthonormal(0, 4, 4))
    x = normal(1, 6, 4)
    assert close(full.residual(x), torch.zeros_like(x), atol=1e-12)
    one = Dense("left", orthonormal(2, 6, 1))
    assert not one.project(torch.zeros(6, 4)).any()


def test_entries_update_a_transposed_target_in_place() -> None:
    storage = torch.zeros(3, 2, dtype=DOUBLE)
    target = storage.mT
    Entries(torch.tensor([0, 5]), (2, 3)).add_lift_(target, torch.tensor([1.0, 2.0]).double())
    assert storage.flatten().tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 2.0]


def test_gradients_flow_through_projection_and_lift() -> None:
    for kind in KINDS.values():
        subspace = kind(0, (), 4, 5, 2)
        x = normal(1, 4, 5).requires_grad_()
        c = subspace.project(x)
        if isinstance(subspace, Coordinates | Entries):
            c.sum().backward()
        else:
            subspace.lift(c).sum().backward()
        assert x.grad is not None and bool(x.grad.any())


def test_undefined_requests_say_between_what() -> None:
    entries = Entries(torch.tensor([0]), (2, 2))
    with pytest.raises(TypeError, match="change_from is not defined for Entries and Entries"):
        entries.change_from(entries)
    with pytest.raises(TypeError, match="dense is not defined for Entries"):
        entries.dense()
    with pytest.raises(TypeError, match="overlap is not defined for Entries and Whole"):
        entries.overlap(Whole())
    with pytest.raises(TypeError, match="dense is not defined for Whole"):
        Whole().dense()
    with pytest.raises(TypeError, match="change_from is not defined for Whole and Whole"):
        Whole().change_from(Whole())
    two = TwoSided(torch.eye(2), torch.eye(2))
    dense = Dense("left", torch.eye(2))
    with pytest.raises(TypeError, match="change_from is not defined for TwoSided and Dense"):
        two.change_from(dense)
    with pytest.raises(TypeError, match="overlap is not defined for Dense and TwoSided"):
        dense.overlap(two)


def test_subspaces_of_different_spaces_are_not_compared() -> None:
    left, right = Dense("left", torch.eye(3)), Dense("right", torch.eye(3))
    with pytest.raises(ValueError, match="got left of size 3 and right of size 3"):
        left.change_from(right)
    with pytest.raises(ValueError, match="got left of size 3 and left of size 2"):
        left.overlap(Coordinates("left", torch.tensor([0]), 2))
    with pytest.raises(ValueError, match=r"got \(2, 2\) and \(1, 4\)"):
        Entries(torch.tensor([0]), (2, 2)).overlap(Entries(torch.tensor([0]), (1, 4)))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match='side must be "left" or "right", got \'both\''):
        Dense("both", torch.eye(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"basis must have shape"):
        Dense("left", torch.ones(2))
    with pytest.raises(TypeError, match=r"index must be int64, got torch.int32"):
        Coordinates("left", torch.zeros(1, dtype=torch.int32), 2)
    with pytest.raises(ValueError, match="distribution must be one of gaussian"):
        Seeded("left", 3, 2, 0, distribution="uniform")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rank must be between 1 and 3.*got 4"):
        Seeded("left", 3, 4, 0, distribution="orthogonal")
    with pytest.raises(ValueError, match=r"out must have shape \(2, 3\), got \(3, 2\)"):
        Dense("left", torch.eye(4, 2)).project(torch.ones(4, 3), out=torch.ones(3, 2))
