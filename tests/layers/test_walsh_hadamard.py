"""LBP-WHT: the recorded layer, exact with all Walsh functions, a fraction of the activations."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from subspan.layers import WalshHadamardLinear, lbp_wht
from subspan.layers.walsh import low_pass_functions, walsh_matrix
from subspan.linalg import generator

RECORDING = Path(__file__).parents[1] / "golden" / "lbp_wht_linear.safetensors"


def layer(**options: object) -> WalshHadamardLinear:
    torch.manual_seed(0)
    return WalshHadamardLinear(5, 7, **options)


def gradients(module: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Of input, weight and bias."""
    x = x.detach().requires_grad_()
    return list(
        torch.autograd.grad(module(x), [x, module.weight, module.bias], upstream, allow_unused=True)
    )


def exact(module: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = F.linear(x, module.weight, module.bias)
    return list(torch.autograd.grad(y, [x, module.weight, module.bias], upstream))


def test_layer_equals_the_recording() -> None:
    recorded = load_file(RECORDING)
    with safe_open(RECORDING, "pt") as file:
        spec = json.loads(file.metadata()["spec"])
    module = WalshHadamardLinear(
        24, 40, order=spec["order"], lp_tri_order=spec["lp_tri_order"], spatial=spec["spatial"]
    )
    module.load_state_dict({"weight": recorded["weight"], "bias": recorded["bias"]})
    assert torch.equal(walsh_matrix(8), recorded["walsh_matrix"])
    functions = module.functions.mT.view(-1, 8, 8)
    assert torch.equal(functions, recorded["masks"])
    torch.testing.assert_close(module(recorded["x"]), recorded["y"], rtol=1e-4, atol=1e-4)
    found = gradients(module, recorded["x"], recorded["grad_y"])
    for name, gradient in zip(("x", "weight", "bias"), found, strict=True):
        torch.testing.assert_close(gradient, recorded[f"grad_{name}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 16])
def test_walsh_functions_are_orthogonal_and_ordered_by_sign_changes(order: int) -> None:
    walsh = walsh_matrix(order)
    assert torch.equal(walsh @ walsh.mT, order * torch.eye(order))
    changes = [(row[1:] != row[:-1]).sum().item() for row in walsh]
    assert changes == list(range(order))
    assert bool((walsh[:, 0] == 1).all())


@pytest.mark.parametrize("order,tri", [(8, 1), (8, 4), (8, 8), (4, 6), (4, 7)])
def test_low_pass_functions_are_orthogonal_and_as_many_as_the_triangle_holds(
    order: int, tri: int
) -> None:
    functions = low_pass_functions(order, tri)
    rank = sum(1 for p in range(order) for q in range(order) if p + q < tri)
    assert functions.shape == (order**2, rank)
    assert rank == tri * (tri + 1) // 2 or tri > order
    assert torch.equal(functions.mT @ functions, order**2 * torch.eye(rank))


@pytest.mark.parametrize("class_tokens", [0, 2])
@pytest.mark.parametrize("spatial,order", [((8, 4), 4), ((2, 6), 2), ((8, 8), 8), ((3, 5), 1)])
def test_all_functions_give_the_exact_backward(
    spatial: tuple[int, int], order: int, class_tokens: int
) -> None:
    module = layer(
        order=order, lp_tri_order=2 * order - 1, spatial=spatial, class_tokens=class_tokens
    ).double()
    tokens = class_tokens + spatial[0] * spatial[1]
    draw = generator(order)
    x = torch.randn(3, tokens, 5, generator=draw, dtype=torch.float64)
    upstream = torch.randn(3, tokens, 7, generator=draw, dtype=torch.float64)
    assert module.rank == order**2
    for found, expected in zip(
        gradients(module, x, upstream), exact(module, x, upstream), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_exact_case_passes_gradcheck() -> None:
    module = layer(order=2, lp_tri_order=3, spatial=(2, 4), class_tokens=1).double()
    x = torch.randn(1, 9, 5, dtype=torch.float64, requires_grad=True)

    def apply(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(apply, (x, module.weight, module.bias))


@pytest.mark.parametrize("tri", [1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_are_those_of_the_filtered_tokens(seed: int, tri: int) -> None:
    """Filtering by P = B Bᵀ / o² in every patch: dx = P dy W and dW = (P dy)ᵀ (P x)."""
    order, h, w = 4, 8, 12
    module = layer(order=order, lp_tri_order=tri, spatial=(h, w), class_tokens=1)
    draw = generator(seed)
    x, upstream = (torch.randn(2, 1 + h * w, size, generator=draw) for size in (5, 7))
    functions = low_pass_functions(order, tri)
    projector = (functions @ functions.mT / order**2).view(order, order, order, order)

    def filtered(tokens: Tensor) -> Tensor:
        grid = tokens[:, 1:].clone().view(2, h, w, -1)
        for top in range(0, h, order):
            for left in range(0, w, order):
                patch = grid[:, top : top + order, left : left + order].clone()
                grid[:, top : top + order, left : left + order] = torch.einsum(
                    "ijkl,bklc->bijc", projector, patch
                )
        return torch.cat([tokens[:, :1], grid.flatten(1, 2)], dim=1)

    low_x, low_upstream = filtered(x), filtered(upstream)
    grad_x, grad_weight, grad_bias = gradients(module, x, upstream)
    torch.testing.assert_close(grad_x, low_upstream @ module.weight, rtol=1e-4, atol=1e-5)
    expected = low_upstream.flatten(0, 1).mT @ low_x.flatten(0, 1)
    torch.testing.assert_close(grad_weight, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_bias, upstream.sum((0, 1)), rtol=1e-4, atol=1e-5)


def test_border_of_a_grid_that_patches_do_not_fill() -> None:
    # dx is exact with all functions, because reflected tokens are cut off; dW counts them twice.
    module = layer(order=4, lp_tri_order=7, spatial=(5, 6)).double()
    x, upstream = (torch.randn(2, 30, size, dtype=torch.float64) for size in (5, 7))
    grad_x, grad_weight, _ = gradients(module, x, upstream)
    torch.testing.assert_close(grad_x, exact(module, x, upstream)[0])

    def extended(tokens: Tensor) -> Tensor:
        grid = tokens.mT.unflatten(2, (5, 6))
        return F.pad(grid, (1, 1, 2, 1), mode="reflect").flatten(2).mT

    expected = extended(upstream).flatten(0, 1).mT @ extended(x).flatten(0, 1)
    torch.testing.assert_close(grad_weight, expected)


@pytest.mark.parametrize("class_tokens", [0, 1])
def test_saved_activations_shrink_to_rank_in_patch_size(class_tokens: int) -> None:
    module = layer(order=8, lp_tri_order=3, spatial=(16, 16), class_tokens=class_tokens)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(2, 256 + class_tokens, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    kept = [t for t in saved if t is not module.weight and t.shape != module.functions.shape]
    assert sum(t.untyped_storage().nbytes() for t in kept) == 4 * 2 * 5 * (
        256 * module.rank // 64 + class_tokens
    )


def test_evaluation_mode_has_exact_gradients() -> None:
    module = layer(order=4, lp_tri_order=1, spatial=(4, 4)).eval()
    x, upstream = torch.randn(2, 16, 5), torch.randn(2, 16, 7)
    for found, expected in zip(
        gradients(module, x, upstream), exact(module, x, upstream), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_grid_is_inferred_from_square_and_image_inputs() -> None:
    inferred, given = layer(order=4), layer(order=4, spatial=(8, 8))
    x, upstream = torch.randn(2, 64, 5), torch.randn(2, 64, 7)
    expected = gradients(given, x, upstream)
    for found, reference in zip(gradients(inferred, x, upstream), expected, strict=True):
        assert torch.equal(found, reference)
    image = gradients(inferred, x.view(2, 8, 8, 5), upstream.view(2, 8, 8, 7))
    assert torch.equal(image[0].flatten(1, 2), expected[0])
    assert torch.equal(image[1], expected[1])
    assert inferred(torch.randn(2, 4, 12, 5)).shape == (2, 4, 12, 7)


def test_lower_precision_and_autocast() -> None:
    module = layer(order=4, spatial=(8, 8)).to(torch.bfloat16)
    x, upstream = (torch.randn(2, 64, size, dtype=torch.bfloat16) for size in (5, 7))
    assert all(g.dtype == torch.bfloat16 for g in gradients(module, x, upstream))
    module = layer(order=4, spatial=(8, 8))
    x = torch.randn(2, 64, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == module.weight.grad.dtype == torch.float32


def test_a_frozen_layer_passes_the_same_gradient_on() -> None:
    module = layer(order=4, spatial=(8, 8))
    x, upstream = torch.randn(2, 64, 5), torch.randn(2, 64, 7)
    expected = gradients(module, x, upstream)[0]
    module.requires_grad_(False)
    x.requires_grad_()
    (found,) = torch.autograd.grad(module(x), x, upstream)
    assert torch.equal(found, expected)


def test_wrong_token_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 63, 5\).*class_tokens=0.*spatial=\(8, 8\)"):
        layer(order=4, spatial=(8, 8))(torch.randn(2, 63, 5))
    with pytest.raises(ValueError, match=r"class_tokens=1 do not make a grid of equal sides"):
        layer(order=4, class_tokens=1)(torch.randn(2, 64, 5))
    with pytest.raises(ValueError, match=r"spatial=\(8, 8\)"):
        layer(order=4, spatial=(8, 8))(torch.randn(2, 4, 16, 5))
    for shape, class_tokens in (((64, 5), 0), ((2, 8, 8, 5), 1), ((2, 1, 5), 1)):
        with pytest.raises(ValueError, match=r"input must be \(batch, class_tokens \+ h \* w"):
            layer(order=4, class_tokens=class_tokens)(torch.randn(shape))
    with pytest.raises(ValueError, match=r"spatial \(2, 2\) is too small .* of order=8"):
        layer(order=8)(torch.randn(2, 4, 5))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"order must be a power of two, got 6"):
        layer(order=6)
    for tri in (0, 8):
        with pytest.raises(ValueError, match=rf"from 1 to 2 \* order - 1 = 7, got {tri}"):
            layer(order=4, lp_tri_order=tri)
    with pytest.raises(ValueError, match=r"class_tokens must not be negative, got -1"):
        layer(class_tokens=-1)
    with pytest.raises(ValueError, match=r"spatial \(8, 2\) is too small"):
        layer(spatial=(8, 2))


def test_model_conversion_shares_parameters_and_leaves_the_head() -> None:
    model = nn.ModuleDict(
        {"fc1": nn.Linear(5, 9), "fc2": nn.Linear(9, 5), "head": nn.Linear(5, 3)}
    ).eval()
    weight = model["fc1"].weight
    assert lbp_wht(model, order=4, lp_tri_order=2, spatial=(4, 4), class_tokens=1) is model
    assert [type(module) for module in model.values()] == [
        WalshHadamardLinear,
        WalshHadamardLinear,
        nn.Linear,
    ]
    assert model["fc1"].weight is weight and not model["fc1"].training
    assert "lp_tri_order=2, spatial=(4, 4), class_tokens=1" in repr(model["fc1"])
    assert list(model["fc1"].state_dict()) == ["weight", "bias"]
    assert type(lbp_wht(nn.Linear(5, 5))) is WalshHadamardLinear
    only = lbp_wht(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), include="1")
    assert type(only[0]) is nn.Linear
