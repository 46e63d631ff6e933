"""The laws of Tucker subspaces, and of the factors that higher-order orthogonal iteration finds."""

import math
from itertools import pairwise, permutations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subspan.linalg.tucker import mode_product, multi_mode_product, tucker_factors, unfold
from subspan.subspaces import Dense, TwoSided
from subspan.subspaces.tucker import Tucker, turn

DOUBLE = torch.float64
SEEDS = (0, 1, 2)

# (sizes, ranks): orders 1 to 5, all modes or some, full rank, sizes of 1.
SHAPES: list[tuple[tuple[int, ...], tuple[int | None, ...]]] = [
    ((6,), (2,)),
    ((7, 5), (3, 2)),
    ((4, 5, 6), (2, 3, 2)),
    ((4, 5, 6), (None, 3, None)),
    ((6, 5, 3, 3), (2, 3, None, None)),
    ((6, 5, 1, 1), (2, None, None, None)),
    ((6, 5, 1, 1), (6, 2, None, None)),
    ((5, 4, 3, 3), (2, 2, 2, 3)),
    ((3, 4, 2, 3, 2), (2, 2, 1, None, 2)),
]
shapes = pytest.mark.parametrize(("sizes", "ranks"), SHAPES)
batches = pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 2)])
every_seed = pytest.mark.parametrize("seed", SEEDS)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def orthonormal(seed: int, *shape: int) -> Tensor:
    return torch.linalg.qr(normal(seed, *shape))[0]


def make(
    seed: int,
    sizes: tuple[int, ...],
    ranks: tuple[int | None, ...],
    batch: tuple[int, ...] = (),
) -> Tucker:
    return Tucker(
        tuple(
            None if r is None else orthonormal(seed + 100 * mode, *batch, d, r)
            for mode, (d, r) in enumerate(zip(sizes, ranks, strict=True))
        )
    )


def columns(subspace: Tucker, sizes: tuple[int, ...]) -> Tensor:
    """The basis of the flattened tensors: the Kronecker product of all factors."""
    result = torch.ones(1, 1, dtype=DOUBLE)
    for d, factor in zip(sizes, subspace.factors, strict=True):
        basis = torch.eye(d, dtype=DOUBLE) if factor is None else factor
        result = torch.einsum("ia,jb->ijab", result, basis).flatten(2).flatten(0, 1)
    return result


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=0.0, atol=atol)


def energy(x: Tensor, factors: tuple[Tensor | None, ...]) -> float:
    return float(Tucker(factors).project(x).double().square().sum())


