"""Rows of x to E4M3, each with a scale of its own. Plain Triton; the type is there from compute capability 8.9 on."""

# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
import triton
import triton.language as tl


@triton.jit
def row_scale(largest_bits):
    """The scale of a row whose largest magnitude has these bits."""
    largest = largest_bits.to(tl.float32, bitcast=True)
    scale = largest * 0.002232142857142857  # 1 / 448, as `naive.py` has it
    return tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)  # a NaN stays one


@triton.jit
def magnitude_bits(x):
    """Of |x| in fp32, in the order of what they stand for, with NaN above all: a maximum of floats would lose it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit(do_not_specialize=["count"])
def rows_kernel(
    x_ptr, rest_ptr, out_ptr, scale_ptr, rest_out_ptr, width, out_width, row_stride, count,
    BLOCK: tl.constexpr, ONCE: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Row program_id(0): `out_width` values, those past `width` zero, and the scale.

    With `ONCE` a block holds the row, and it is read from memory once. Besides, `count` copies of the number at
    `rest_ptr` are written, SHARE by each program: the scales of the other operand, without a launch of their own.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x_ptr += row * row_stride
    out_ptr += row * out_width
    if ONCE:
        x = tl.load(x_ptr + column, mask=column < width, other=0).to(tl.float32)
        scale = row_scale(tl.max(magnitude_bits(x), axis=0))
        out = x * tl.div_rn(1.0, scale)
        tl.store(out_ptr + column, out.to(out_ptr.dtype.element_ty), mask=column < out_width)
    else:
        most = tl.zeros([BLOCK], tl.int32)
        for first in range(0, width, BLOCK):
            x = tl.load(x_ptr + first + column, mask=first + column < width, other=0).to(tl.float32)
            most = tl.maximum(most, magnitude_bits(x))
        scale = row_scale(tl.max(most, axis=0))
        inverse = tl.div_rn(1.0, scale)
        for first in range(0, out_width, BLOCK):
            x = tl.load(x_ptr + first + column, mask=first + column < width, other=0).to(tl.float32)
            out = (x * inverse).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + first + column, out, mask=first + column < out_width)
    tl.store(scale_ptr + row, scale)
    place = tl.program_id(0) * SHARE + tl.arange(0, SHARE)
    tl.store(rest_out_ptr + place, tl.zeros([SHARE], tl.float32) + tl.load(rest_ptr), mask=place < count)
