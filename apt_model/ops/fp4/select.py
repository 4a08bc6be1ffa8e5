"""What computes an FP4 linear: the one place that chooses, launches, and gives the result its gradient.

In eager mode the operation is called directly; while torch.compile traces, it is the custom operator `apt::fp4_linear`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.core.errors import InputError
from apt_model.ops import HAS_TRITON
from apt_model.ops.fp4 import fp8, launch, naive, slab
from apt_model.ops.fp4.format import Format, PackedWeight
from apt_model.ops.fp4.layout import Shuffled, unshuffle
from apt_model.ops.fp4.slab import Operand
from apt_model.ops.fp4.tables import Decode

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu", "swiglu")


def linear(
    x: Tensor,
    weight: Operand,
    bias: Tensor | None = None,
    activation: str | None = None,
    activation_dtype: str | None = None,
) -> Tensor:
    """act(x W^T + bias) for x [..., K] and a weight [N, K] in 4 bits -> [..., N] in x's type (swiglu: [..., N / 2]).

    The fused kernels take weights in their own order (`shuffle`); a packed weight goes by way of unpacked slabs.
    Gradients flow to `x` and `bias`; the weight is frozen. With a gradient the activation is an operation of its own.
    With `activation_dtype` "fp8" many rows of x, and the weight, are rounded to E4M3 (`fp8.py`): not for a gradient.
    """
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    compiling = torch.compiler.is_compiling()
    if not wants_gradient and not compiling and activation_dtype is None:
        out = launch.again(x, weight, bias, activation)
        if out is not None:
            return out
    if not x.is_floating_point():
        raise InputError(f"fp4 linear: expected a float input, got {x.dtype}")
    if x.shape[-1] != weight.in_features:
        raise InputError(f"fp4 linear: expected x [..., {weight.in_features}], got {list(x.shape)}")
    if activation not in ACTIVATIONS:
        raise InputError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    if x.device != weight.device:
        raise InputError(f"fp4 linear: expected x on {weight.device}, where the weight is, got {x.device}")
    fp8.check(activation_dtype, x.dtype)
    if wants_gradient and activation is not None:
        return naive.activate(linear(x, weight, bias, None, activation_dtype), activation)
    if compiling:
        return _operator(x, *_parts(weight), bias, activation, activation_dtype)
    if wants_gradient:
        return _Linear.apply(x, weight, bias, activation_dtype)  # type: ignore[no-untyped-call]
    return _anew(x, weight, bias, activation, activation_dtype)


def wants_order(form: Format, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel on `device` takes weights of this format in an order of its own, for x in `dtype`."""
    return device.type == "cuda" and HAS_TRITON and launch.serves(form, device, dtype)


def explain(
    rows: int,
    weight: Operand,
    dtype: torch.dtype,
    activation: str | None = None,
    activation_dtype: str | None = None,
) -> str:
    """One line: what computes `rows` rows of x in `dtype` with this weight, where the weight is, and why."""
    shape = f"{rows} x {weight.in_features} by {weight.shape[0]} x {weight.in_features} in {weight.format.name}"
    fp8.check(activation_dtype, dtype, "explain")
    if activation_dtype is not None:
        found = fp8.explain(rows, weight.device, dtype)
        if found is not None:
            return f"{shape}: {found}"
        return f"{explain(rows, weight, dtype, activation)} (activation_dtype 'fp8' begins at {fp8.FP8_ROWS} rows)"
    if not slab.usable(weight.device, dtype):
        why = f"there is no kernel for {dtype} on {weight.device.type}" + ("" if HAS_TRITON else " without Triton")
        return f"{shape}: the definition in torch, since {why}"
    setting, why = launch.choice(rows, weight, dtype)
    if setting is None:
        return f"{shape}: slabs of the weight unpacked to {dtype} for torch's own product, {why}"
    if not _fits(weight, dtype, activation):
        return f"{shape}: slabs unpacked, since this weight is not in the kernels' order for {dtype}"
    kind = (
        "decode (weights to registers)" if isinstance(setting, Decode) else "tile (weights and x through shared memory)"
    )
    return f"{shape}: fused kernel {kind}, {setting} {why}" + (f", with {activation}" if activation else "")


def _fits(weight: Operand, dtype: torch.dtype, activation: str | None) -> bool:
    return isinstance(weight, Shuffled) and weight.dtype == dtype and weight.gated == (activation == "swiglu")


def _forward(
    x: Tensor, weight: Operand, bias: Tensor | None, activation: str | None, activation_dtype: str | None
) -> Tensor:
    out = launch.again(x, weight, bias, activation) if activation_dtype is None else None
    return _anew(x, weight, bias, activation, activation_dtype) if out is None else out


def _anew(
    x: Tensor, weight: Operand, bias: Tensor | None, activation: str | None, activation_dtype: str | None
) -> Tensor:
    in_fp8 = activation_dtype is not None and fp8.serves(x.numel() // weight.in_features, x.device)
    if not slab.takes(x) or x.numel() == 0:
        return definition(x, weight, bias, activation, in_fp8=in_fp8)
    flat = x if x.dim() == 2 else x.reshape(-1, weight.in_features)
    if in_fp8:
        out = fp8.linear(flat, weight, bias, activation)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])
    setting = launch.choose(flat.shape[0], weight, x.dtype) if _fits(weight, x.dtype, activation) else None
    if isinstance(weight, Shuffled):
        way: launch.Way | None
        if setting is None:
            way = slab.whole(x, weight, bias, activation)
        else:
            way = launch.way(x, weight, bias, activation, setting)
        if way is not None:
            launch.remember(x, weight, bias, activation, way)
            return way.run(x, weight, bias)
    if setting is None:
        out = slab.linear(flat, weight, bias, activation)
    else:
        assert isinstance(weight, Shuffled)
        out = launch.run(flat, weight, bias, activation, setting)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])


