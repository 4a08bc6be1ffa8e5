"""From a weight to codes and scales: nearest codes, and the scale of each block by least squared error.

The search is over neighbours of the scale that maps a block's largest weight to the largest code: a smaller one cuts the
largest weights off, a larger one spends a code less often; either can fit the rest better.
"""

import torch
from torch import Tensor

from apt_model.core.errors import InputError
from apt_model.ops.fp4.format import (
    LARGEST_CODE,
    LARGEST_SCALE,
    MAGNITUDES,
    Format,
    PackedWeight,
    get_format,
    pack,
    scale_values,
)

# Neighbours that are tried: codes of E4M3 in nvfp4 (the first is where ties go), exponents in mxfp4.
NVFP4_OFFSETS = (0, -2, -1, 1, 2, 3, 4, 5, 6)
MXFP4_OFFSETS = (0, -1, 1)
_LARGEST_E4M3_CODE = 126
_LARGEST_E8M0_CODE = 254
# Weights that are worked on at once: a few fp32 copies of a slab are alive.
SLAB_WEIGHTS = 2**24
# Between two neighbouring codes; a tie goes to the even code, as IEEE 754 has it.
_EDGES = tuple((low + high) / 2 for low, high in zip(MAGNITUDES, MAGNITUDES[1:], strict=False))


def quantize(weight: Tensor, format: str = "nvfp4", *, importance: Tensor | None = None) -> PackedWeight:  # noqa: A002
    """[..., N, K] of any float type -> its packed form, on the weight's device, in slabs of rows.

    Args:
        weight: finite values.
        format: nvfp4 or mxfp4.
        importance: [K], what an error in each input's weights counts (a diagonal of x^T x, say); default all alike.
    """
    form = get_format(format)
    if not weight.is_floating_point() or weight.dim() < 2:
        raise InputError(f"quantize: expected a float weight [..., N, K], got {weight.dtype} {list(weight.shape)}")
    if importance is not None and importance.shape != weight.shape[-1:]:
        raise InputError(f"importance: expected [{weight.shape[-1]}], got {list(importance.shape)}")
    weight = weight.detach()
    global_scale = _global_scale(weight) if form.has_global_scale else None
    flat = weight.reshape(-1, weight.shape[-1])
    row_global = None
    if global_scale is not None:
        row_global = global_scale.expand(*weight.shape[:-1]).reshape(-1, 1)
    rows = max(1, SLAB_WEIGHTS // max(1, flat.shape[1]))
    parts = [
        _slab(flat[i : i + rows], form, None if row_global is None else row_global[i : i + rows], importance)
        for i in range(0, flat.shape[0], rows)
    ]
    packed, scale = (torch.cat(each).unflatten(0, weight.shape[:-1]) for each in zip(*parts, strict=True))
    return PackedWeight(packed, scale, global_scale, weight.shape[-1])


def _global_scale(weight: Tensor) -> Tensor:
    """[..., 1]: the power of two that brings the largest block scale just below E4M3's largest.

    A power of two, so that code * scale / global_scale is exact in bf16.
    """
    largest = weight.abs().amax(dim=(-2, -1), keepdim=True).to(torch.float32).squeeze(-1)
    if not bool(largest.isfinite().all()):
        raise InputError("quantize: the weight holds values that are not finite")
    exponent = torch.floor(torch.log2(LARGEST_CODE * LARGEST_SCALE / largest.clamp_min(2.0**-100)))
    return torch.ldexp(torch.ones_like(largest), exponent.to(torch.int32))


def _slab(rows: Tensor, form: Format, row_global: Tensor | None, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of [R, K]."""
    size = rows.shape[1]
    pad = (0, -size % form.block)
    blocks = torch.nn.functional.pad(rows.to(torch.float32), pad).unflatten(1, (-1, form.block))  # [R, G, block]
    magnitude = blocks.abs()
    cost = None
    if importance is not None:
        cost = torch.nn.functional.pad(importance.to(rows.device, torch.float32), pad).view(-1, form.block)
    largest = magnitude.amax(dim=-1)
    best_error, best_scale = torch.full_like(largest, torch.inf), torch.zeros_like(largest, dtype=torch.uint8)
    base = _base_code(largest, form, row_global)
    limit = _LARGEST_E4M3_CODE if form.has_global_scale else _LARGEST_E8M0_CODE
    for offset in NVFP4_OFFSETS if form.has_global_scale else MXFP4_OFFSETS:
        candidate = (base + offset).clamp(1 if form.has_global_scale else 0, limit).to(torch.uint8)
        step = _step(candidate, form, row_global).unsqueeze(-1)
        error = (_nearest(magnitude / step) * step - magnitude).square()
        error = (error if cost is None else error * cost).sum(dim=-1)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, candidate, best_scale)
    best_scale = torch.where(largest > 0, best_scale, 0)
    step = _step(best_scale, form, row_global).unsqueeze(-1)
    ratio = torch.where(step > 0, magnitude / step, 0)
    codes = torch.bucketize(ratio, torch.tensor(_EDGES, device=rows.device), right=False).to(torch.uint8)
    codes = _ties_to_even(ratio, codes)
    codes |= ((blocks < 0) & (codes > 0)).to(torch.uint8) << 3
    scale = best_scale.view(form.scale_dtype)
    return pack(codes.flatten(1)[:, :size]), scale


def _base_code(largest: Tensor, form: Format, row_global: Tensor | None) -> Tensor:
    """Code of the scale that maps the block's largest weight to the largest magnitude, int32."""
    wanted = largest / LARGEST_CODE
    if row_global is not None:
        return (wanted * row_global).clamp(max=LARGEST_SCALE).to(form.scale_dtype).view(torch.uint8).to(torch.int32)
    exponent = torch.ceil(torch.log2(wanted.clamp_min(2.0**-127)))
    return exponent.to(torch.int32) + 127


def _step(code: Tensor, form: Format, row_global: Tensor | None) -> Tensor:
    """The weight that a code of 1.0 stands for, fp32."""
    scales = scale_values(code.view(form.scale_dtype))
    return scales if row_global is None else scales / row_global


def _nearest(ratio: Tensor) -> Tensor:
    """The nearest magnitude; where two are as near, either has the same error."""
    coarse = torch.where(
        ratio < 2, (ratio * 2).round() / 2, torch.where(ratio < 4, ratio.round(), (ratio / 2).round() * 2)
    )
    return coarse.clamp(max=LARGEST_CODE)


def _ties_to_even(ratio: Tensor, codes: Tensor) -> Tensor:
    """`bucketize` leaves a tie with the lower code; move it up where that one is odd."""
    edges = torch.tensor((*_EDGES, torch.inf), device=ratio.device)
    return torch.where((ratio == edges[codes.long()]) & (codes % 2 == 1), codes + 1, codes)
