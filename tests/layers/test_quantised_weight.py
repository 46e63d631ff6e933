"""A quantised weight is a parameter like any other: gradients, hooks, copies, files, devices."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subspan.layers import QuantisedWeight
from subspan.linalg import generator
from subspan.linalg.affine import dequantise_affine, quantise_affine

GROUP = 64


def parameter(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, bits: int = 8
) -> nn.Parameter:
    values = torch.randn(shape, generator=generator(seed)).to(dtype)
    return nn.Parameter(QuantisedWeight.from_float(values, GROUP, bits))


def same(a: Tensor, b: Tensor) -> bool:
    return (
        isinstance(a, QuantisedWeight)
        and isinstance(b, QuantisedWeight)
        and all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("codes", "scale", "zero"))
        and (a.group, a.bits, a.dtype) == (b.group, b.bits, b.dtype)
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_values_are_those_of_the_affine_quantiser(seed: int, bits: int) -> None:
    weight = parameter(30, 21, seed=seed, bits=bits)
    values = torch.randn(30, 21, generator=generator(seed))
    parts = quantise_affine(values, bits, GROUP)
    expected = dequantise_affine(*parts, GROUP).view(30, 21)
    assert torch.equal(weight.dequantise(), expected)
    low = torch.empty(30, 21, dtype=torch.bfloat16)
    assert weight.dequantise(out=low) is low
    assert torch.equal(low, expected.bfloat16())
    assert torch.equal(weight * 1, expected)


def test_it_appears_as_a_dense_float_parameter() -> None:
    weight = parameter(30, 21, dtype=torch.bfloat16)
    assert isinstance(weight, nn.Parameter) and isinstance(weight, QuantisedWeight)
    assert weight.requires_grad and weight.is_leaf
    assert weight.shape == (30, 21) and weight.numel() == 630 and weight.stride() == (21, 1)
    assert weight.is_contiguous() and weight.dtype == torch.bfloat16
    assert "bits=8, group=64" in repr(weight)
    for plain in (
        torch.zeros_like(weight, dtype=torch.float32),
        torch.empty_like(weight, dtype=torch.float32),
        weight.new_zeros(30, 21, dtype=torch.float32),
    ):
        assert type(plain) is Tensor and plain.shape == (30, 21) and plain.is_contiguous()
        assert plain.dtype == torch.float32
    assert torch.zeros_like(weight).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("leading", [(), (7,), (2, 5)])
def test_linear_and_its_gradients_equal_those_of_the_dequantised_weight(
    leading: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = parameter(30, 21, dtype=dtype)
    x = torch.randn(*leading, 21, dtype=dtype, requires_grad=True)
    bias = torch.randn(30, dtype=dtype, requires_grad=True)
    upstream = torch.randn(*leading, 30, dtype=dtype)
    F.linear(x, weight, bias).backward(upstream)
    plain = [t.detach().clone().requires_grad_() for t in (x, weight.dequantise(), bias)]
    expected = F.linear(*plain)
    assert torch.equal(F.linear(x, weight, bias), expected)
    assert torch.equal(F.linear(input=x, weight=weight), F.linear(x, plain[1]))
    expected.backward(upstream)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for found, reference in zip((x, weight, bias), plain, strict=True):
        assert type(found.grad) is Tensor and found.grad.dtype == dtype
        torch.testing.assert_close(found.grad, reference.grad, rtol=tolerance, atol=tolerance)


def test_backward_is_the_derivative_of_the_forward() -> None:
    weight = parameter(6, 5, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: F.linear(x, weight), (x,))


def test_matmul_with_the_transpose_works_and_differentiates() -> None:
    weight = parameter(30, 21)
    x = torch.randn(4, 21)
    (x @ weight.mT).square().sum().backward()
    plain = weight.dequantise().requires_grad_()
    (x @ plain.mT).square().sum().backward()
    assert torch.allclose(weight.grad, plain.grad)


def test_autograd_saves_the_codes_and_no_float_copy() -> None:
    weight = parameter(30, 21)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(4, 21, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.linear(x, weight)
    assert [type(t) for t in saved] == [Tensor, QuantisedWeight]
    assert saved[0].shape == (4, 21)


def test_gradients_accumulate_and_hooks_see_them() -> None:
    weight = parameter(30, 21)
    seen: list[tuple[Tensor, Tensor]] = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append((p, p.grad.clone())))
    x = torch.randn(4, 21)
    for _ in range(2):
        F.linear(x, weight).sum().backward()
    once = torch.ones(4, 30).mT @ x
    assert len(seen) == 2 and seen[0][0] is weight
    assert torch.allclose(seen[0][1], once) and torch.allclose(seen[1][1], 2 * once)
    nn.utils.clip_grad_norm_([weight], 1.0)
    assert float(weight.grad.norm()) == pytest.approx(1.0, rel=1e-3)
    weight.grad = torch.zeros(30, 21)


def test_autocast_computes_in_its_dtype() -> None:
    weight = parameter(30, 21)
    x = torch.randn(4, 21, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, weight, torch.randn(30))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_quantise_replaces_values_and_scales() -> None:
    weight = parameter(30, 21)
    values = 5 * torch.randn(30, 21, generator=generator(9))
    codes = weight.codes
    assert weight.quantise_(values) is weight
    assert weight.codes is codes
    assert same(weight.detach(), QuantisedWeight.from_float(values, GROUP))
    before = weight.codes.clone()
    weight.quantise_(values, generator(1))
    assert not torch.equal(weight.codes, before)
    assert float((weight.dequantise() - values).abs().max()) <= 1.5 * float(weight.scale.max())
    with pytest.raises(ValueError, match=r"shape \(30, 21\), got \(21, 30\)"):
        weight.quantise_(values.mT)


def test_changing_the_weight_between_forward_and_backward_is_an_error() -> None:
    weight = parameter(30, 21)
    y = F.linear(torch.randn(4, 21, requires_grad=True), weight)
    weight.quantise_(torch.zeros(30, 21))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies_are_independent_and_detach_and_data_are_not() -> None:
    weight = parameter(30, 21)
    for other in (copy.deepcopy(weight), weight.clone(), weight.to(torch.float32, copy=True)):
        assert same(other, weight)
        assert other.codes.data_ptr() != weight.codes.data_ptr()
    assert isinstance(copy.deepcopy(weight), nn.Parameter)
    for view in (weight.detach(), weight.data):
        assert same(view, weight) and view.codes is weight.codes and not view.requires_grad
    other = parameter(30, 21, seed=1)
    weight.data = other.data
    assert same(weight, other)
    assert torch.equal(weight * 1, other.dequantise())


def test_pickle_and_weights_only_load_keep_it_quantised() -> None:
    weight = parameter(30, 21, dtype=torch.bfloat16, bits=4)
    buffer = io.BytesIO()
    torch.save({"weight": weight}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)["weight"]
    for other in (loaded, pickle.loads(pickle.dumps(weight))):
        assert same(other, weight)
        assert isinstance(other, nn.Parameter) and other.requires_grad


def test_copy_between_quantised_and_plain_tensors() -> None:
    weight, other = parameter(30, 21), parameter(30, 21, seed=1)
    with torch.no_grad():
        weight.copy_(other)
        assert same(weight, other)
        plain = torch.empty(30, 21)
        plain.copy_(weight)
        assert torch.equal(plain, other.dequantise())
        row = torch.randn(21)
        weight.copy_(row)
        assert same(weight.data, QuantisedWeight.from_float(row.expand(30, 21), GROUP))
        coarse = QuantisedWeight.from_float(torch.zeros(30, 21), 16, 4)
        coarse.copy_(other)
        assert same(coarse, QuantisedWeight.from_float(other.dequantise(), 16, 4))


def test_initialisers_overwrite_it() -> None:
    weight = parameter(64, 64)
    nn.init.normal_(weight, std=0.02)
    assert 0.018 < float(weight.dequantise().std()) < 0.022
    nn.init.constant_(weight, 0.25)
    assert torch.allclose(weight.dequantise(), torch.tensor(0.25))
    nn.init.zeros_(weight)
    assert not bool(weight.dequantise().any())
    nn.init.kaiming_uniform_(weight)
    assert bool(weight.dequantise().any())


@pytest.mark.parametrize("foreach", [True, False])
def test_small_changes_in_place_are_refused(foreach: bool) -> None:
    weight = parameter(30, 21)
    weight.grad = torch.ones(30, 21)
    with pytest.raises(NotImplementedError, match=r"quantise_\(values, generator\)"):
        torch.optim.SGD([weight], lr=0.1, foreach=foreach).step()
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"rounding to nearest"):
        weight.mul_(0.9)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"assigning to an index"):
        weight[0] = 0
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"add.out"):
        torch.add(torch.ones(30, 21), 1, out=weight)


def test_module_moves_change_the_dtype_it_appears_as() -> None:
    linear = nn.Linear(21, 30)
    linear.weight = weight = parameter(30, 21)
    codes = weight.codes.clone()
    linear.to(torch.bfloat16)
    assert linear.weight is weight and weight.dtype == torch.bfloat16 and weight.requires_grad
    assert torch.equal(weight.codes, codes) and weight.scale.dtype == torch.float32
    linear(torch.randn(2, 21, dtype=torch.bfloat16)).sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert linear.to("meta").weight.codes.is_meta


def test_a_large_model_is_planned_on_the_meta_device() -> None:
    weight = QuantisedWeight.from_float(torch.empty(11008, 4096, device="meta"))
    assert weight.is_meta and weight.codes.shape == (11008, 4096)
    assert weight.scale.numel() == 11008 * 4096 // 256
    y = F.linear(torch.empty(3, 4096, device="meta", requires_grad=True), nn.Parameter(weight))
    assert y.shape == (3, 11008)
    assert nn.Parameter(weight).to("meta", torch.bfloat16).dequantise().is_meta


def test_it_can_be_shared_between_processes() -> None:
    weight = parameter(30, 21)
    weight.share_memory_()
    assert all(getattr(weight, name).is_shared() for name in ("codes", "scale", "zero"))


def test_compiled_linear_equals_the_eager_one() -> None:
    linear = nn.Linear(21, 30)
    linear.weight = parameter(30, 21)
    x = torch.randn(4, 21)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    found = linear.weight.grad.clone()
    linear.zero_grad()
    linear(x).square().sum().backward()
    assert torch.allclose(found, linear.weight.grad)


def test_parts_that_do_not_fit_are_refused() -> None:
    weight = parameter(30, 21)
    codes, scale, zero = weight.codes, weight.scale, weight.zero
    with pytest.raises(TypeError, match=r"must be uint8, float32, uint8, got \(torch.float32"):
        QuantisedWeight(codes.float(), scale, zero, group=GROUP)
    with pytest.raises(ValueError, match=r"\(3,\) for codes \(30, 21\) in groups of 256"):
        QuantisedWeight(codes, scale, zero)
    with pytest.raises(TypeError, match=r"dtype must be a real floating dtype, got torch.int8"):
        QuantisedWeight(codes, scale, zero, group=GROUP, dtype=torch.int8)
