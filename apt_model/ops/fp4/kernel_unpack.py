"""Packed weights back to 16 or 32 bits, a slab of rows in one launch. Plain Triton: any GPU that Triton knows."""

# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
import triton
import triton.language as tl


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
        scale = tl.div_rn(scale, tl.load(divisor_ptr))
    values = tl.join(code_value(byte & 15) * scale, code_value(byte >> 4) * scale)
    column = at[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(out_ptr + row * out_stride + column, values.to(out_ptr.dtype.element_ty), mask=column < width)
