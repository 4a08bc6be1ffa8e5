"""Activations in 8 bits: symmetric in groups of 64 of the last dimension, with a scale in fp16. Lossy, by option.

A group's scale is its largest magnitude / 127. 66 bytes carry 64 values: 4224 a token at width 4096.
"""

import torch
from torch import Tensor

from apt_model.core.errors import InputError

GROUP = 64
WIRES = ("exact", "int8g64")
"""How activations may travel."""
_LARGEST = 127.0


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values [..., width] as int8 [..., width] and scales fp16 [..., ceil(width / 64)]. Zero groups have scale 0.

    Raises:
        InputError: a value is not finite, or so large that fp16 holds no scale for it.
    """
    groups = _grouped(x.float())
    # Rounded to what travels before it divides, so that both sides mean the same numbers.
    scale = (groups.abs().amax(dim=-1) / _LARGEST).to(torch.float16)
    if not bool(torch.isfinite(scale).all()):
        raise InputError(
            "int8g64: expected finite values whose largest magnitude / 127 fits fp16", remedy='wire="exact"'
        )
    divisor = torch.where(scale == 0, 1.0, scale.float())[..., None]
    q = (groups / divisor).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    q = torch.where(scale[..., None] == 0, 0, q)
    return q.flatten(-2)[..., : x.shape[-1]].contiguous(), scale


def unpack(q: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The values [..., width] in `dtype`.

    Raises:
        InputError: shapes or types that do not belong together.
    """
    expected = (*q.shape[:-1], -(-width // GROUP))
    if q.shape[-1:] != (width,) or q.dtype != torch.int8 or scale.shape != expected or scale.dtype != torch.float16:
        raise InputError(
            f"int8g64: expected int8 [..., {width}] with fp16 scales {list(expected)}, got {q.dtype} {list(q.shape)} "
            f"with {scale.dtype} {list(scale.shape)}"
        )
    groups = _grouped(q.float()) * scale.float()[..., None]
    return groups.flatten(-2)[..., :width].to(dtype)


def _grouped(x: Tensor) -> Tensor:
    """[..., width] as [..., groups, 64], with zeros after the last."""
    short = -x.shape[-1] % GROUP
    return torch.nn.functional.pad(x, (0, short)).unflatten(-1, (-1, GROUP))
