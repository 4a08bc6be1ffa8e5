"""Packed weights back to 8, 16 or 32 bits, a slab of rows in one launch.

Plain Triton, for any GPU that Triton knows; on NVIDIA's the kernels' order is taken apart in pairs, with PTX.
"""

# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
import torch
import triton
import triton.language as tl

from apt_model.ops.fp4.ptx import unpacking, unpacking_to_e4m3

BF16_PAIRS = tl.constexpr(unpacking(torch.bfloat16))
FP16_PAIRS = tl.constexpr(unpacking(torch.float16))
BF16_TO_E4M3 = tl.constexpr(unpacking_to_e4m3(torch.bfloat16))
FP16_TO_E4M3 = tl.constexpr(unpacking_to_e4m3(torch.float16))


@triton.jit
def code_value(code):
    """E2M1 in fp32; without subnormal numbers on the way, which some units flush."""
    high, low = (code >> 1) & 3, code & 1
    size = tl.where(high == 0, low, (2 + low) << tl.maximum(high - 1, 0)).to(tl.float32) * 0.5
    return tl.where(code >= 8, -size, size)


@triton.jit
def scale_value(byte, BLOCK: tl.constexpr):
    """E4M3 (BLOCK 16) or E8M0 (BLOCK 32) in fp32."""
    if BLOCK == 16:
        high, low = (byte >> 3) & 15, byte & 7
        size = tl.where(high == 0, low, 8 + low).to(tl.float32)
        power = ((tl.maximum(high, 1) + 117) << 23).to(tl.float32, bitcast=True)  # 2^(high - 10)
        value = tl.where(byte >= 128, -size * power, size * power)
        return tl.where((byte & 127) == 127, float("nan"), value)
    value = tl.where(byte == 0, 0x00400000, byte << 23).to(tl.float32, bitcast=True)
    return tl.where(byte == 255, float("nan"), value)


@triton.jit
def divided(scale, divisor_ptr, out_ptr):
    """What a scale stands for; in E4M3 it is divided by a unit that is a power of two, so that one division serves."""
    divisor = tl.load(divisor_ptr)
    if out_ptr.dtype.element_ty.is_fp8():
        return scale * tl.div_rn(1.0, divisor)
    return tl.div_rn(scale, divisor)


