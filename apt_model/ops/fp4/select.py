"""What computes an FP4 linear: the one place that chooses, launches, and gives the result its gradient.

In eager mode the operation is called directly; while torch.compile traces, it is the custom operator `apt::fp4_linear`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.core.errors import InputError
from apt_model.ops.fp4 import naive
from apt_model.ops.fp4.format import PackedWeight

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu", "swiglu")


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """act(x W^T + bias) for x [..., K] and a packed weight [N, K] -> [..., N] in x's type (swiglu: [..., N / 2]).

    Gradients flow to `x` and `bias`; the weight is frozen. With a gradient the activation is an operation of its own.
    """
    if x.shape[-1] != weight.in_features:
        raise InputError(f"fp4 linear: expected x [..., {weight.in_features}], got {list(x.shape)}")
    if activation not in ACTIVATIONS:
        raise InputError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if wants_gradient and activation is not None:
        return naive.activate(linear(x, weight, bias), activation)
    if torch.compiler.is_compiling():
        return _operator(x, *weight, bias, activation)
    if wants_gradient:
        return _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return _forward(x, weight, bias, activation)


def _forward(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str | None) -> Tensor:
    """The definition, a slab of rows at a time."""
    if activation == "swiglu" or weight.packed.shape[0] * weight.in_features <= naive.SLAB_WEIGHTS:
        return naive.linear(x, weight, bias, activation)
    parts = [
        naive.linear(x, rows, None if bias is None else bias[i : i + len(rows.packed)], activation)
        for i, rows in _slabs(weight)
    ]
    return torch.cat(parts, dim=-1)


def _input_gradient(upstream: Tensor, weight: PackedWeight) -> Tensor:
    """dL/dx = upstream W, [..., K] in the type of `upstream`, a slab of rows at a time."""
    wide = torch.promote_types(upstream.dtype, torch.float32)
    total = upstream.new_zeros(*upstream.shape[:-1], weight.in_features, dtype=wide)
    for i, rows in _slabs(weight):
        total += upstream[..., i : i + len(rows.packed)].to(wide) @ naive.unscaled(rows).to(wide)
    if weight.global_scale is not None:
        total *= (1 / weight.global_scale).to(wide)
    return total.to(upstream.dtype)


def _slabs(weight: PackedWeight) -> list[tuple[int, PackedWeight]]:
    step = max(1, naive.SLAB_WEIGHTS // max(1, weight.in_features))
    return [
        (i, PackedWeight(weight.packed[i : i + step], weight.scale[i : i + step], *weight[2:]))
        for i in range(0, weight.packed.shape[0], step)
    ]


def _bias_gradient(upstream: Tensor, bias: Tensor) -> Tensor:
    rows = upstream.reshape(-1, upstream.shape[-1])
    return rows.sum(dim=0, dtype=torch.promote_types(upstream.dtype, torch.float32)).to(bias.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.in_features, ctx.has_bias = weight.in_features, bias is not None
        ctx.save_for_backward(*weight[:3], bias)
        return _forward(x, weight, bias, None)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        packed, scale, global_scale, bias = ctx.saved_tensors
        weight = PackedWeight(packed, scale, global_scale, ctx.in_features)
        wants_x, _, wants_bias = ctx.needs_input_grad
        return (
            linear_gradient(upstream, weight) if wants_x else None,
            None,
            _bias_gradient(upstream, bias) if wants_bias else None,
        )


def linear_gradient(upstream: Tensor, weight: PackedWeight) -> Tensor:
    """dL/dx [..., K] of a linear without activation, from upstream [..., N]; has a gradient of its own."""
    if torch.is_grad_enabled() and upstream.requires_grad:
        return F.linear(upstream, naive.dequantize(weight, upstream.dtype).mT)
    return _input_gradient(upstream, weight)


@torch.library.custom_op("apt::fp4_linear", mutates_args=())
def _operator(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    in_features: int,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    return _forward(x, PackedWeight(packed, scale, global_scale, in_features), bias, activation)


@_operator.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    in_features: int,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    out = packed.shape[0] // 2 if activation == "swiglu" else packed.shape[0]
    return x.new_empty((*x.shape[:-1], out))


@torch.library.custom_op("apt::fp4_linear_gradient", mutates_args=())
def _gradient_operator(
    upstream: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor | None, in_features: int
) -> Tensor:
    return _input_gradient(upstream, PackedWeight(packed, scale, global_scale, in_features))


@_gradient_operator.register_fake
def _(upstream: Tensor, packed: Tensor, scale: Tensor, global_scale: Tensor | None, in_features: int) -> Tensor:
    return upstream.new_empty((*upstream.shape[:-1], in_features))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, global_scale, in_features, bias, _ = inputs
    ctx.in_features = in_features
    ctx.save_for_backward(packed, scale, global_scale, bias)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    packed, scale, global_scale, bias = ctx.saved_tensors
    wants_x, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
    grad_x = _gradient_operator(upstream, packed, scale, global_scale, ctx.in_features) if wants_x else None
    return grad_x, None, None, None, None, _bias_gradient(upstream, bias) if wants_bias else None, None


_operator.register_autograd(_backward, setup_context=_save)
