"""A lossy wire: int8 in groups of 64 of the last dimension, an fp16 scale each."""

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.core.errors import InputError

GROUP = 64
_LARGEST = 127


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [..., width] as int8 of that shape and scales, fp16 [..., groups]: largest magnitude / 127, or 0."""
    groups = _grouped(x.float())
    scale = (groups.abs().amax(dim=-1) / _LARGEST).half()
    if not bool(scale.isfinite().all()):
        raise InputError("int8g64: expected finite numbers whose scales fit fp16", remedy='wire="exact"')
    divisor = scale.float()[..., None]
    q = torch.where(divisor > 0, groups / divisor, 0.0).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return q.flatten(-2)[..., : x.shape[-1]].contiguous(), scale


def unpack(q: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The numbers [..., width] of `pack`."""
    return (_grouped(q.float()) * scale.float()[..., None]).flatten(-2)[..., :width].to(dtype)


def _grouped(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
