"""A weight held as blockwise affine codes of at most 8 bits, trained like any float parameter.

The weights of Q-GaLore ("Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive
Low-Rank Gradients", 2024, arXiv:2407.08296): no full-precision copy exists. A linear layer
dequantises its weight for the product and once more in the backward,

    y = x Wᵀ + b,   dx = dy W,   dW = dyᵀ x,   with W = s (q - z)  (subspan.linalg.affine)

dW, in the dtype of the activations, goes to `weight.grad` as an ordinary tensor (which, as for any
parameter, has the dtype of the weight). After a step the whole weight is quantised anew, best with
stochastic rounding: to nearest, steps smaller than s / 2 would be lost.

Departures from the authors' code: the gradient is the parameter's own `.grad`, not an attribute of
an integer tensor, so hooks, clipping, accumulation and optimizers find it where they always do; the
codes cover the whole range of a group (`zero_in_range` in `subspan.linalg.affine`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_any, tree_map_only

from subspan.linalg.affine import dequantise_affine, group_count, quantise_affine

from .quantised_product import quantised_linear

PARTS = ("codes", "scale", "zero")
"""The plain tensors that a quantised weight consists of."""

aten = torch.ops.aten

_ATTRIBUTES = (*PARTS, "group", "bits")
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


class QuantisedWeight(Tensor):
    """A tensor of a floating dtype that is stored as codes, scales and zeros.

    `torch.nn.functional.linear` (and so `nn.Linear`) multiplies by it without keeping a float copy.
    Any other function sees its dequantised values, as a plain tensor, and so differentiates as
    usual at the price of what autograd then saves; a view of it, too, is one of a float copy.
    `detach`, `clone`, `to`, `copy_`, deepcopy,
    pickling and `torch.save` keep it quantised; `torch.zeros_like` and its kin give plain tensors.
    Functions that overwrite it (`copy_`, `fill_`, `zero_`, `normal_`, `uniform_`) round to nearest;
    those that change it in place (`add_`, assigning to an index) are refused, because rounding to
    nearest would lose small changes: use `quantise_`.

    Attributes:
        codes: uint8, the shape of the weight.
        scale: float32 (groups).
        zero: uint8 (groups).
        group: values that share a scale, counted in row-major order.
        bits: of a code.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: int
    bits: int

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        *,
        group: int = 256,
        bits: int = 8,
        dtype: torch.dtype = torch.float32,
    ) -> QuantisedWeight:
        """Wrap codes, scales and zeros as they are; `from_float` makes them.

        Args:
            codes: uint8, contiguous, in the shape of the weight.
            scale: float32 (groups).
            zero: uint8 (groups).
            group: values that share a scale.
            bits: of a code, 1 to 8.
            dtype: what the weight appears as, and that of its gradient.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: the numbers of scales or zeros do not fit codes and group.
        """
        found = codes.dtype, scale.dtype, zero.dtype
        if found != (torch.uint8, torch.float32, torch.uint8):
            raise TypeError(f"codes, scale, zero must be uint8, float32, uint8, got {found}")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a real floating dtype, got {dtype}")
        groups = group_count(codes.numel(), group)
        if tuple(scale.shape) != (groups,) or tuple(zero.shape) != (groups,):
            raise ValueError(
                f"scale and zero must have the shape ({groups},) for codes {tuple(codes.shape)} "
                f"in groups of {group}, got {tuple(scale.shape)} and {tuple(zero.shape)}"
            )
        self = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)
        self.codes, self.scale, self.zero = codes, scale, zero
        self.group, self.bits = group, bits
        return self

    @classmethod
    def from_float(cls, values: Tensor, group: int = 256, bits: int = 8) -> QuantisedWeight:
        """The weight nearest to `values` (any shape and floating dtype), in their dtype.

        Not differentiable; on the meta device nothing is computed.

        Raises:
            TypeError: `values` is not of a real floating dtype.
            ValueError: `group` or `bits` out of range.
        """
        codes, scale, zero = quantise_affine(values, bits, group)
        codes = codes.view(values.shape)
        return cls(codes, scale, zero, group=group, bits=bits, dtype=values.dtype)

    @torch.no_grad()
    def dequantise(self, out: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """The values s (q - z) as a plain tensor in the shape of the weight.

        Args:
            out: contiguous, as many elements, any floating dtype; written and returned.
            dtype: of the result without `out`; the weight's own when None.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        return dequantise_affine(self.codes, self.scale, self.zero, self.group, out=out)

    @torch.no_grad()
    def quantise_(
        self, values: Tensor, generator: torch.Generator | None = None
    ) -> QuantisedWeight:
        """Replace the whole weight, scales and zeros too, by `values`.

        Args:
            values: the shape of the weight, any floating dtype; not changed.
            generator: rounds stochastically, on the device of the weight; to nearest when None.

        Returns:
            The weight itself.

        Raises:
            ValueError: the shapes differ.
        """
        if values.shape != self.shape:
            expected, found = tuple(self.shape), tuple(values.shape)
            raise ValueError(f"values must have the weight's shape {expected}, got {found}")
        parts = self.codes, self.scale, self.zero
        quantise_affine(values, self.bits, self.group, generator=generator, out=parts)
        # What a graph has saved of the weight is no longer true: its backward must fail.
        torch.autograd.graph.increment_version(self)
        return self

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _refusal("assigning to an index")

    def share_memory_(self) -> QuantisedWeight:
        """Move the parts to shared memory."""
        for name in PARTS:
            getattr(self, name).share_memory_()
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"QuantisedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, bits={self.bits}, "
            f"group={self.group}, device={self.device}, requires_grad={self.requires_grad})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, int, torch.dtype]]:
        return list(PARTS), (self.group, self.bits, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], context: tuple[int, int, torch.dtype], size: Any, stride: Any
    ) -> QuantisedWeight:
        group, bits, dtype = context
        return QuantisedWeight(**parts, group=group, bits=bits, dtype=dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if isinstance(weight, QuantisedWeight):
                func = quantised_linear
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func == _SET_DATA:
            # What torch replaced is the empty outside of the tensor; the parts are its content.
            args[0].__dict__.update({name: getattr(args[1], name) for name in _ATTRIBUTES})
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(func, *args, **kwargs)
        if _writes_to_weight(func, args, kwargs):
            raise _refusal(func)
        args, kwargs = tree_map_only(QuantisedWeight, QuantisedWeight.dequantise, (args, kwargs))
        return func(*args, **kwargs)

    def _with_parts(
        self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> QuantisedWeight:
        parts = (change(getattr(self, name)) for name in PARTS)
        return QuantisedWeight(*parts, group=self.group, bits=self.bits, dtype=dtype or self.dtype)


def _detach(func: Any, weight: QuantisedWeight) -> QuantisedWeight:
    return weight._with_parts(lambda part: part)


def _clone(func: Any, weight: QuantisedWeight, **_: Any) -> QuantisedWeight:
    return weight._with_parts(torch.clone)


def _to_copy(
    func: Any,
    weight: QuantisedWeight,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    **_: Any,
) -> Tensor:
    if dtype is not None and not dtype.is_floating_point:
        return weight.dequantise().to(device=device, dtype=dtype)
    return weight._with_parts(lambda part: part.to(device, None, non_blocking, copy=True), dtype)


def _copy(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, QuantisedWeight):
        assert isinstance(source, QuantisedWeight)
        return target.copy_(source.dequantise(), non_blocking)
    if isinstance(source, QuantisedWeight):
        if (target.group, target.bits) == (source.group, source.bits):
            for name in PARTS:
                getattr(target, name).copy_(getattr(source, name), non_blocking)
            return target
        source = source.dequantise()
    return target.quantise_(source.to(target.device).expand(target.shape))


def _overwrite(func: Any, weight: QuantisedWeight, *args: Any, **kwargs: Any) -> QuantisedWeight:
    values = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return weight.quantise_(func(values, *args, **kwargs))


def _plain_like(func: Any, weight: QuantisedWeight, *args: Any, **kwargs: Any) -> Tensor:
    """Shape, dtype and device are all that these functions read."""
    stand_in = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
    return func(stand_in, *args, **kwargs)


_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
_NEW = ("new_empty", "new_zeros", "new_ones", "new_full")
_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten.fill_.Scalar: _overwrite,
    aten.fill_.Tensor: _overwrite,
    **{getattr(aten, name).default: _overwrite for name in ("zero_", "normal_", "uniform_")},
    **{getattr(aten, name).default: _plain_like for name in _LIKE + _NEW},
}


def _refusal(func: Any) -> NotImplementedError:
    return NotImplementedError(
        f"{func} would change a QuantisedWeight in place, and rounding to nearest would lose small "
        "changes: compute the new values from weight.dequantise() and write them with "
        "weight.quantise_(values, generator), or use an optimizer of subspan"
    )


def _writes_to_weight(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if tree_any(lambda leaf: isinstance(leaf, QuantisedWeight), value):
                return True
    return False


# torch.load(weights_only=True) admits what the library itself defines.
torch.serialization.add_safe_globals([QuantisedWeight])
