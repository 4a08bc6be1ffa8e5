"""The quantiser in one launch: the arithmetic of `quantize.quantize_rows`, operation by operation, so bit for bit.

Products and sums must not be contracted (`enable_fp_fusion=False`). E4M3 is made and read by integer arithmetic, since
Triton has the type on some GPUs only.
"""

# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
import triton
import triton.language as tl


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _e4m3_code(x):
    """The nearest E4M3 code of 0 <= x <= 448, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Beside 2^14 a place is 2^-9, the smallest E4M3 number.
    subnormal = (x + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(x < 0.015625, subnormal, normal)


@triton.jit
def _e4m3_value(code):
    normal = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)


@triton.jit
def _e8m0_code(largest):
    """The smallest exponent, plus 127, that brings the largest weight to 6 or below; 0 for a subnormal weight."""
    bits = largest.to(tl.int32, bitcast=True)
    code = (bits >> 23) - tl.where((bits & 0x7FFFFF) <= 0x400000, 2, 1)
    return tl.where(code < 0, 0, code)


@triton.jit
def _nearest(ratio):
    """The nearest magnitude: beside 2^22, 2^23, 2^24 a place is 0.5, 1, 2, and the sum is rounded to even."""
    beside = tl.where(ratio < 2, 6291456.0, tl.where(ratio < 4, 12582912.0, 25165824.0))
    value = (ratio + beside) - beside
    return tl.where(value > 6, 6.0, value)


@triton.jit
def _sum(error, ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, GROUPS, BLOCK] -> [ROWS, GROUPS], neighbours first; a sum of two has one order only."""
    error = tl.sum(tl.reshape(error, [ROWS, GROUPS, BLOCK // 2, 2]), axis=3)
    error = tl.sum(tl.reshape(error, [ROWS, GROUPS, BLOCK // 4, 2]), axis=3)
    error = tl.sum(tl.reshape(error, [ROWS, GROUPS, BLOCK // 8, 2]), axis=3)
    if BLOCK == 32:
        error = tl.sum(tl.reshape(error, [ROWS, GROUPS, BLOCK // 16, 2]), axis=3)
    return tl.sum(error, axis=2)


@triton.jit
def quantize_kernel(
    weight_ptr,
    global_ptr,
    cost_ptr,
    packed_ptr,
    scale_ptr,
    rows,
    width,
    row_bytes,
    row_blocks,
    row_stride,
    column_stride,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    NVFP4: tl.constexpr,
    HAS_COST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Tile [ROWS, COLUMNS] number `program_id(0)` of the weight, row by row of tiles, to bytes and scales."""
    BLOCK: tl.constexpr = 16 if NVFP4 else 32
    GROUPS: tl.constexpr = COLUMNS // BLOCK
    across = tl.cdiv(width, COLUMNS)
    tile = tl.program_id(0)
    row = ((tile // across) * ROWS + tl.arange(0, ROWS))[:, None]  # [ROWS, 1]
    start = (tile % across) * COLUMNS
    column = (start + tl.arange(0, COLUMNS))[None, :]  # [1, COLUMNS]
    wide_row, wide_column = row.to(tl.int64), column.to(tl.int64)
    at = wide_row * row_stride + wide_column * column_stride
    weight = tl.load(weight_ptr + at, mask=(row < rows) & (column < width), other=0).to(tl.float32)
    blocks = tl.reshape(weight, [ROWS, GROUPS, BLOCK])
    magnitude = tl.abs(blocks)
    largest = tl.max(magnitude, axis=2)  # [ROWS, GROUPS]
    if NVFP4:
        global_scale = tl.load(global_ptr)
        wanted = tl.div_rn(largest * global_scale, tl.full([ROWS, GROUPS], 6.0, tl.float32))
        base = _e4m3_code(tl.where(wanted > 448, 448.0, wanted))
        magnitude *= global_scale
    else:
        base = _e8m0_code(largest)
        magnitude *= _power_of_two(127 - base)[:, :, None]
    if HAS_COST:
        cost = tl.load(cost_ptr + column, mask=column < width, other=0)
        cost = tl.reshape(cost, [1, GROUPS, BLOCK])

    best = base
    best_error = tl.full([ROWS, GROUPS], float("inf"), tl.float32)
    # The turn before FIRST is the base's, so that it wins a tie; its own turn falls out.
    for turn in tl.static_range(FIRST - 1, LAST + 1):
        if turn != 0:
            candidate = base + (turn if turn >= FIRST else 0)
            if NVFP4:
                candidate = tl.minimum(tl.maximum(candidate, 1), 126)
                step = _e4m3_value(candidate)
            else:
                candidate = tl.maximum(candidate, 0)
                step = _power_of_two(candidate - base)
            spread = tl.broadcast_to(step[:, :, None], [ROWS, GROUPS, BLOCK])
            difference = _nearest(tl.div_rn(magnitude, spread)) * spread - magnitude
            error = difference * difference
            if HAS_COST:
                error *= cost
            error = _sum(error, ROWS, GROUPS, BLOCK)
            better = error < best_error
            best_error = tl.where(better, error, best_error)
            best = tl.where(better, candidate, best)

    step = _e4m3_value(best) if NVFP4 else _power_of_two(best - base)
    value = _nearest(tl.div_rn(magnitude, tl.broadcast_to(step[:, :, None], [ROWS, GROUPS, BLOCK])))
    code = tl.where(value < 2, value * 2, tl.where(value < 4, value + 2, value * 0.5 + 4)).to(tl.int32)
    code = tl.where((blocks < 0) & (code > 0), code + 8, code)
    low, high = tl.split(tl.reshape(code, [ROWS, COLUMNS // 2, 2]))
    byte = (start // 2 + tl.arange(0, COLUMNS // 2))[None, :]
    group = (start // BLOCK + tl.arange(0, GROUPS))[None, :]
    tl.store(
        packed_ptr + wide_row * row_bytes + byte, (low + high * 16).to(tl.uint8), mask=(row < rows) & (byte < row_bytes)
    )
    tl.store(
        scale_ptr + wide_row * row_blocks + group,
        tl.where(largest > 0, best, 0).to(tl.uint8),
        mask=(row < rows) & (group < row_blocks),
    )
