"""From a weight to codes and scales: nearest codes, and the scale of each block by least squared error.

The search is over neighbours of the scale that maps a block's largest weight to the largest code: a smaller one cuts
the largest weights off, a larger one spends a code less often; either can fit the rest better.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.core.errors import InputError
from apt_model.core.fp4_storage import row_bytes
from apt_model.ops.fp4 import fused_quantize
from apt_model.ops.fp4.format import (
    LARGEST_CODE,
    LARGEST_SCALE,
    Format,
    PackedWeight,
    get_format,
    pack,
    row_blocks,
    scale_values,
)

# First and last neighbour that is tried: codes of E4M3 in nvfp4, exponents in mxfp4. A tie goes to 0, the scale that
# clips nothing, then to the first. Twice that scale is never better: its values up to the largest weight are among 0's.
WINDOWS = {"nvfp4": (-2, 6), "mxfp4": (-1, 0)}
# Weights that the definition works on at once: a few fp32 copies of a slab are alive.
SLAB_WEIGHTS = 2**24
_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The positive numbers; of E8M0's, weights below 2^127 need none near the end.
_E4M3_CODES, _E8M0_CODES = (1, 126), (0, 254)
# Beyond this the nearest 4-bit value may be infinite in fp32.
_LIMIT = 2.0**127
# So that 1 / global_scale is a normal number too.
_LARGEST_GLOBAL_EXPONENT = 126


def quantize(
    weight: Tensor,
    format: str = "nvfp4",  # noqa: A002 - the public name
    *,
    importance: Tensor | None = None,
    amax: Tensor | None = None,
) -> PackedWeight:
    """[..., N, K] in fp64, fp32, bf16 or fp16 -> its packed form, on the weight's device, in slabs of rows.

    Args:
        weight: values below 2^127.
        format: nvfp4 or mxfp4.
        importance: [K], what an error in each input's weights counts (a diagonal of x^T x, say); default all alike.
        amax: [...], a magnitude that the global scale is to cover beside the weight's own: what weights that share a
            global scale, or the parts of one, have in common. Of no effect in mxfp4, which has none.
    """
    form = get_format(format)
    if weight.dtype not in _TYPES or weight.dim() < 2 or not weight.numel():
        raise InputError(
            "quantize: expected a weight [..., N, K] in float64, float32, bfloat16 or float16 that is not empty, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    weight, (out, width) = weight.detach(), weight.shape[-2:]
    cost = None if importance is None else _cost(importance, weight, form)
    largest = torch.maximum(weight.amax(dim=(-2, -1)), -weight.amin(dim=(-2, -1))).to(torch.float32)
    if not bool((largest < _LIMIT).all()):
        raise InputError("quantize: the weight holds values that are not finite, or not below 2^127")
    if amax is not None:
        if not bool((amax < _LIMIT).all()):
            raise InputError("quantize: amax is not finite, or not below 2^127")
        largest = torch.maximum(largest, amax.to(largest))
    global_scale = _global_scale(largest.unsqueeze(-1)) if form.has_global_scale else None
    packed, scale = (
        weight.new_empty((*weight.shape[:-1], size), dtype=torch.uint8)
        for size in (row_bytes(width), row_blocks(width, form))
    )
    step = max(1, SLAB_WEIGHTS // width)
    for expert in itertools.product(*map(range, weight.shape[:-2])):
        divisor = None if global_scale is None else global_scale[expert]
        if fused_quantize.applies(weight):
            fused_quantize.quantize_rows(
                weight[expert], form, WINDOWS[form.name], divisor, cost, packed[expert], scale[expert]
            )
            continue
        for slab in (slice(first, first + step) for first in range(0, out, step)):
            packed[expert][slab], scale[expert][slab] = quantize_rows(weight[expert][slab], form, divisor, cost)
    return PackedWeight(packed, scale.view(form.scale_dtype), global_scale, width)


def quantize_rows(
    rows: Tensor, form: Format, global_scale: Tensor | None, cost: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition: [R, K], a global scale [1], costs [G, block] -> bytes [R, P] and bytes of scales [R, G].

    Magnitudes are first brought to where the candidate scales are, by a power of two, so that no square overflows.
    """
    blocks = F.pad(rows.to(torch.float32), (0, -rows.shape[1] % form.block)).unflatten(1, (-1, form.block))
    magnitude = blocks.abs()  # [R, G, block]
    largest = magnitude.amax(dim=-1)
    if global_scale is None:
        base, limits = _e8m0_code(largest), _E8M0_CODES
        magnitude *= _power_of_two(127 - base).unsqueeze(-1)
    else:
        base, limits = _e4m3_code(largest * global_scale), _E4M3_CODES
        magnitude *= global_scale
    first, last = WINDOWS[form.name]
    best_error, best = torch.full_like(largest, torch.inf), base
    for offset in (0, *(each for each in range(first, last + 1) if each)):
        candidate = (base + offset).clamp(*limits)
        step = _step(candidate, base, form)
        error = (_nearest(magnitude / step) * step - magnitude).square()
        error = _sum(error if cost is None else error * cost)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, candidate, best)
    value = _nearest(magnitude / _step(best, base, form))
    code = torch.where(value < 2, value * 2, torch.where(value < 4, value + 2, value * 0.5 + 4)).to(torch.uint8)
    code |= ((blocks < 0) & (code > 0)).to(torch.uint8) << 3
    return pack(code.flatten(1)[:, : rows.shape[1]]), torch.where(largest > 0, best, 0).to(torch.uint8)


