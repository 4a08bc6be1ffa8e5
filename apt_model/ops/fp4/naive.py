"""The definition of FP4 linears in plain torch; every kernel is compared with this one.

Shapes: x [..., K], weight [N, K] packed, bias [N], result [..., N] (swiglu: [..., N / 2]).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.ops.fp4.format import (
    LARGEST_SCALE,
    MXFP4,
    PackedWeight,
    code_values,
    scale_values,
    spread,
    unpack,
)

# Weights that are unpacked at once.
SLAB_WEIGHTS = 2**24
E4M3 = torch.float8_e4m3fn
# Takes a row's largest value to E4M3's largest; by a product, as some devices divide by a constant in this way anyhow.
TO_E4M3 = 1 / LARGEST_SCALE
# fp32's smallest normal number: no scale of a row is below it.
SMALLEST = 2.0**-126
# A unit of E4M3 weights: with it the largest is 6 * 448 / 8 = 336 in nvfp4, and up to 6 * 2^6 = 384 in mxfp4.
_NVFP4_UNIT, _MXFP4_PLACES = 8.0, 6
_E8M0_NAN = 255


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


def rows_in_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3(x / scale) [..., K] and scale = max |row| / 448 [..., 1] in fp32 of x [..., K], each row on its own.

    No scale is below 2^-126, a row of zeros has that one. An infinity or a NaN makes NaN of its whole row.
    """
    wide = x.to(torch.float32)
    scale = (wide.abs().amax(-1, keepdim=True) * TO_E4M3).clamp_min(SMALLEST)
    return (wide * (1 / scale)).to(E4M3), scale


def e4m3_unit(weight: PackedWeight) -> Tensor:
    """float32 [1]: the power of two that 1 stands for in `weight_in_e4m3`, before the division by the global scale.

    8 in nvfp4. In mxfp4 64 times below the largest scale of the whole weight, so that this one becomes 2^6.
    """
    if weight.format != MXFP4:
        return torch.full((1,), _NVFP4_UNIT, dtype=torch.float32, device=weight.device)
    scale = weight.scale.masked_fill(weight.scale == _E8M0_NAN, 0)
    exponent = (scale.amax().view(1).to(torch.int32) - _MXFP4_PLACES).clamp_min(1)
    return (exponent << 23).view(torch.float32)


def weight_in_e4m3(weight: PackedWeight, unit: Tensor) -> Tensor:
    """w8 = E4M3(code * scale / unit) [N, K].

    Exact in mxfp4 for scales down to 2^14 below the largest; codes of smaller ones are rounded to multiples of 2^-9. In
    nvfp4 rounded to 4 significant bits: code * scale has up to 6, where the code is 1.5, 3 or 6.
    """
    return dequantize(weight._replace(global_scale=unit), E4M3)


def linear_in_e4m3(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    unit: Tensor | None = None,
) -> Tensor:
    """act((x8 w8^T) * scale * unit / global_scale + bias): both operands in E4M3, all else in fp32, in x's type.

    `unit` is `e4m3_unit` of the whole weight where `weight` is some of its rows.
    """
    x8, scale = rows_in_e4m3(x)
    unit = e4m3_unit(weight) if unit is None else unit
    y = x8.to(torch.float32) @ weight_in_e4m3(weight, unit).to(torch.float32).mT * scale
    y = y * (unit if weight.global_scale is None else unit / weight.global_scale)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return activate(y, activation).to(x.dtype)
