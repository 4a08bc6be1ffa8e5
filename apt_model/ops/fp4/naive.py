"""The definition of FP4 linears in plain torch; every kernel is compared with this one.

Shapes: x [..., K], weight [N, K] packed, bias [N], result [..., N] (swiglu: [..., N / 2]).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.ops.fp4.format import PackedWeight, code_values, scale_values, spread, unpack

# Weights that are unpacked at once.
SLAB_WEIGHTS = 2**24


def unscaled(weight: PackedWeight) -> Tensor:
    """[..., N, K] in fp32, code * scale: exact in nvfp4, and in bf16 too (at most 6 significant bits)."""
    values = code_values(unpack(weight.packed, weight.in_features))
    return values * spread(scale_values(weight.scale), weight.format, weight.in_features)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """[..., N, K] rounded once to `dtype`: code * (scale / global_scale), in the order of compressed-tensors."""
    scales = scale_values(weight.scale)
    if weight.global_scale is not None:
        scales = scales / weight.global_scale.unsqueeze(-1)
    values = code_values(unpack(weight.packed, weight.in_features))
    return (values * spread(scales, weight.format, weight.in_features)).to(dtype)


def activate(y: Tensor, activation: str | None) -> Tensor:
    """One of the fused activations; swiglu takes gate and up side by side, [..., 2 I] -> silu(gate) * up [..., I]."""
    match activation:
        case None:
            return y
        case "relu":
            return F.relu(y)
        case "gelu":
            return F.gelu(y)
        case "gelu_tanh":
            return F.gelu(y, approximate="tanh")
        case "silu":
            return F.silu(y)
        case _:
            gate, up = y.chunk(2, dim=-1)
            return F.silu(gate) * up


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """act(x W^T / global_scale + bias): sums, bias and activation in fp32 (fp64 for fp64), rounded once to x's type."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ unscaled(weight).to(wide).transpose(-1, -2)
    if weight.global_scale is not None:
        y = y * (1 / weight.global_scale).to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return activate(y, activation).to(x.dtype)