def _cost(importance: Tensor, weight: Tensor, form: Format) -> Tensor:
    """[G, block] in fp32, the largest of each block 1 (all of them, where it is 0): no product overflows.

    A block's scale is searched for without regard to the other blocks, so only what is inside it is compared.
    """
    if importance.shape != weight.shape[-1:]:
        raise InputError(f"importance: expected {list(weight.shape[-1:])}, got {list(importance.shape)}")
    importance = importance.detach().to(weight.device, torch.float32)
    if not bool(((importance >= 0) & importance.isfinite()).all()):
        raise InputError("importance: expected finite values of 0 or more")
    cost = F.pad(importance, (0, -len(importance) % form.block)).unflatten(0, (-1, form.block))
    most = cost.amax(dim=-1, keepdim=True)
    return torch.where(most > 0, cost / most, 1)


def _global_scale(largest: Tensor) -> Tensor:
    """The greatest power of two that brings the largest weight to 6 * 448 or below.

    A power of two, so that code * scale / global_scale is exact in bf16.
    """
    mantissa, exponent = torch.frexp(largest)
    top = torch.where(mantissa <= LARGEST_CODE * LARGEST_SCALE / 2**12, 12, 11)
    return _power_of_two((top - exponent).clamp(max=_LARGEST_GLOBAL_EXPONENT))


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in fp32, exact for -126 .. 127."""
    return ((exponent + 127).to(torch.int32) << 23).view(torch.float32)


def _e4m3_code(largest: Tensor) -> Tensor:
    """Code, int32, of the scale nearest to a sixth of the largest weight (already times the global scale)."""
    # A tensor, since CUDA's division by a number multiplies by the rounded inverse.
    wanted = largest / torch.full_like(largest, LARGEST_CODE)
    return wanted.clamp(max=LARGEST_SCALE).to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int32)


def _e8m0_code(largest: Tensor) -> Tensor:
    """Code, int32, of the smallest power of two that brings the largest weight to 6 or below."""
    mantissa, exponent = torch.frexp(largest)
    return (exponent - torch.where(mantissa <= LARGEST_CODE / 8, 3, 2) + 127).clamp(min=0)


def _step(code: Tensor, base: Tensor, form: Format) -> Tensor:
    """What a code of 1.0 stands for beside the magnitudes as they were brought near, [R, G, 1]."""
    if form.has_global_scale:
        return scale_values(code.to(torch.uint8).view(form.scale_dtype)).unsqueeze(-1)
    return _power_of_two(code - base).unsqueeze(-1)


def _nearest(ratio: Tensor) -> Tensor:
    """The nearest magnitude of E2M1; a tie goes to the even code, as IEEE 754 has it."""
    wide = torch.where(ratio < 4, ratio.round(), (ratio * 0.5).round() * 2)
    return torch.where(ratio < 2, (ratio * 2).round() * 0.5, wide).clamp(max=LARGEST_CODE)


def _sum(error: Tensor) -> Tensor:
    """Over the last dimension, neighbours first: the order that the kernel has too."""
    while error.shape[-1] > 1:
        error = error[..., 0::2] + error[..., 1::2]
    return error.squeeze(-1)
