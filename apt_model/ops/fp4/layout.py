"""A weight in the order in which the matrix units want it: made on the device at first use, never written to a file.

The operand of one product over 16 inputs gives lane 4 g + t of a warp the weights of rows g and g + 8 at inputs
8 h + 2 t + i. Those eight codes are one word, and the words of four products, 64 inputs, are what a lane loads at once.

# Shape suffix legend
#   n = tiles of 64 rows, G = groups of 256 inputs, w = the 4 warps of a tile, c = the 4 chunks of 64 inputs of a group,
#   g, t = row and place of a lane, j = the 4 products of a chunk, h, i = the four inputs of one product, r = row half
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.core.fp4_storage import row_bytes
from apt_model.ops.fp4.counters import prepare
from apt_model.ops.fp4.format import MXFP4, NVFP4, Format, PackedWeight, pack, row_blocks, unpack
from apt_model.ops.fp4.naive import e4m3_unit

TILE_ROWS = 64
# Counters a tile: one for each group of rows of x that a launch may have.
COUNTERS = 16
GROUP_INPUTS = 256
# Rows that are brought into order at once: what is needed beside the weight is some 20 bytes a weight of these.
_SLAB_ROWS = 1024
# How the kernels take a word's four pairs apart (`kernel_decode.py` writes it in PTX): shifted copies of the word, and
# for each pair (h, r) those of one or two copies, by exclusive or, that stand at the places of sign, exponent and
# mantissa. No order of 32 bits lets each be read off a copy of its own by four shifts; sums of two do, and take 8
# operations and not 11. Found by trying all; the words are solved for.
COPIES = {
    torch.bfloat16: ((0,), (2,), (6,), (-6,), (12, -20)),  # to the left; both of the last together turn the word
    torch.float16: ((0,), (2,), (6,), (9,), (-3,)),
}
PAIRS = {torch.bfloat16: ((0,), (0, 2), (0, 4), (1, 3)), torch.float16: ((0, 1), (0, 2), (0, 3), (0, 4))}
# Places of a code's bits, the lowest first.
PLACES = {torch.bfloat16: (6, 7, 8, 15), torch.float16: (9, 10, 11, 15)}
# Scales are kept times this, so that E4M3's subnormal values become normal: 5 bits of exponent and 3 of mantissa.
_SCALE_FACTOR = 2.0**7
# The largest byte whose exponent, moved by this, still fits bf16's 8 bits.
_E8M0_MOVE = 119
_MOVED_BY = 127
_E4M3_NAN = 127


class Shuffled(NamedTuple):
    """A weight [N, K] in the kernels' order; or a stack of E of them, whose tensors have E in front."""

    words: Tensor  # int32 [n, G, c, w, g, t, j]: eight codes each
    scales: Tensor  # int32 [n, G, c, w, g, 2 (nvfp4) or 1 (mxfp4)]: rows g and g + 8 of two blocks each
    global_scale: Tensor | None  # float32 [1], as in `PackedWeight`
    alpha: Tensor  # float32 [3]: what the sum is multiplied with; the same for codes in E4M3; and their unit
    counters: Tensor  # int32 [n COUNTERS]: zeros, for CUDA graphs (`counters.py`)
    out_features: int
    in_features: int
    block: int
    gated: bool  # rows of gate and up in turns of eight, for swiglu
    dtype: torch.dtype  # of x: bfloat16 or float16, which have the codes' bits in other places
    exact: bool  # alpha's first is a power of two that `dtype` has: a weight in it is the product's operand times that

    @property
    def format(self) -> Format:
        """Told by the length of the blocks."""
        return NVFP4 if self.block == NVFP4.block else MXFP4

    @property
    def shape(self) -> torch.Size:
        """[..., N, K]: the shape of the weight that this stands for."""
        return torch.Size((*self.words.shape[:-7], self.out_features, self.in_features))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.words.device

    def picked(self, index: int | Tensor) -> "Shuffled":
        """Weight `index` of a stack, or a stack of several."""
        divisor = None if self.global_scale is None else self.global_scale[index]
        return self._replace(
            words=self.words[index],
            scales=self.scales[index],
            global_scale=divisor,
            alpha=self.alpha[index],
            counters=self.counters[index],
        )


