"""A weight in the order in which the matrix units want it: made on the device at first use, never stored.

The operand of one product over 16 inputs gives lane 4 g + t of a warp the weights of rows g and g + 8 at inputs
8 h + 2 t + i. Those eight codes are one word, and the words of four products, 64 inputs, are what a lane loads at once.

# Shape suffix legend
#   n = tiles of 64 rows, G = groups of 256 inputs, w = the 4 warps of a tile, c = the 4 chunks of 64 inputs of a group,
#   g, t = row and place of a lane, j = the 4 products of a chunk, h, i = the four inputs of one product, r = row half
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.ops.fp4.format import MXFP4, NVFP4, PackedWeight, row_blocks, unpack

TILE_ROWS = 64
# Counters a tile: one for each group of rows of x that a launch may have.
_COUNTERS = 16
GROUP_INPUTS = 256
# A word holds eight codes, in the order in which three shifts and one mask bring them to bf16's places: for each of the
# four pairs (h, r) the bits of sign, high, middle and low, in either half of the word.
_BITS = (((15, 8, 7, 6), (12, 5, 4, 3)), ((9, 2, 1, 0), (14, 11, 10, 13)))
# Scales are kept times this, so that E4M3's subnormal values become normal: 5 bits of exponent and 3 of mantissa.
_SCALE_FACTOR = 2.0**7
# The largest byte whose exponent, moved by this, still fits bf16's 8 bits.
_E8M0_MOVE = 119


class Shuffled(NamedTuple):
    """A weight [N, K] in the kernels' order."""

    words: Tensor  # int32 [n, G, c, w, g, t, j]: eight codes each
    scales: Tensor  # int32 [n, G, w, g, c, 2 (nvfp4) or 1 (mxfp4)]: rows g and g + 8 of two blocks each
    alpha: Tensor  # float32 [1]: what the sum is multiplied with
    counters: Tensor  # int32: zeros, which every launch leaves as it found them
    out_features: int
    in_features: int
    block: int
    gated: bool  # rows of gate and up in turns of eight, for swiglu


def shuffle(weight: PackedWeight, *, gated: bool = False) -> Shuffled:
    """Bring a packed [N, K] weight into the kernels' order.

    With `gated` the first half of the rows (gate) and the second (up) take turns of eight, so that one lane holds both.
    """
    form, (rows, size) = weight.format, weight.shape
    packed, scale = weight.packed, weight.scale.view(torch.uint8)
    if gated:
        packed, scale = (_interleave(each) for each in (packed, scale))
    rows_n, groups = -(-packed.shape[0] // TILE_ROWS), -(-size // GROUP_INPUTS)
    pad_rows = rows_n * TILE_ROWS - packed.shape[0]
    dead = (scale == 0) if form == NVFP4 else torch.zeros_like(scale, dtype=torch.bool)
    blocks = groups * GROUP_INPUTS // form.block
    scale = F.pad(scale, (0, blocks - scale.shape[1], 0, pad_rows))
    dead = F.pad(dead, (0, blocks - dead.shape[1], 0, pad_rows), value=True)
    scale, alpha = _nvfp4_scales(scale) if form == NVFP4 else _mxfp4_scales(scale, row_blocks(size, form))
    if weight.global_scale is not None:
        alpha = alpha / weight.global_scale
    words = torch.cat(
        [
            _words(F.pad(packed[i : i + 4096], (0, groups * 128 - packed.shape[1])), dead[i : i + 4096], form.block)
            for i in range(0, packed.shape[0], 4096)
        ]
    )
    places = 64 // form.block // 2
    scale = scale.view(rows_n, 4, 2, 8, groups, 4, places, 2).permute(0, 4, 1, 3, 5, 6, 2, 7)  # n G w g c . r b
    scale = scale.flatten(-2).contiguous().view(torch.int32).squeeze(-1)
    counters = torch.zeros(rows_n * _COUNTERS, dtype=torch.int32, device=words.device)
    return Shuffled(words, scale, alpha.to(torch.float32), counters, rows, size, form.block, gated)


def _interleave(rows: Tensor) -> Tensor:
    """[2 I, ...], I gate rows and I up rows -> tiles of 16: eight of gate, eight of up; I is padded to eights."""
    gate, up = (F.pad(half, (0, 0, 0, -half.shape[0] % 8)) for half in rows.chunk(2))
    return torch.stack((gate.unflatten(0, (-1, 8)), up.unflatten(0, (-1, 8))), dim=1).flatten(0, 2)


def _words(packed: Tensor, dead: Tensor, block: int) -> Tensor:
    """Codes [R, G * 128 bytes] -> int32 [n, G, c, w, g, t, j]; codes of blocks without a scale become 0."""
    packed = F.pad(packed, (0, 0, 0, -packed.shape[0] % TILE_ROWS))
    dead = F.pad(dead, (0, 0, 0, packed.shape[0] - dead.shape[0]), value=True) if len(dead) < len(packed) else dead
    codes = unpack(packed, packed.shape[1] * 2).unflatten(1, (-1, block))
    codes = codes.masked_fill(dead[: len(packed), :, None], 0)
    tiles, groups = packed.shape[0] // TILE_ROWS, packed.shape[1] // 128
    codes = codes.view(tiles, 4, 2, 8, groups, 4, 4, 2, 4, 2)  # n w r g G c j h t i
    codes = codes.permute(0, 4, 5, 1, 3, 8, 6, 7, 2, 9).to(torch.int32)  # n G c w g t j h r i
    words = torch.zeros(codes.shape[:7], dtype=torch.int32, device=packed.device)
    for h in range(2):
        for r in range(2):
            for i in range(2):
                code, (sign, high, middle, low) = codes[..., h, r, i], _BITS[h][r]
                places = ((3, sign), (2, high), (1, middle), (0, low))
                for source, target in places:
                    words |= ((code >> source) & 1) << (target + 16 * i)
    return words


def _nvfp4_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 bytes -> bytes of s * 2^7 with 5 bits of exponent; and what takes the factors out again."""
    bits = (scale.view(NVFP4.scale_dtype).to(torch.float32) * _SCALE_FACTOR).to(torch.float16).view(torch.int16)
    return (bits >> 7).to(torch.uint8), torch.full((1,), _SCALE_FACTOR, device=scale.device)


def _mxfp4_scales(scale: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """E8M0 bytes -> exponents in bf16's own place, moved so that the largest fits."""
    largest = scale[:, :blocks].amax().to(torch.int32)
    move = torch.minimum(torch.full_like(largest, _E8M0_MOVE), 254 - largest)
    moved = (scale.to(torch.int32) + move).clamp(1, 254)
    # A code is taken 2^126 too small, the scale 2^move too large.
    alpha = torch.ldexp(torch.ones(1, device=scale.device), (126 - move).view(1))
    return moved.to(torch.uint8), alpha


def form_of(shuffled: Shuffled) -> str:
    """Name of the format."""
    return NVFP4.name if shuffled.block == NVFP4.block else MXFP4.name
