"""Products with packed weights, as modules need them: under autocast, of one expert or many, and back to numbers.

# Shape suffix legend
#   E = experts, N = output features, K = input features, T = rows of each expert, S = rows of all experts together
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from apt_model.ops import fp4
from apt_model.ops.fp4 import Operand, PackedWeight, Shuffled
from apt_model.ops.fp4.naive import SLAB_WEIGHTS


def autocasts(x: Tensor) -> bool:
    """Whether products with `x` are under autocast."""
    kind = "cuda" if x.is_cuda else x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which a layer multiplies `x`: its own, or autocast's as for `nn.Linear`."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) and x.dtype != torch.float64 else x.dtype


def fused_linear(
    x: Tensor,
    weight: Operand,
    bias: Tensor | None = None,
    activation: str | None = None,
    activation_dtype: str | None = None,
) -> Tensor:
    """`ops.fp4.linear` as a layer calls it: under autocast `x` is cast as for `nn.Linear`, and sums stay in fp32."""
    if not autocasts(x):
        return fp4.linear(x, weight, bias, activation, activation_dtype)
    x = x.to(product_dtype(x)) if x.is_floating_point() else x
    with torch.autocast(x.device.type, enabled=False):
        return fp4.linear(x, weight, bias, activation, activation_dtype)


def batched(x_ETK: Tensor, weight: Operand, activation_dtype: str | None = None) -> Tensor:
    """Each expert's rows through its own weight of [E, N, K] -> [E, T, N]."""
    pairs = zip(x_ETK, experts(weight), strict=True)
    return torch.stack([fused_linear(x_TK, each, activation_dtype=activation_dtype) for x_TK, each in pairs])


def grouped(x_SK: Tensor, weight: Operand, ends_E: Tensor, activation_dtype: str | None = None) -> Tensor:
    """Rows up to `ends_E[e]` through expert e, one after another -> [S, N]; rows past the last end give zero."""
    parts, start = [], 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            rows_TK = x_SK[start:end]
            parts.append(fused_linear(rows_TK, weight.picked(expert), activation_dtype=activation_dtype))
            start = end
    dtype = parts[0].dtype if parts else x_SK.dtype
    return torch.cat([*parts, x_SK.new_zeros(len(x_SK) - start, weight.shape[-2], dtype=dtype)])


def experts(weight: Operand) -> Iterator[Operand]:
    """The weights [N, K] of a stack [E, N, K]."""
    return (weight.picked(expert) for expert in range(weight.shape[0]))


def dequantize_in_slabs(weight: Operand, dtype: torch.dtype) -> Tensor:
    """[..., N, K] in `dtype`; beside it only a slab of rows is in memory."""
    if torch.compiler.is_compiling():
        return fp4.dequantize(fp4.unshuffle(weight) if isinstance(weight, Shuffled) else weight, dtype)
    if len(weight.shape) > 2:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for values_NK, each in zip(out, experts(weight), strict=True):
            values_NK.copy_(dequantize_in_slabs(each, dtype))
        return out
    if fp4.unpacks(weight, dtype):
        return fp4.unpack(weight, torch.empty(weight.shape, dtype=dtype, device=weight.device))
    weight = fp4.unshuffle(weight) if isinstance(weight, Shuffled) else weight
    if weight.shape.numel() <= SLAB_WEIGHTS:
        return fp4.dequantize(weight, dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    step = max(1, SLAB_WEIGHTS // weight.in_features)
    for i in range(0, len(out), step):
        rows = PackedWeight(weight.packed[i : i + step], weight.scale[i : i + step], *weight[2:])
        out[i : i + step] = fp4.dequantize(rows, dtype)
    return out