def shuffle(weight: PackedWeight, dtype: torch.dtype, *, gated: bool = False) -> Shuffled:
    """Bring a packed [N, K] weight, or a stack [E, N, K], into the kernels' order for x in `dtype`.

    With `gated` the first half of the rows (gate) and the second (up) take turns of eight, so that one lane holds both.
    """
    if weight.packed.dim() > 2:
        each = [shuffle(weight.picked(i), dtype, gated=gated) for i in range(len(weight.packed))]
        return each[0]._replace(
            words=torch.stack([one.words for one in each]),
            scales=torch.stack([one.scales for one in each]),
            global_scale=weight.global_scale,
            alpha=torch.stack([one.alpha for one in each]),
            counters=torch.stack([one.counters for one in each]),
            exact=all(one.exact for one in each),
        )
    form, (rows, size) = weight.format, weight.shape
    packed, scale = weight.packed, weight.scale.view(torch.uint8)
    if gated:
        packed, scale = (take_turns(part) for part in (packed, scale))
    tiles, groups = -(-packed.shape[0] // TILE_ROWS), -(-size // GROUP_INPUTS)
    dead = (scale == 0) if form == NVFP4 else torch.zeros_like(scale, dtype=torch.bool)
    blocks = groups * GROUP_INPUTS // form.block
    added = (0, blocks - scale.shape[1], 0, tiles * TILE_ROWS - packed.shape[0])
    scale, dead = F.pad(scale, added), F.pad(dead, added, value=True)
    scale, alpha = _nvfp4_scales(scale) if form == NVFP4 else _mxfp4_scales(scale, row_blocks(size, form))
    unit = e4m3_unit(weight)
    alpha = torch.cat((alpha, unit))
    alpha = torch.cat((alpha if weight.global_scale is None else alpha / weight.global_scale, unit))
    scales = _spread(scale.view(tiles, 4, 2, 8, groups, 4, -1, 2))
    words = torch.empty(tiles, groups, 4, 4, 8, 4, 4, dtype=torch.int32, device=packed.device)
    step = _SLAB_ROWS // TILE_ROWS
    for i in range(0, tiles, step):
        at = slice(i * TILE_ROWS, (i + step) * TILE_ROWS)
        missing = (0, groups * GROUP_INPUTS // 2 - packed.shape[1], 0, -len(packed[at]) % TILE_ROWS)
        words[i : i + step] = _words(F.pad(packed[at], missing), dead[at], form.block, dtype)
    prepare(words.device)
    counters = torch.zeros(tiles * COUNTERS, dtype=torch.int32, device=words.device)
    exact = _is_power_of_two(float(alpha[0]), dtype)
    return Shuffled(words, scales, weight.global_scale, alpha, counters, rows, size, form.block, gated, dtype, exact)


def _is_power_of_two(value: float, dtype: torch.dtype) -> bool:
    """Whether `value` is one, and a normal number of `dtype`."""
    smallest, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    return math.frexp(value)[0] == 0.5 and smallest <= value <= largest


def shuffle_if_reversible(weight: PackedWeight, dtype: torch.dtype, *, gated: bool = False) -> Shuffled | None:
    """`shuffle`, unless what comes back would not be the same bytes.

    Files may hold what makes no difference to a value, such as codes of blocks whose scale is 0, and what the order
    cannot hold: scales that are negative or NaN, and E8M0 scales further than 2^253 apart.
    """
    made = shuffle(weight, dtype, gated=gated)
    back, scale = unshuffle(made), weight.scale.view(torch.uint8)
    same = torch.equal(back.packed, weight.packed) and torch.equal(back.scale.view(torch.uint8), scale)
    return made if same and (weight.format == MXFP4 or not bool((scale == _E4M3_NAN).any())) else None


def unshuffle(order: Shuffled) -> PackedWeight:
    """The packed weight that `order` was made from; codes of blocks whose scale is 0 come back as 0."""
    if order.words.dim() > 7:
        each = [unshuffle(order.picked(i)) for i in range(len(order.words))]
        scale = torch.stack([one.scale.view(torch.uint8) for one in each]).view(order.format.scale_dtype)
        return PackedWeight(torch.stack([one.packed for one in each]), scale, order.global_scale, order.in_features)
    form, tiles = order.format, len(order.words)
    columns, blocks = row_bytes(order.in_features), row_blocks(order.in_features, form)
    packed = torch.empty(tiles * TILE_ROWS, columns, dtype=torch.uint8, device=order.device)
    step = _SLAB_ROWS // TILE_ROWS
    for i in range(0, tiles, step):
        at = slice(i * TILE_ROWS, (i + step) * TILE_ROWS)
        packed[at] = pack(_codes(order.words[i : i + step], order.dtype)[:, : columns * 2])
    scale = _gather(order.scales)[:, :blocks]
    if form == NVFP4:
        scale = ((scale.to(torch.int16) << 7).view(torch.float16).to(torch.float32) / _SCALE_FACTOR).to(
            form.scale_dtype
        )
    else:
        exponent = torch.frexp(order.alpha[:1].to(scale.device)).exponent  # only words and scales may have moved
        scale = (scale - (_MOVED_BY - exponent)).to(torch.uint8)
    scale = scale.view(torch.uint8)
    if order.gated:
        packed, scale = (take_turns_back(part, order.out_features) for part in (packed, scale))
    packed, scale = packed[: order.out_features], scale[: order.out_features].contiguous()
    return PackedWeight(packed, scale.view(form.scale_dtype), order.global_scale, order.in_features)


def take_turns(rows: Tensor) -> Tensor:
    """[2 I, ...], I gate rows and I up rows -> sixteens: eight of gate, eight of up; I is padded to eights."""
    gate, up = (F.pad(half, (0, 0, 0, -half.shape[0] % 8)) for half in rows.chunk(2))
    return torch.stack((gate.unflatten(0, (-1, 8)), up.unflatten(0, (-1, 8))), dim=1).flatten(0, 2)


def take_turns_back(rows: Tensor, count: int) -> Tensor:
    """Gate and up rows in turns of eight -> `count` rows, those of the gate first."""
    pairs = rows[: -(-count // 16) * 16].unflatten(0, (-1, 2, 8))
    return torch.cat([pairs[:, which].flatten(0, 1)[: count // 2] for which in range(2)])


def _words(packed: Tensor, dead: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Codes [n * 64, G * 128 bytes] -> int32 [n, G, c, w, g, t, j]; codes of blocks without a scale become 0."""
    codes = unpack(packed, packed.shape[1] * 2).unflatten(1, (-1, block)).masked_fill(dead[:, :, None], 0)
    codes = codes.view(
        packed.shape[0] // TILE_ROWS, 4, 2, 8, packed.shape[1] // 128, 4, 4, 2, 4, 2
    )  # n w r g G c j h t i
    codes = codes.permute(0, 4, 5, 1, 3, 8, 6, 7, 2, 9).to(torch.int32).flatten(7)  # n G c w g t j (h r i)
    words = torch.zeros(codes.shape[:7], dtype=torch.int32, device=packed.device)
    for at in range(8):
        for bit in range(4):
            words ^= ((codes[..., at] >> bit) & 1) * _columns(dtype)[at * 4 + bit]
    return words


def _codes(words: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_words`: int32 [n, G, c, w, g, t, j] -> uint8 codes [n * 64, G * 256]."""
    codes = torch.zeros(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for at in range(8):
        for bit in range(4):
            for source in _sources(dtype, at, bit):
                codes[..., at] ^= (((words >> source) & 1) << bit).to(torch.uint8)
    tiles, groups = words.shape[:2]
    codes = codes.unflatten(-1, (2, 2, 2)).permute(0, 3, 8, 4, 1, 2, 6, 7, 5, 9)  # n w r g G c j h t i
    return codes.reshape(tiles * TILE_ROWS, groups * GROUP_INPUTS)


def _sources(dtype: torch.dtype, at: int, bit: int) -> list[int]:
    """Bits of a word whose sum is bit `bit` of code (h, r, i) = `at`."""
    place = PLACES[dtype][bit] + at % 2 * 16
    shifts = [shift for copy in PAIRS[dtype][at // 2] for shift in COPIES[dtype][copy]]
    return [place - shift for shift in shifts if 0 <= place - shift < 32]


@functools.cache
def _columns(dtype: torch.dtype) -> list[int]:
    """For each bit of each of a word's codes the bits of the word that it turns over, as an int32."""
    rows = []
    for target in range(32):
        form = 0
        for source in _sources(dtype, target // 4, target % 4):
            form ^= 1 << source
        rows.append(form | 1 << (32 + target))
    for column in range(32):
        pivot = next(i for i in range(column, 32) if rows[i] >> column & 1)
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows = [row ^ rows[column] if i != column and row >> column & 1 else row for i, row in enumerate(rows)]
    # Row b of the inverse says which bits of codes turn bit b of the word; transposed, as signed numbers.
    columns = [sum((rows[b] >> (32 + target) & 1) << b for b in range(32)) for target in range(32)]
    return [column - (1 << 32 if column >> 31 else 0) for column in columns]


def _spread(scale: Tensor) -> Tensor:
    """Bytes [n, w, r, g, G, c, place, b] -> int32 [n, G, c, w, g, place].

    A word's first block b = 0 has its bytes, of rows g and g + 8, in bits 4 to 11 and 20 to 27; the second block's are
    around them, where turning the word right by 8 brings them there.
    """
    scale = scale.permute(0, 4, 5, 1, 3, 6, 7, 2).to(torch.int32)  # n G c w g place b r
    first = scale[..., 0, 0] << 4 | scale[..., 0, 1] << 20
    second = scale[..., 1, 0] << 4 | scale[..., 1, 1] << 20
    return (first | second << 8 | second >> 24 & 0xFF).contiguous()


def _gather(scales: Tensor) -> Tensor:
    """The inverse of `_spread`: -> uint8 [n * 64, blocks]."""
    turned = scales >> 8 & 0xFFFFFF | scales << 24
    bytes_ = torch.stack([torch.stack([each >> 4 & 0xFF, each >> 20 & 0xFF], -1) for each in (scales, turned)], -2)
    tiles = scales.shape[0]
    return bytes_.to(torch.uint8).permute(0, 3, 7, 4, 1, 2, 5, 6).reshape(tiles * TILE_ROWS, -1)  # n w r g G c place b


def _nvfp4_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 bytes -> bytes of s * 2^7 with 5 bits of exponent; and what takes the factors out again."""
    bits = (scale.view(NVFP4.scale_dtype).to(torch.float32) * _SCALE_FACTOR).to(torch.float16).view(torch.int16)
    return (bits >> 7).to(torch.uint8), torch.full((1,), _SCALE_FACTOR, dtype=torch.float32, device=scale.device)


def _mxfp4_scales(scale: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """E8M0 bytes -> exponents in bf16's own place, moved so that the largest fits."""
    largest = scale[:, :blocks].amax().to(torch.int32)
    move = torch.minimum(torch.full_like(largest, _E8M0_MOVE), 254 - largest)
    moved = (scale.to(torch.int32) + move).clamp(1, 254)
    # A code is taken 2^126 too small, the scale 2^move too large.
    alpha = torch.ldexp(
        torch.ones(1, dtype=torch.float32, device=scale.device), (126 - move).view(1)
    )  # frexp's exponent is one more
    return moved.to(torch.uint8), alpha
