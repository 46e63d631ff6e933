"""Linear layers with int8 weights, for training (Q-GaLore) and back to float for export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .convert import Patterns, replace_linear
from .quantised_weight import PARTS, QuantisedWeight


class QuantisedLinear(nn.Linear):
    """`nn.Linear` whose weight is a `QuantisedWeight`: y = x Wᵀ + b with W = s (q - z).

    A forward or backward holds one dequantised weight at a time. `state_dict` has plain tensors,
    `weight.codes`, `weight.scale` and `weight.zero`, so that safetensors can write it;
    `load_state_dict` takes those or a float `weight`, which it rounds to nearest. Move a layer from
    the meta device by `load_state_dict(..., assign=True)`; `to_empty` would make a float weight.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        bias: whether there is one (a plain float parameter).
        device: of the parameters.
        dtype: of the bias, and what the weight and its gradient appear as; floating.
        group: values that share a scale, in row-major order.
        bits: of a code, 1 to 8; a code takes a byte whatever its bits.

    Raises:
        ValueError: `group` or `bits` out of range.
    """

    weight: QuantisedWeight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: int = 256,
        bits: int = 8,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight = _parameter(QuantisedWeight.from_float(self.weight, group, bits))

    @classmethod
    def from_linear(cls, linear: nn.Linear, group: int = 256, bits: int = 8) -> QuantisedLinear:
        """The layer with the quantised weight and the very bias of `linear`, which stays."""
        biased = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, biased, "meta", group=group, bits=bits)
        quantised = QuantisedWeight.from_float(linear.weight, group, bits)
        layer.weight = _parameter(quantised, linear.weight.requires_grad)
        layer.bias = linear.bias
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """An `nn.Linear` with the dequantised weight and the very bias of this layer."""
        biased = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, biased, "meta")
        linear.weight = nn.Parameter(self.weight.dequantise(), self.weight.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.weight.bits}, group={self.weight.group}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A weight that stays where it is must not be exchanged: hooks would forbid it.
        probe = torch.empty(0, dtype=self.weight.dtype, device=self.weight.device)
        moved = fn(probe)
        if (moved.dtype, moved.device) == (probe.dtype, probe.device):
            return self
        return super()._apply(fn, recurse)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = prefix + "weight"
        del destination[key]
        destination.update({f"{key}.{name}": getattr(self.weight, name) for name in PARTS})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Let `nn.Module` load one tensor, `weight`, made of what there is."""
        key = prefix + "weight"
        here = dict(state_dict)
        parts = {name: here.pop(f"{key}.{name}") for name in PARTS if f"{key}.{name}" in here}
        layout: dict[str, Any] = {"group": self.weight.group, "bits": self.weight.bits}
        try:
            if len(parts) == len(PARTS):
                here[key] = QuantisedWeight(**parts, **layout, dtype=self.weight.dtype)
            elif isinstance(here.get(key), Tensor):
                here[key] = QuantisedWeight.from_float(here[key].to(self.weight.dtype), **layout)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{key}: {error}")
            return
        super()._load_from_state_dict(
            here, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _parameter(weight: QuantisedWeight, requires_grad: bool = True) -> QuantisedWeight:
    """An instance of both `nn.Parameter` and `QuantisedWeight`, which types cannot express."""
    return nn.Parameter(weight, requires_grad)  # type: ignore[return-value]


def quantise_linear(
    model: nn.Module,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    group: int = 256,
    bits: int = 8,
) -> nn.Module:
    """Replace the linear layers of a model's blocks by `QuantisedLinear`, one at a time, in place.

    Call it before the optimizer is made: the weights become other parameters. A layer that
    shares its weight with a module that is not chosen (a tied embedding) is left alone; forward
    hooks of the replaced layers are lost.

    Args:
        model: with `nn.Linear` layers, on any device, the meta device included.
        include: regular expressions; exactly the layers whose name one of them matches (anywhere).
            When None all but the output heads, recognised by name as
            `subspan.optim.selection.is_projected_by_name` does.
        exclude: regular expressions of names to leave alone.
        group: values that share a scale, in row-major order.
        bits: of a code, 1 to 8.

    Returns:
        `model`, or the new layer if the model is itself an `nn.Linear`.

    Raises:
        ValueError: `group` or `bits` out of range, or a pattern that is no regular expression or
            matches no linear layer.
    """

    def build(linear: nn.Linear) -> nn.Linear:
        return QuantisedLinear.from_linear(linear, group, bits)

    return replace_linear(model, nn.Linear, build, include=include, exclude=exclude)


def dequantise_linear(model: nn.Module) -> nn.Module:
    """Turn every `QuantisedLinear` back into an `nn.Linear` with the same values, in place.

    Returns:
        `model`, or the new layer if the model is itself a `QuantisedLinear`.
    """
    return replace_linear(
        model, QuantisedLinear, lambda layer: layer.to_linear(), blocks_only=False
    )