@triton.jit
def unpack_kernel(
    packed_ptr, scale_ptr, divisor_ptr, out_ptr, width, packed_stride, scale_stride, out_stride,
    BLOCK: tl.constexpr, HAS_DIVISOR: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Bytes program_id(1) * BYTES ... of row program_id(0) to 2 * BYTES weights."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    byte = tl.load(packed_ptr + row * packed_stride + at, mask=at * 2 < width, other=0).to(tl.int32)
    scale = tl.load(scale_ptr + row * scale_stride + at * 2 // BLOCK, mask=at * 2 < width, other=0).to(tl.int32)
    scale = scale_value(scale, BLOCK)
    if HAS_DIVISOR:
        scale = divided(scale, divisor_ptr, out_ptr)
    values = tl.join(code_value(byte & 15) * scale, code_value(byte >> 4) * scale)
    column = at[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(out_ptr + row * out_stride + column, values.to(out_ptr.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["rows", "chunks", "first_tile", "first_chunk"])
def unpack_order_kernel(
    words_ptr, scales_ptr, alpha_ptr, divisor_ptr, out_ptr, rows, width, out_stride, chunks, first_tile, first_chunk,
    BLOCK: tl.constexpr, FP16: tl.constexpr, HAS_DIVISOR: tl.constexpr,
):  # fmt: skip
    """From the kernels' order (`layout.py`): 64 rows from tile program_id(0), two chunks of inputs from program_id(1).

    `out` begins at `first_tile` and `first_chunk`, and takes `rows` rows of `width` inputs.
    """
    SCALES: tl.constexpr = 1024 // BLOCK
    PER: tl.constexpr = 64 // BLOCK  # blocks of a chunk
    tile, pair = tl.program_id(0), tl.program_id(1) * 2
    at = (first_tile + tile).to(tl.int64) * chunks + first_chunk + pair
    w = tl.load(words_ptr + at * 512 + tl.arange(0, 1024))
    if FP16:
        a, b = (w ^ (w << 2)) & -0x71FF7200, (w ^ (w << 6)) & -0x71FF7200
        c, d = (w ^ (w << 9)) & -0x71FF7200, (w ^ ((w >> 3) & 0x1FFFFFFF)) & -0x71FF7200
    else:
        a, b = w & -0x7E3F7E40, (w ^ (w << 6)) & -0x7E3F7E40
        c, d = (w ^ ((w << 12) | ((w >> 20) & 0xFFF))) & -0x7E3F7E40, ((w << 2) ^ ((w >> 6) & 0x3FFFFFF)) & -0x7E3F7E40
    a, b, c, d = pair_of_values(a, FP16), pair_of_values(b, FP16), pair_of_values(c, FP16), pair_of_values(d, FP16)
    values = tl.join(tl.join(a, b), tl.join(c, d)).reshape([2, 4, 8, 4, 4, 2, 2, 2])  # c w g t j i r h
    s = tl.load(scales_ptr + at * SCALES + tl.arange(0, 2 * SCALES))
    turned = (s << 24) | ((s >> 8) & 0xFFFFFF)
    s = tl.join(tl.join(s >> 4, s >> 20), tl.join(turned >> 4, turned >> 20)) & 255
    if BLOCK == 16:
        bits = (((s >> 3) + 105) << 23) | ((s & 7) << 20)  # s * 2^7 in 5 bits of exponent and 3 of mantissa
        scale = tl.where(s == 0, 0, bits).to(tl.float32, bitcast=True)
    else:
        moved = 253 - (tl.load(alpha_ptr).to(tl.int32, bitcast=True) >> 23)
        scale = scale_value(tl.maximum(s - moved, 0), BLOCK)
    if HAS_DIVISOR:
        scale = divided(scale, divisor_ptr, out_ptr)
    scale = scale.reshape([2, 4, 8, PER // 2, 2, 2]).permute([0, 1, 2, 3, 5, 4])  # c w g place b r
    scale = (
        scale.reshape([2, 4, 8, PER, 1, 2]).broadcast_to([2, 4, 8, PER, 4 // PER, 2]).reshape([2, 4, 8, 1, 4, 1, 2, 1])
    )
    out = (values * scale).to(out_ptr.dtype.element_ty)
    out = out.permute([1, 6, 2, 0, 4, 7, 3, 5]).reshape([64, 128])  # w r g, c j h t i
    row = tile * 64 + tl.arange(0, 64)[:, None]
    column = pair * 64 + tl.arange(0, 128)[None, :]
    tl.store(out_ptr + row.to(tl.int64) * out_stride + column, out, mask=(row < rows) & (column < width))


@triton.jit
def pair_of_values(field, FP16: tl.constexpr):
    """What two codes stand for, [..., 2] in fp32; their bits are at bf16's or fp16's places of either half."""
    if FP16:
        both = tl.join(field, field >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return both * 16384.0
    # bf16 is the upper half of fp32, of which these are subnormal numbers and their neighbours: times 2^126.
    return tl.join(field << 16, field & -65536).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit(do_not_specialize=["rows", "chunks", "first_tile", "first_chunk"])
def unpack_pairs_kernel(
    words_ptr, scales_ptr, alpha_ptr, out_ptr, rows, width, out_stride, chunks, first_tile, first_chunk,
    BLOCK: tl.constexpr, FP16: tl.constexpr, E4M3: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """As `unpack_order_kernel`, CHUNKS of 64 inputs from program_id(1), where `Shuffled.exact`; with NVIDIA's PTX.

    Two weights beside each other stay in one register. `out`, its stride and `width` are in pairs: of int16 for E4M3,
    of int32 for the order's own type.
    """
    SCALES: tl.constexpr = 1024 // BLOCK
    tile, chunk = tl.program_id(0), tl.program_id(1) * CHUNKS
    at = (first_tile + tile).to(tl.int64) * chunks + first_chunk + chunk
    q = tl.load(words_ptr + at * 512 + tl.arange(0, CHUNKS * 512)).reshape([CHUNKS, 4, 8, 4, 4])  # c w g t j
    s = tl.load(scales_ptr + at * SCALES + tl.arange(0, CHUNKS * SCALES))
    turned = (s << 24) | ((s >> 8) & 0xFFFFFF)
    if BLOCK == 16 and not FP16:
        s = tl.join((s & 0x0FF00FF0) | 0x70007000, (turned & 0x0FF00FF0) | 0x70007000)
    else:
        s = tl.join((s & 0x0FF00FF0) << 3, (turned & 0x0FF00FF0) << 3)
    if BLOCK == 32:
        s = tl.join(s, s)  # a block is two products long
    s = s.reshape([CHUNKS, 4, 8, 1, 4]).broadcast_to([CHUNKS, 4, 8, 4, 4])
    factor = tl.load(alpha_ptr)
    if E4M3:
        factor = tl.div_rn(factor, tl.load(alpha_ptr + 1))
    if FP16:
        half = factor.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        half = factor.to(tl.int32, bitcast=True) >> 16
    factor = half | (half << 16)
    if E4M3:
        TO_E4M3: tl.constexpr = FP16_TO_E4M3 if FP16 else BF16_TO_E4M3
        a, b, c, d = tl.inline_asm_elementwise(
            TO_E4M3, "=h,=h,=h,=h,r,r,r", [q, s, factor], dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        PAIRS: tl.constexpr = FP16_PAIRS if FP16 else BF16_PAIRS
        a, b, c, d = tl.inline_asm_elementwise(
            PAIRS, "=r,=r,=r,=r,r,r,r", [q, s, factor], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True,
            pack=1,
        )  # fmt: skip
    out = tl.join(tl.join(a, b), tl.join(c, d))  # c w g t j r h
    out = out.permute([1, 5, 2, 0, 4, 6, 3]).reshape([64, CHUNKS * 32])  # w r g, c j h t
    row = tile * 64 + tl.arange(0, 64)[:, None]
    column = chunk * 32 + tl.arange(0, CHUNKS * 32)[None, :]
    tl.store(out_ptr + row.to(tl.int64) * out_stride + column, out, mask=(row < rows) & (column < width))
