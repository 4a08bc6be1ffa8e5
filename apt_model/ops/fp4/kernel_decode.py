"""Few rows of x: every warp streams its own weights straight into registers, in the order of `layout.py`.

Written in Gluon, whose layouts are explicit: the bytes that a lane loads are the operand of its m16n8k16 product, so
that no weight passes through shared memory. For NVIDIA GPUs from compute capability 8.0.
"""

# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from apt_model.ops.fp4.kernel_names import barrier, reinterpret, tma_load
from apt_model.ops.fp4.ptx import decoding

# What ACTIVATION says.
RELU, GELU, GELU_TANH, SILU, SWIGLU = (gl.constexpr(code) for code in range(1, 6))


DECODE_BF16 = gl.constexpr(decoding(torch.bfloat16))
DECODE_FP16 = gl.constexpr(decoding(torch.float16))

# A word of scales is two words of one product or block each: the byte of row g in bits 4 to 11, that of g + 8 in bits
# 20 to 27. The first has them there; the second's lie around them, and turning the word by a byte brings them there.
# Bits of 0x7000 make nvfp4's s * 2^7 in five bits of exponent bf16's s * 2^119.
SPREAD_BF16 = gl.constexpr("""
{
.reg .b32 v, k;
mov.b32 k, 0x70007000;
shf.r.wrap.b32 v, $2, $2, 8;
lop3.b32 $0, $2, 0x0FF00FF0, k, 0xEA;
lop3.b32 $1, v, 0x0FF00FF0, k, 0xEA;
}
""")
SPREAD_SHIFTED = gl.constexpr("""
{
.reg .b32 u, v;
shf.r.wrap.b32 v, $2, $2, 8;
and.b32 u, $2, 0x0FF00FF0;
and.b32 v, v, 0x0FF00FF0;
shl.b32 $0, u, 3;
shl.b32 $1, v, 3;
}
""")


@gluon.constexpr_function
def _powers(count):
    return [1 << i for i in range(count.bit_length() - 1)]


