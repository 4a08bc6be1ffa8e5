"""Products with packed weights, as modules need them: under autocast, of one expert or many, and back to numbers.

# Shape suffix legend
#   E = experts, N = output features, K = input features, T = rows of each expert, S = rows of all experts together
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from apt_model.core.errors import InputError
from apt_model.ops import fp4
from apt_model.ops.fp4 import PackedWeight
from apt_model.ops.fp4.naive import SLAB_WEIGHTS


def fused_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """`ops.fp4.linear` as a layer calls it: under autocast `x` is cast as for `nn.Linear`, and sums stay in fp32."""
    if not x.is_floating_point():
        raise InputError(f"fp4 linear: expected a float input, got {x.dtype}")
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return fp4.linear(x, weight, bias, activation)
    dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return fp4.linear(x.to(dtype), weight, bias, activation)


def batched(x_ETK: Tensor, weight: PackedWeight) -> Tensor:
    """Each expert's rows through its own weight of [E, N, K] -> [E, T, N]."""
    return torch.stack([fused_linear(x_TK, each) for x_TK, each in zip(x_ETK, experts(weight), strict=True)])


def grouped(x_SK: Tensor, weight: PackedWeight, ends_E: Tensor) -> Tensor:
    """Rows up to `ends_E[e]` through expert e, one after another -> [S, N]; rows past the last end give zero."""
    parts, start = [], 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            parts.append(fused_linear(x_SK[start:end], pick(weight, expert)))
            start = end
    dtype = parts[0].dtype if parts else x_SK.dtype
    return torch.cat([*parts, x_SK.new_zeros(len(x_SK) - start, weight.shape[-2], dtype=dtype)])


def experts(weight: PackedWeight) -> Iterator[PackedWeight]:
    """The weights [N, K] of a stack [E, N, K]."""
    return (pick(weight, expert) for expert in range(len(weight.packed)))


def pick(weight: PackedWeight, index: int | Tensor) -> PackedWeight:
    """Expert `index` of a stack [E, N, K], or a stack of several; nothing is unpacked."""
    scale = weight.scale.view(torch.uint8)[index]  # not every device indexes float8
    divisor = None if weight.global_scale is None else weight.global_scale[index]
    return PackedWeight(weight.packed[index], scale.view(weight.scale.dtype), divisor, weight.in_features)


def dequantize_in_slabs(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """[..., N, K] in `dtype`; beside it only a slab of rows is in memory."""
    if torch.compiler.is_compiling() or weight.shape.numel() <= SLAB_WEIGHTS:
        return fp4.dequantize(weight, dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.packed.device)
    if len(weight.shape) > 2:
        for values_NK, each in zip(out, experts(weight), strict=True):
            values_NK.copy_(dequantize_in_slabs(each, dtype))
        return out
    step = max(1, SLAB_WEIGHTS // weight.in_features)
    for i in range(0, len(out), step):
        rows = PackedWeight(weight.packed[i : i + step], weight.scale[i : i + step], *weight[2:])
        out[i : i + step] = fp4.dequantize(rows, dtype)
    return out