def definition(
    x: Tensor, weight: Operand, bias: Tensor | None, activation: str | None, *, in_fp8: bool = False
) -> Tensor:
    """The definition, a slab of rows at a time."""
    weight = _packed(weight)
    function: Callable[..., Tensor] = naive.linear
    if in_fp8:
        function = functools.partial(naive.linear_in_e4m3, unit=naive.e4m3_unit(weight))
    if activation == "swiglu" or weight.packed.shape[0] * weight.in_features <= naive.SLAB_WEIGHTS:
        return function(x, weight, bias, activation)
    parts = [
        function(x, rows, None if bias is None else bias[i : i + len(rows.packed)], activation)
        for i, rows in _slabs(weight)
    ]
    return torch.cat(parts, dim=-1)


def _packed(weight: Operand) -> PackedWeight:
    return unshuffle(weight) if isinstance(weight, Shuffled) else weight


def _input_gradient(upstream: Tensor, weight: Operand) -> Tensor:
    """dL/dx = upstream W, [..., K] in the type of `upstream`, a slab of rows at a time."""
    if slab.takes(upstream) and upstream.numel():
        flat = upstream.flatten(0, -2)
        out = launch.gradient(flat, weight)
        out = slab.input_gradient(flat, weight) if out is None else out
        return out.view(*upstream.shape[:-1], weight.in_features)
    weight = _packed(weight)
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


# A weight as tensors and numbers, for what torch saves and traces: five tensors, two of them maybe absent, and facts.
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, list[int]]


def _parts(weight: Operand) -> Parts:
    if isinstance(weight, PackedWeight):
        return *weight[:3], None, None, [weight.in_features]
    facts = [
        weight.out_features,
        weight.in_features,
        weight.block,
        int(weight.gated),
        int(weight.dtype == torch.float16),
        int(weight.exact),
    ]
    return *weight[:5], facts


def _whole(*parts: Any) -> Operand:
    codes, scale, global_scale, alpha, counters, facts = parts
    if len(facts) == 1:
        return PackedWeight(codes, scale, global_scale, facts[0])
    half = torch.float16 if facts[4] else torch.bfloat16
    rows, width, block, gated, _, exact = facts
    return Shuffled(codes, scale, global_scale, alpha, counters, rows, width, block, bool(gated), half, bool(exact))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Operand, bias: Tensor | None, activation_dtype: str | None) -> Tensor:
        *tensors, ctx.facts = _parts(weight)
        ctx.save_for_backward(*tensors, bias)
        return _forward(x, weight, bias, None, activation_dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        *tensors, bias = ctx.saved_tensors
        wants_x, _, wants_bias, _ = ctx.needs_input_grad
        return (
            linear_gradient(upstream, _whole(*tensors, ctx.facts)) if wants_x else None,
            None,
            _bias_gradient(upstream, bias) if wants_bias else None,
            None,
        )


def linear_gradient(upstream: Tensor, weight: Operand) -> Tensor:
    """dL/dx [..., K] of a linear without activation, from upstream [..., N]; has a gradient of its own."""
    if torch.is_grad_enabled() and upstream.requires_grad:
        return F.linear(upstream, naive.dequantize(_packed(weight), upstream.dtype).mT)
    return _input_gradient(upstream, weight)


# Operators for torch.compile. `torch.library.custom_op` would make the same, and look at every call for results that
# share memory with operands, which takes longer than a launch.
_LIBRARY = torch.library.Library("apt", "FRAGMENT")


def _operator_of(name: str, function: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    """`torch.ops.apt.<name>`, which `function` computes on all devices and `fake` for torch.compile."""
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"apt::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.apt, name).default


def _compute(  # noqa: PLR0917 - an operator's operands have places
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    alpha: Tensor | None,
    counters: Tensor | None,
    facts: list[int],
    bias: Tensor | None,
    activation: str | None,
    activation_dtype: str | None,
) -> Tensor:
    weight = _whole(codes, scale, global_scale, alpha, counters, facts)
    return _forward(x, weight, bias, activation, activation_dtype)


def _like_result(x: Tensor, codes: Tensor, *others: Any) -> Tensor:
    facts, activation = others[4], others[-2]
    rows = codes.shape[0] if len(facts) == 1 else facts[0]
    return x.new_empty((*x.shape[:-1], rows // 2 if activation == "swiglu" else rows))


def _compute_gradient(  # noqa: PLR0917 - an operator's operands have places
    upstream: Tensor,
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    alpha: Tensor | None,
    counters: Tensor | None,
    facts: list[int],
) -> Tensor:
    return _input_gradient(upstream, _whole(codes, scale, global_scale, alpha, counters, facts))


def _like_gradient(upstream: Tensor, *weight: Any) -> Tensor:
    facts = weight[-1]
    return upstream.new_empty((*upstream.shape[:-1], facts[min(1, len(facts) - 1)]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - torch names them
    _, *tensors, ctx.facts, bias, _, _ = inputs
    ctx.save_for_backward(*tensors, bias)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, bias = ctx.saved_tensors
    wants_x, wants_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[7]
    grad_x = _gradient_operator(upstream, *tensors, ctx.facts) if wants_x else None
    return grad_x, *(None,) * 6, _bias_gradient(upstream, bias) if wants_bias else None, None, None


_operator = _operator_of("fp4_linear", _compute, _like_result)
_gradient_operator = _operator_of("fp4_linear_gradient", _compute_gradient, _like_gradient)
torch.library.register_autograd("apt::fp4_linear", _backward, setup_context=_save, lib=_LIBRARY)