@gluon.constexpr_function
def layout(name, wg, bm, block, activation, version, rep=1):
    """Who holds what, for `wg` times 64 rows of which four warps hold `rep` times 64, and `bm` rows of x.

    `version` is the product's.
    """
    scales = 1024 // block  # words a chunk
    rows = wg * 64 // (2 if activation == 5 else 1)
    along = min(rows // 8, 32)
    groups = [[each, 0] for each in _powers(wg // rep)]
    own = [[each * (wg // rep), 0] for each in _powers(rep)]
    narrow = bm == 8
    return {
        "words": gl.DistributedLinearLayout(
            [[0, 1], [0, 2], *own], [[0, 4 << i] for i in range(5)], [[0, 128], [0, 256], *groups], [], [wg, 512]
        ),
        "scales": gl.DistributedLinearLayout(
            [[0, each] for each in _powers(scales // 32)] + own,
            [[0, 0], [0, 0], *([0, scales // 32 << i] for i in range(3))],
            [[0, scales // 4], [0, scales // 2], *groups],
            [],
            [wg, scales],
        ),
        "x": gl.DistributedLinearLayout(
            [[0, each] for each in (1, 8, 16, 32)] + [[8 * each, 0] for each in _powers(bm // 8)],
            [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
            [[0, 0]] * (1 + (wg // rep).bit_length()),
            [],
            [bm, 64],
        ),
        "out": gl.BlockedLayout([1, 1], [32, 1], [4, wg // rep], [0, 1])
        if narrow
        else gl.BlockedLayout([8, 1], [along, 32 // along], [1, 4 * wg // rep], [0, 1]),
        "mma": gl.NVMMADistributedLayout([2, 0], [4 * wg // rep, 1], [16, 8])
        if version == 2
        else gl.NVMMADistributedLayout([3, 0], [4 * wg, 1], [16, bm, 16]),
    }[name]


@gluon.jit
def expand_scales(packed, BLOCK: gl.constexpr, FP16: gl.constexpr):
    """Words of four bytes [P, w, g, places] -> words of two bf16, for rows g and g + 8, one a product: [P, w, g, j]."""
    P: gl.constexpr = packed.shape[0]
    SPREAD: gl.constexpr = SPREAD_BF16 if BLOCK == 16 and not FP16 else SPREAD_SHIFTED
    s = gl.join(
        *gl.inline_asm_elementwise(SPREAD, "=r,=r,r", [packed], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
    )
    if BLOCK == 32:
        s = gl.join(s, s)  # a block is two products long
    return s.reshape([P, 4, 8, 4])


@gluon.jit
def weights_of_words(q, s, IN_BF16: gl.constexpr, IN_FP16: gl.constexpr, FP16: gl.constexpr):
    """Words and their pairs of scales, alike in shape -> weights, with dimensions i, r, h of two more, by this PTX."""
    # Named by h, r, i.
    if FP16:
        w000, w001, w010, w011, w100, w101, w110, w111 = gl.inline_asm_elementwise(
            IN_FP16, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [q, s],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        w000, w001, w010, w011, w100, w101, w110, w111 = gl.inline_asm_elementwise(
            IN_BF16, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [q, s],
            dtype=(
                gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16
            ),
            is_pure=True, pack=1,
        )  # fmt: skip
    w00, w01, w10, w11 = gl.join(w000, w001), gl.join(w010, w011), gl.join(w100, w101), gl.join(w110, w111)
    return gl.join(gl.join(w00, w01), gl.join(w10, w11))


@gluon.jit
def fragments(words, scales, P: gl.constexpr, BLOCK: gl.constexpr, FP16: gl.constexpr, mma: gl.constexpr):
    """Words [P, 512] and scale words [P, 64 or 32] of a chunk -> weights [P * 64, 64], a product's first operand."""
    PLACES: gl.constexpr = 32 // BLOCK
    q = words.reshape([P, 4, 8, 4, 4])  # P w g t j
    s = expand_scales(scales.reshape([P, 4, 8, PLACES]), BLOCK, FP16)
    s = gl.convert_layout(s, gl.SliceLayout(3, q.type.layout), assert_trivial=True)
    s, q = gl.broadcast(s.expand_dims(3), q)
    w = weights_of_words(q, s, DECODE_BF16, DECODE_FP16, FP16)  # P w g t j i r h
    w = w.permute([0, 1, 6, 2, 4, 7, 3, 5]).reshape([P * 64, 64])  # P w r g j h t i
    return gl.convert_layout(w, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)


@gluon.jit
def power_of_two(y):
    """2^y in fp32, to some units in the last place; below 2^-126 it is 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def reciprocal(y):
    """1 / y in fp32 for y >= 1, to a unit in the last place; above 2^126 it is 0."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def positive(y):
    """Y where it is positive, else 0; NaN stays."""
    return gl.inline_asm_elementwise(
        "max.NaN.f32 $0, $1, 0f00000000;", "=f,f", [y], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def activate(y, ACTIVATION: gl.constexpr):
    """The fused activations in fp32; a tile's values pass here once, so that every instruction is felt."""
    if ACTIVATION == RELU:
        y = positive(y)
    elif ACTIVATION == SILU:
        y *= reciprocal(1 + power_of_two(y * -1.4426950408889634))
    elif ACTIVATION == GELU:
        # The normal distribution's tail is t p(t) exp(-y^2 / 2) with t = 1 / (1 + c |y|), here to 4e-5 of itself
        # everywhere; p was fitted.
        t = reciprocal(1 + 0.381837661841 * gl.abs(y))
        p = 0.095268340408 + t * (0.184260262617 + t * -0.089399328236)
        p = 0.152021098349 + t * (0.157830185602 + t * p)
        tail = t * p * power_of_two(y * y * -0.7213475204444817)
        y *= gl.where(y < 0, tail, 1 - tail)
    elif ACTIVATION == GELU_TANH:
        # y (1 + tanh u) / 2 = y / (1 + exp(-2 u)), u = sqrt(2 / pi) (y + 0.044715 y^3)
        y *= reciprocal(1 + power_of_two(y * (-2.302208198144325 + y * y * -0.1029432395800235)))
    return y


@gluon.jit
def bias_of_tile(
    bias_ptr, tile, N, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr
):
    """Bias of a tile's rows, [ROWS] in fp32 for sums in `layout`; loaded early, as nothing hides it at the end."""
    n = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    bias = 0
    if HAS_BIAS:
        if ACTIVATION == SWIGLU:
            # Rows 16 i + g are of the gate, 16 i + 8 + g of the up projection: output row 8 i + g.
            half = n // 16 * 8 + n % 8
            bias = gl.load(bias_ptr + half + (n % 16) // 8 * N, mask=half < N, other=0).to(gl.float32)
        else:
            bias = gl.load(bias_ptr + n, mask=n < N, other=0).to(gl.float32)
    return bias


@gluon.jit
def finish(
    y, tile, m_first, out_ptr, bias, alpha, M, N,
    HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr, ROWS: gl.constexpr, BM: gl.constexpr, out_layout: gl.constexpr,
):  # fmt: skip
    """Sums [ROWS, BM] of one tile -> scaled, with bias and activation, to out [M, N]."""
    y *= alpha
    if HAS_BIAS:
        y += bias[:, None]
    if ACTIVATION == SWIGLU:
        gate, up = gl.split(y.reshape([ROWS // 16, 2, 8, BM]).permute([0, 2, 3, 1]))
        z = (activate(gate, SILU) * up).reshape([ROWS // 2, BM])
        z = gl.convert_layout(z.to(out_ptr.dtype.element_ty), out_layout)
        rows = tile * (ROWS // 2) + gl.arange(0, ROWS // 2, gl.SliceLayout(1, out_layout))[:, None]
    else:
        z = gl.convert_layout(activate(y, ACTIVATION).to(out_ptr.dtype.element_ty), out_layout)
        rows = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))[:, None]
    m = m_first + gl.arange(0, BM, gl.SliceLayout(0, out_layout))[None, :]
    gl.store(out_ptr + m.to(gl.int64) * N + rows, z, mask=(m < M) & (rows < N))


# Slices of the inputs up to which one program waits for the others' sums.
WAITS = gl.constexpr(3)


@gluon.jit
def finish_split(
    y, tile, slot, split, m_first, out_ptr, bias, partial_ptr, counter_ptr, alpha, M, N, SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr, ROWS: gl.constexpr, BM: gl.constexpr, out_layout: gl.constexpr,
):  # fmt: skip
    """As `finish`, for one of SPLIT slices of the inputs.

    The slices' sums meet in memory, and one program adds them in fixed order: one launch, and the same bits every time.
    Of two or three slices that is the last one's program, which waits for the others (and they have begun, as programs
    do so in the order of their numbers, of which the slices' are the slowest); of more whoever comes last.
    """
    if SPLIT == 1:
        finish(y, tile, m_first, out_ptr, bias, alpha, M, N, HAS_BIAS, ACTIVATION, ROWS, BM, out_layout)
    else:
        row = gl.arange(0, ROWS, gl.SliceLayout(1, y.type.layout))[:, None]
        column = gl.arange(0, BM, gl.SliceLayout(0, y.type.layout))[None, :]
        mask = m_first + column < M
        slot_ptr = partial_ptr + slot.to(gl.int64) * (SPLIT * ROWS * BM) + column * ROWS + row
        counter_ptr += slot
        adds = split == SPLIT - 1
        if SPLIT > WAITS or split < SPLIT - 1:
            gl.store(slot_ptr + split * (ROWS * BM), y, mask=mask)
            barrier()
        if SPLIT > WAITS:
            adds = gl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        elif adds:
            arrived = gl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
            while arrived < SPLIT - 1:
                arrived = gl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        else:
            gl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
        if adds:
            gl.store(counter_ptr, 0)
            if SPLIT > WAITS:
                y = gl.load(slot_ptr + (SPLIT - 1) * (ROWS * BM), mask=mask, other=0)
            for other in gl.static_range(SPLIT - 1):
                y += gl.load(slot_ptr + other * (ROWS * BM), mask=mask, other=0)
            finish(y, tile, m_first, out_ptr, bias, alpha, M, N, HAS_BIAS, ACTIVATION, ROWS, BM, out_layout)


@gluon.jit
def at_chunk(
    words_ptr, scales_ptr, tile, groups, first,
    WG: gl.constexpr, SCALES: gl.constexpr, words_layout: gl.constexpr, scales_layout: gl.constexpr,
):  # fmt: skip
    """Where each lane finds its codes and scales in chunk `first` of a tile of WG * 64 rows."""
    wg_words = gl.arange(0, WG, gl.SliceLayout(1, words_layout))[:, None]
    at_words = gl.arange(0, 512, gl.SliceLayout(0, words_layout))[None, :]
    wg_scales = gl.arange(0, WG, gl.SliceLayout(1, scales_layout))[:, None]
    at_scales = gl.arange(0, SCALES, gl.SliceLayout(0, scales_layout))[None, :]
    words_ptr += ((tile * WG + wg_words).to(gl.int64) * groups * 4 + first) * 512 + at_words
    scales_ptr += ((tile * WG + wg_scales).to(gl.int64) * groups * 4 + first) * SCALES + at_scales
    return words_ptr, scales_ptr


@gluon.jit
def load_chunk(words_ptr, scales_ptr, i: gl.constexpr, SCALES: gl.constexpr):
    """Codes and scales of the 64 inputs of the i-th chunk from here; read once, so that caches may drop them first."""
    words = gl.load(words_ptr + i * 512, eviction_policy="evict_first")
    return words, gl.load(scales_ptr + i * SCALES, eviction_policy="evict_first")


@gluon.jit
def inputs_of_chunk(
    x, kept, group, first, c: gl.constexpr, M, K, stride_x,
    BM: gl.constexpr, KEPT: gl.constexpr, x_layout: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """X at the c-th chunk from a group's first, as the second operand: [64, BM]."""
    if KEPT > 0:
        b = kept.index((group - first) * 4 + c).permute((1, 0)).load(gl.DotOperandLayout(1, mma, 2))
    else:
        m = gl.arange(0, BM, gl.SliceLayout(1, x_layout))[:, None]
        k = (group * 4 + c) * 64 + gl.arange(0, 64, gl.SliceLayout(0, x_layout))[None, :]
        b = gl.load(x + m * stride_x + k, mask=(m < M) & (k < K), other=0).permute([1, 0])
        b = gl.convert_layout(b, gl.DotOperandLayout(1, mma, 2), assert_trivial=True)
    return b


@gluon.jit(do_not_specialize=["M", "groups", "groups_per_split"])
def decode_kernel(
    x,
    words_ptr,
    scales_ptr,
    alpha_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    M,
    N,
    K,
    stride_x,
    groups,
    groups_per_split,
    SPLIT: gl.constexpr,
    WG: gl.constexpr,
    REP: gl.constexpr,
    BM: gl.constexpr,
    KEPT: gl.constexpr,
    AHEAD: gl.constexpr,
    BLOCK: gl.constexpr,
    FP16: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PDL: gl.constexpr,
):
    """Tile program_id(0) of WG * 64 rows, REP * 64 for four warps; slice program_id(1) of the inputs; M is at most BM.

    With KEPT > 0 the slice has at most so many groups, and `x` is a tensor descriptor of [chunks, M, 64], whose slice
    is brought to shared memory at once. Otherwise `x` is a pointer, and every warp reads what it needs.
    """
    SCALES: gl.constexpr = 1024 // BLOCK
    TYPE: gl.constexpr = gl.float16 if FP16 else gl.bfloat16
    words_layout: gl.constexpr = layout("words", WG, BM, BLOCK, ACTIVATION, 2, REP)
    scales_layout: gl.constexpr = layout("scales", WG, BM, BLOCK, ACTIVATION, 2, REP)
    x_layout: gl.constexpr = layout("x", WG, BM, BLOCK, ACTIVATION, 2, REP)
    out_layout: gl.constexpr = layout("out", WG, BM, BLOCK, ACTIVATION, 2, REP)
    mma: gl.constexpr = layout("mma", WG, BM, BLOCK, ACTIVATION, 2, REP)
    tile, split = gl.program_id(0), gl.program_id(1)
    first = split * groups_per_split
    last = gl.minimum(first + groups_per_split, groups)
    words_ptr, scales_ptr = at_chunk(
        words_ptr, scales_ptr, tile, groups, first * 4, WG, SCALES, words_layout, scales_layout
    )  # fmt: skip
    words = ()
    scales = ()
    for i in gl.static_range(AHEAD):
        q, s = load_chunk(words_ptr, scales_ptr, i, SCALES)
        words = words + (q,)
        scales = scales + (s,)
    if KEPT > 0:
        shared = gl.allocate_shared_memory(TYPE, [KEPT * 4, BM, 64], x.layout)
        full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(full, count=1)
    if PDL:
        # The next launch may start to load its weights; this one has, and now waits for whoever makes x.
        gdc_launch_dependents()
        gdc_wait()
    if KEPT > 0:
        mbarrier.expect(full, KEPT * BM * 512)
        tma_load(x, [first * 4, 0, 0], full, shared)
        kept = reinterpret(shared, TYPE, KEPT * 4, BM, 64, gl.NVMMASharedLayout(128, 16, 2))
        mbarrier.wait(full, 0)
    else:
        kept = 0
    alpha = gl.load(alpha_ptr)
    bias = bias_of_tile(bias_ptr, tile, N, HAS_BIAS, ACTIVATION, WG * 64, mma)
    acc = gl.zeros([WG * 64, BM], gl.float32, mma)
    for group in range(first, last - AHEAD // 4, AHEAD // 4):
        for c in gl.static_range(AHEAD):
            b = inputs_of_chunk(x, kept, group, first, c, M, K, stride_x, BM, KEPT, x_layout, mma)
            acc = mma_v2(fragments(words[0], scales[0], WG, BLOCK, FP16, mma), b, acc)
            q, s = load_chunk(words_ptr, scales_ptr, AHEAD + c, SCALES)
            words = words[1:] + (q,)
            scales = scales[1:] + (s,)
        words_ptr += AHEAD * 512
        scales_ptr += AHEAD * SCALES
    for c in gl.static_range(AHEAD):
        b = inputs_of_chunk(x, kept, last - AHEAD // 4, first, c, M, K, stride_x, BM, KEPT, x_layout, mma)
        acc = mma_v2(fragments(words[c], scales[c], WG, BLOCK, FP16, mma), b, acc)
    finish_split(
        acc, tile, tile, split, 0, out_ptr, bias, partial_ptr, counter_ptr, alpha, M, N, SPLIT,
        HAS_BIAS, ACTIVATION, WG * 64, BM, out_layout,
    )  # fmt: skip