def hosvd(x: Tensor, ranks: tuple[int | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(
        None if r is None else torch.linalg.svd(x.movedim(mode, 0).flatten(1))[0][:, :r]
        for mode, r in enumerate(ranks)
    )


class Watch(TorchDispatchMode):
    """Counts the operations of matrix products, and the entries of the largest new storage."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.operations += 2 * result.numel() * args[0].shape[-1]
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.known:
            size = result.untyped_storage().nbytes() // result.element_size()
            self.largest = max(self.largest, size)
        return result


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", [0, 1, 2, 3, -1, -4])
def test_mode_product_multiplies_every_fibre(mode: int, transposed: bool) -> None:
    x, matrix = normal(0, 4, 5, 3, 2), normal(1, 6, (4, 5, 3, 2)[mode])
    expected = torch.tensordot(matrix, x, ([1], [mode])).movedim(0, mode)
    for given in (x, x.mT.contiguous().mT):
        product = mode_product(
            given, matrix.mT if transposed else matrix, mode, transposed=transposed
        )
        assert close(product, expected)
        assert product.is_contiguous()


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_mode_product_takes_one_matrix_per_tensor(mode: int) -> None:
    x = normal(0, 3, 4, 5, 2)
    matrices = normal(1, 3, 6, x.shape[mode])
    looped = [mode_product(a, m, mode - 1) for a, m in zip(x, matrices, strict=True)]
    assert close(mode_product(x, matrices, mode), torch.stack(looped))


def test_unfolding_holds_the_fibres_as_columns() -> None:
    x = normal(0, 2, 3, 4, 5)
    for mode in (1, 2, 3):
        matrices = unfold(x, mode, batch=1)
        assert matrices.shape == (2, x.shape[mode], 60 // x.shape[mode])
        assert close(matrices[1, :, 0], x[1].movedim(mode - 1, 0)[:, 0, 0])
        gram = torch.einsum("bdr,ber->bde", matrices, matrices)
        others = tuple(m for m in (1, 2, 3) if m != mode)
        square = (x.unsqueeze(mode) * x.unsqueeze(mode + 1)).sum([m + (m > mode) for m in others])
        assert close(gram, square)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("sizes", "ranks"), [((8, 6, 5), (2, 5, 1)), ((9, 4, 3, 3), (3, 2, None, 1)), ((6, 6), (3, 5))]
)
def test_products_are_made_in_the_cheapest_order(
    sizes: tuple[int, ...], ranks: tuple[int | None, ...], transposed: bool
) -> None:
    big, small = sizes, tuple(d if r is None else r for d, r in zip(sizes, ranks, strict=True))
    source, result = (big, small) if transposed else (small, big)

    def operations(order: tuple[int, ...]) -> int:
        shape, total = list(source), 0
        for mode in order:
            total += 2 * math.prod(shape) * result[mode]
            shape[mode] = result[mode]
        return total

    modes = [mode for mode, r in enumerate(ranks) if r is not None]
    with Watch() as watch:
        multi_mode_product(normal(0, *source), make(1, sizes, ranks).factors, transposed=transposed)
    assert watch.operations == min(map(operations, permutations(modes)))


@shapes
@every_seed
def test_project_and_lift_are_products_with_the_kronecker_basis(
    sizes: tuple[int, ...], ranks: tuple[int | None, ...], seed: int
) -> None:
    subspace, x = make(seed, sizes, ranks), normal(seed + 1, *sizes)
    basis = columns(subspace, sizes)
    c = subspace.project(x)
    assert c.shape == subspace.coordinate_shape(*sizes)
    assert close(c.flatten(), basis.mT @ x.flatten())
    assert close(subspace.lift(c).flatten(), basis @ c.flatten())


@shapes
@batches
def test_coordinates_survive_a_lift_and_the_residual_is_orthogonal(
    sizes: tuple[int, ...], ranks: tuple[int | None, ...], batch: tuple[int, ...]
) -> None:
    subspace, x = make(3, sizes, ranks, batch), normal(4, *batch, *sizes)
    c = normal(5, *batch, *subspace.coordinate_shape(*sizes))
    assert close(subspace.project(subspace.lift(c)), c)
    outside = subspace.residual(x)
    assert close(subspace.project(outside), torch.zeros_like(c))
    assert close(subspace.lift(subspace.project(x)) + outside, x)
    assert torch.equal(outside, subspace.residual(x, subspace.project(x)))


@shapes
def test_batched_equals_looped(sizes: tuple[int, ...], ranks: tuple[int | None, ...]) -> None:
    batch = (2, 3)
    subspace, x = make(0, sizes, ranks, batch), normal(1, *batch, *sizes)
    c = subspace.project(x)
    factors = tuple(f if f is None else f[1, 2] for f in subspace.factors)
    assert close(c[1, 2], Tucker(factors).project(x[1, 2]))
    assert close(subspace.lift(c)[1, 2], Tucker(factors).lift(c[1, 2]))
    assert close(subspace.residual(x)[1, 2], Tucker(factors).residual(x[1, 2]))


@shapes
def test_factors_of_fewer_dimensions_serve_a_whole_batch(
    sizes: tuple[int, ...], ranks: tuple[int | None, ...]
) -> None:
    x = normal(1, 2, 3, *sizes)
    for batch in ((), (3,), (1, 3)):
        subspace = make(0, sizes, ranks, batch)
        whole = tuple(
            None if f is None else f.expand(2, 3, *f.shape[-2:]).clone() for f in subspace.factors
        )
        assert close(subspace.project(x), Tucker(whole).project(x))
        assert close(subspace.residual(x), Tucker(whole).residual(x))


@every_seed
@batches
def test_two_factors_of_a_matrix_are_a_two_sided_subspace(
    seed: int, batch: tuple[int, ...]
) -> None:
    left, right = orthonormal(seed, *batch, 7, 3), orthonormal(seed + 1, *batch, 5, 2)
    other = orthonormal(seed + 2, *batch, 7, 4), orthonormal(seed + 3, *batch, 5, 2)
    pair, tucker = TwoSided(left, right), Tucker((left, right))
    x = normal(seed + 4, *batch, 7, 5)
    c = pair.project(x)
    assert tucker.coordinate_shape(7, 5) == pair.coordinate_shape(7, 5)
    assert close(tucker.project(x), c)
    assert close(tucker.lift(c), pair.lift(c))
    assert close(tucker.residual(x), pair.residual(x))
    added = tucker.add_lift_(x.clone(), c, alpha=0.5, beta=0.9)
    assert close(added, pair.add_lift_(x.clone(), c, alpha=0.5, beta=0.9))
    assert close(tucker.overlap(Tucker(other)), pair.overlap(TwoSided(*other)))
    changes = tucker.change_from(Tucker(other)), pair.change_from(TwoSided(*other))
    for mine, theirs in zip(*changes, strict=True):
        assert mine is not None and torch.equal(mine, theirs)


def test_one_factor_of_a_matrix_is_a_one_sided_subspace() -> None:
    x, left, right = normal(0, 7, 5), orthonormal(1, 7, 3), orthonormal(2, 5, 2)
    assert close(Tucker((left, None)).project(x), Dense("left", left).project(x))
    assert close(Tucker((None, right)).residual(x), Dense("right", right).residual(x))


@shapes
@batches
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (-0.5, 0.9), (2.0, 0.0)])
def test_add_lift_equals_the_explicit_sum(
    sizes: tuple[int, ...],
    ranks: tuple[int | None, ...],
    batch: tuple[int, ...],
    alpha: float,
    beta: float,
) -> None:
    subspace, plain = make(0, sizes, ranks, batch), normal(1, *batch, *sizes)
    c = normal(2, *batch, *subspace.coordinate_shape(*sizes))
    expected = beta * plain + alpha * subspace.lift(c)
    reversed_strides = plain.permute(*range(plain.ndim)[::-1]).contiguous()
    for target in (plain.clone(), reversed_strides.permute(*range(plain.ndim)[::-1])):
        if beta == 0:
            target.fill_(torch.nan)
        assert subspace.add_lift_(target, c, alpha=alpha, beta=beta) is target
        assert close(target, expected)


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [
        ((40, 20, 3, 3), (4, 4, None, None)),  # ends with the first mode
        ((20, 40, 1, 2), (4, 4, None, None)),  # with the second
        ((20, 40, 1, 1), (None, 4, None, None)),  # with the last of those larger than 1
    ],
)
@pytest.mark.parametrize("batch", [(), (1,), (3,)])
@pytest.mark.parametrize("beta", [1.0, 0.9, 0.0])
def test_add_lift_makes_a_full_size_temporary_only_for_another_dtype(
    sizes: tuple[int, ...], ranks: tuple[int | None, ...], batch: tuple[int, ...], beta: float
) -> None:
    subspace, target = make(0, sizes, ranks, batch), normal(1, *batch, *sizes)
    c = subspace.project(target)
    with Watch(target) as watch:
        subspace.add_lift_(target, c, alpha=0.5, beta=beta)
    assert watch.largest < target.numel() / 3
    target = target.bfloat16()
    with Watch(target) as watch:
        subspace.add_lift_(target, c, alpha=0.5, beta=beta)
    assert watch.largest == target.numel()


def test_a_target_of_lower_precision_is_rounded_once() -> None:
    subspace, target = make(0, (6, 5, 3), (3, 2, None)), normal(1, 6, 5, 3).bfloat16()
    c = normal(2, 3, 2, 3)
    expected = (0.9 * target.double() + 0.3 * subspace.lift(c)).bfloat16()
    assert torch.equal(subspace.add_lift_(target, c, alpha=0.3, beta=0.9), expected)


def test_lower_precisions_are_computed_in_float32() -> None:
    subspace = Tucker((orthonormal(0, 6, 3).bfloat16(), None))
    c = subspace.project(normal(1, 6, 5).bfloat16())
    assert c.dtype == subspace.lift(c.bfloat16()).dtype == torch.float32
    assert subspace.lift(c.double()).dtype == DOUBLE


@shapes
def test_out_receives_the_result(sizes: tuple[int, ...], ranks: tuple[int | None, ...]) -> None:
    subspace, x = make(0, sizes, ranks), normal(1, *sizes)
    c = subspace.project(x)
    for dtype in (DOUBLE, torch.float32):
        projected, lifted = torch.empty_like(c, dtype=dtype), torch.empty_like(x, dtype=dtype)
        assert subspace.project(x, out=projected) is projected
        assert subspace.lift(c, out=lifted) is lifted
        assert close(projected, c, atol=1e-6)
        assert close(lifted, subspace.lift(c), atol=1e-6)


def test_the_residual_of_a_channels_last_kernel_is_the_same() -> None:
    subspace, x = make(0, (6, 5, 3, 3), (2, 3, None, None)), normal(1, 6, 5, 3, 3)
    assert close(subspace.residual(x.to(memory_format=torch.channels_last)), subspace.residual(x))


@shapes
@batches
def test_an_unchanged_basis_turns_nothing(
    sizes: tuple[int, ...], ranks: tuple[int | None, ...], batch: tuple[int, ...]
) -> None:
    subspace = make(0, sizes, ranks, batch)
    c = normal(1, *batch, *subspace.coordinate_shape(*sizes))
    change = subspace.change_from(subspace)
    assert [matrix is None for matrix in change] == [rank is None for rank in ranks]
    assert close(turn(c, change), c)
    assert close(turn(c.square(), change, squared=True), c.square())
    assert close(subspace.overlap(subspace), torch.ones(batch))


@shapes
@every_seed
def test_turned_coordinates_are_those_of_the_old_lift(
    sizes: tuple[int, ...], ranks: tuple[int | None, ...], seed: int
) -> None:
    fewer = tuple(r and max(1, r - 1) for r in ranks)
    old, new = make(seed, sizes, ranks), make(seed + 1, sizes, fewer)
    c = normal(seed + 2, *old.coordinate_shape(*sizes))
    change = new.change_from(old)
    assert close(turn(c, change), new.project(old.lift(c)))
    # Second moments: the square of every coefficient of the whole change.
    coefficients = columns(new, sizes).mT @ columns(old, sizes)
    squared = turn(c.square(), change, squared=True)
    assert close(squared.flatten(), coefficients.square() @ c.square().flatten())


@shapes
@every_seed
def test_overlap_is_the_trace_of_the_product_of_projectors(
    sizes: tuple[int, ...], ranks: tuple[int | None, ...], seed: int
) -> None:
    a, b = (
        make(seed, sizes, ranks),
        make(seed + 1, sizes, tuple(r and max(1, r - 1) for r in ranks)),
    )
    mine, theirs = columns(a, sizes), columns(b, sizes)
    trace = torch.trace(mine @ mine.mT @ theirs @ theirs.mT) / min(mine.shape[1], theirs.shape[1])
    assert close(a.overlap(b), trace)


def test_overlap_does_not_depend_on_the_columns_that_span_a_factor() -> None:
    a, b = make(0, (5, 4, 3), (2, 2, None)), make(1, (5, 4, 3), (2, 2, None))
    mixed = Tucker(
        tuple(f if f is None else f @ normal(2, 2, 2) for f in a.factors), orthonormal=False
    )
    assert close(mixed.overlap(b), a.overlap(b))
    assert close(b.overlap(mixed), a.overlap(b))


RECOVERABLE = [s for s in SHAPES if len(s[0]) > 1]


@pytest.mark.parametrize(("sizes", "ranks"), RECOVERABLE)
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_a_tensor_of_the_given_multilinear_rank_is_recovered(
    sizes: tuple[int, ...], ranks: tuple[int | None, ...], iterations: int, dtype: torch.dtype
) -> None:
    for seed in SEEDS:
        truth = make(seed, sizes, ranks)
        x = truth.lift(normal(seed + 1, *truth.coordinate_shape(*sizes))).to(dtype)
        found = Tucker(tucker_factors(x, ranks, iterations=iterations))
        assert close(found.lift(found.project(x)), x, atol=1e-12 if dtype == DOUBLE else 1e-5)


@shapes
@batches
def test_factors_are_orthonormal_and_have_the_ranks(
    sizes: tuple[int, ...], ranks: tuple[int | None, ...], batch: tuple[int, ...]
) -> None:
    x = normal(0, *batch, *sizes)
    for given in (x, torch.zeros_like(x), x.float() * 1e-30):
        for d, r, factor in zip(sizes, ranks, tucker_factors(given, ranks), strict=True):
            assert (factor is None) == (r is None)
            if factor is not None and r is not None:
                assert factor.shape == (*batch, d, r)
                assert close(factor.mT @ factor, torch.eye(r).expand(*batch, r, r), atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [((8, 7, 6), (3, 2, 2)), ((40, 32, 3, 3), (20, 16, None, None)), ((5, 4, 3, 6), (2, 2, 2, 2))],
)
@every_seed
def test_sweeps_only_add_energy_to_that_of_the_higher_order_svd(
    sizes: tuple[int, ...], ranks: tuple[int | None, ...], seed: int
) -> None:
    x = normal(seed, *sizes)
    energies = [energy(x, hosvd(x, ranks))] + [
        energy(x, tucker_factors(x, ranks, iterations=n)) for n in (0, 1, 2, 3, 6)
    ]
    assert energies[1] == pytest.approx(energies[0], rel=1e-12)
    assert all(b >= a * (1 - 1e-12) for a, b in pairwise(energies))
    # Noise has no multilinear rank: the higher-order SVD alone is not the best.
    assert energies[-1] > energies[0] * 1.001
    # A bound: what the best factor of one mode holds alone.
    assert energies[-1] <= min(
        float(torch.linalg.svdvals(x.movedim(mode, 0).flatten(1))[:r].square().sum())
        for mode, r in enumerate(ranks)
        if r is not None
    )


@every_seed
def test_converged_factors_hold_the_leading_directions_given_the_others(seed: int) -> None:
    x = normal(seed, 8, 7, 3, 3)
    a, b, *_ = tucker_factors(x, (3, 2, None, None), iterations=500)
    assert a is not None and b is not None
    for factor, seen in (
        (a, torch.einsum("ijkl,jb->ibkl", x, b)),
        (b, torch.einsum("ijkl,ia->jakl", x, a)),
    ):
        leading = torch.linalg.svd(seen.flatten(1))[0][:, : factor.shape[-1]]
        assert close(factor @ factor.mT, leading @ leading.mT, atol=1e-7)


@every_seed
def test_the_factors_of_a_matrix_are_its_singular_vectors(seed: int) -> None:
    x = normal(seed, 9, 6)
    u, _, vh = torch.linalg.svd(x)
    for rank in (1, 3):
        left, right = tucker_factors(x, (rank, rank))
        assert left is not None and right is not None
        assert close(left @ left.mT, u[:, :rank] @ u[:, :rank].mT)
        assert close(right @ right.mT, vh[:rank].mT @ vh[:rank])


@every_seed
def test_a_warm_start_keeps_its_energy_and_a_fixed_point_stays(seed: int) -> None:
    x, ranks = normal(seed, 8, 7, 6), (3, 2, 2)
    fixed = tucker_factors(x, ranks, iterations=500)
    again = tucker_factors(x, ranks, iterations=1, initial=fixed)
    for old, new in zip(fixed, again, strict=True):
        assert old is not None and new is not None
        assert close(new @ new.mT, old @ old.mT, atol=1e-7)
    # From anywhere else a sweep gains, and what is not given starts from the higher-order SVD.
    start = make(seed, (8, 7, 6), ranks).factors
    assert energy(x, tucker_factors(x, ranks, iterations=1, initial=start)) > energy(x, start)
    partly = tucker_factors(x, ranks, iterations=1, initial=(start[0], None, None))
    for mine, cold in zip(partly, tucker_factors(x, ranks, iterations=1), strict=True):
        assert mine is not None and cold is not None and torch.equal(mine, cold)


@shapes
def test_factors_of_a_batch_are_those_of_each_tensor(
    sizes: tuple[int, ...], ranks: tuple[int | None, ...]
) -> None:
    x = normal(0, 2, 3, *sizes)
    batched = Tucker(tucker_factors(x, ranks))
    single = Tucker(tucker_factors(x[1, 2], ranks))
    assert close(batched.residual(x)[1, 2], single.residual(x[1, 2]), atol=1e-10)


def test_a_kernel_of_lower_precision_is_decomposed_in_float32() -> None:
    x = normal(0, 40, 32, 3, 3).bfloat16()
    half = tucker_factors(x, (20, 16, None, None))
    exact = tucker_factors(x.double(), (20, 16, None, None))
    assert all(f is None or f.dtype == torch.float32 for f in half)
    for mine, theirs in zip(half[:2], exact[:2], strict=True):
        assert mine is not None and theirs is not None
        assert close(mine @ mine.mT, theirs @ theirs.mT, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Tucker((None, None)), "at least one matrix"),
        (lambda: Tucker((torch.ones(3), None)), r"factors\[0\]"),
        (lambda: make(0, (4, 3, 2), (2, None, None)).coordinate_shape(4, 3), "sizes of 3 modes"),
        (
            lambda: make(0, (4, 3), (2, None)).add_lift_(torch.ones(3, 4), torch.ones(2, 3)),
            r"target must have shape \(4, 3\), got \(3, 4\)",
        ),
        (
            lambda: make(0, (4, 3), (2, None)).change_from(make(0, (4, 3), (2, 2))),
            "same modes",
        ),
        (lambda: make(0, (4, 3), (2, 2)).overlap(make(0, (5, 3), (2, 2))), "one space"),
        (lambda: tucker_factors(torch.ones(4, 3), (5, None)), "between 1 and 4"),
        (lambda: tucker_factors(torch.ones(4, 3), (1, 1, 1)), "ranks must"),
        (lambda: tucker_factors(torch.ones(4, 3), (1, 1), iterations=-1), "iterations must"),
        (lambda: tucker_factors(torch.ones(4, 3), (1, 1), initial=(None,)), "initial must"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_tucker_subspace_has_no_columns_and_none_in_common_with_other_kinds() -> None:
    subspace, pair = make(0, (4, 3), (2, 2)), TwoSided(orthonormal(0, 4, 2), orthonormal(1, 3, 2))
    for call in (
        subspace.dense,
        lambda: subspace.change_from(pair),
        lambda: subspace.overlap(pair),
    ):
        with pytest.raises(TypeError, match="not defined for Tucker"):
            call()
