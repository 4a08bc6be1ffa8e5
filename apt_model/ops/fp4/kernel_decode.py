"""Few rows of x: every warp streams its own weights straight into registers, in the order of `layout.py`.

Written in Gluon, whose layouts are explicit: the bytes that a lane loads are the operand of its m16n8k16 product, so
that no weight passes through shared memory. For NVIDIA GPUs from compute capability 8.0.
"""

# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# What ACTIVATION says.
RELU, GELU, GELU_TANH, SILU, SWIGLU = (gl.constexpr(code) for code in range(1, 6))

# One word, eight codes, to four pairs of bf16: E2M1's bits in bf16's places are the value times 2^-126. Then times the
# scale, whose bits are s * 2^119; the product s * w * 2^-7 is exact. A multiplication alone needs compute capability 9.
DECODE_BF16 = gl.constexpr("""
{
.reg .b32 w, a, b, c, d, z, u, l;
.reg .b16 s, t;
mov.b32 z, 0x80008000;
mov.b32 {s, t}, $9;
mov.b32 u, {s, s};
mov.b32 l, {t, t};
and.b32 a, $8, 0x81C081C0;
shl.b32 w, $8, 3;
and.b32 b, w, 0x81C081C0;
shl.b32 w, $8, 6;
and.b32 c, w, 0x81C081C0;
shr.u32 d, $8, 7;
and.b32 d, d, 0x00400040;
shr.u32 w, $8, 3;
lop3.b32 d, w, 0x01800180, d, 0xEA;
shl.b32 w, $8, 1;
lop3.b32 d, w, 0x80008000, d, 0xEA;
fma.rn.bf16x2 a, a, u, z;
fma.rn.bf16x2 b, b, l, z;
fma.rn.bf16x2 c, c, u, z;
fma.rn.bf16x2 d, d, l, z;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}
""")


@gluon.jit
def expand_scales(packed, BLOCK: gl.constexpr):
    """Words of four bytes [..., places] -> words of two bf16, for rows g and g + 8, one a product: [..., 4]."""
    even, odd = packed & 0x00FF00FF, (packed >> 8) & 0x00FF00FF
    if BLOCK == 16:
        even, odd = even * 16 + 0x70007000, odd * 16 + 0x70007000
        return gl.join(even, odd)  # [..., 2, 2]
    else:
        both = gl.join(even * 128, odd * 128)  # [..., 1, 2]: a block is two products long
        return both.permute([0, 1, 2, 3, 5, 4])


@gluon.jit
def fragments(words, scales, ROWS: gl.constexpr, C: gl.constexpr, BLOCK: gl.constexpr, mma: gl.constexpr):
    """Words [P, C * 512] and scale words [P, C * 64 or C * 32] of C chunks -> weights, the first operand of a product.

    With ROWS = 1 the P parts are slices of the inputs: [P, 64, C * 64]. Otherwise they lie below one another, and C is
    1: [P * 64, 64].
    """
    P: gl.constexpr = words.shape[0]
    PLACES: gl.constexpr = 32 // BLOCK
    q = words.reshape([P, C, 4, 8, 4, 4])  # P c w g t j
    s = scales.reshape([P, 4, 8, C, PLACES]).permute([0, 3, 1, 2, 4])  # P c w g .
    if BLOCK == 16:
        s = expand_scales(s, BLOCK).reshape([P, C, 4, 8, 4])
    else:
        s = expand_scales(s, BLOCK).reshape([P, C, 4, 8, 2, 1])
        s = gl.join(s, s).reshape([P, C, 4, 8, 4])
    s = gl.convert_layout(s, gl.SliceLayout(4, q.type.layout), assert_trivial=True)
    s, q = gl.broadcast(s.expand_dims(4), q)
    # Named by h, r, i.
    w000, w001, w010, w011, w100, w101, w110, w111 = gl.inline_asm_elementwise(
        DECODE_BF16,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
        [q, s],
        dtype=(
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
            gl.bfloat16,
        ),
        is_pure=True,
        pack=1,
    )
    w00, w01, w10, w11 = gl.join(w000, w001), gl.join(w010, w011), gl.join(w100, w101), gl.join(w110, w111)
    w = gl.join(gl.join(w00, w01), gl.join(w10, w11))  # P c w g t j i r h
    if ROWS == 1:
        w = w.permute([0, 2, 7, 3, 1, 5, 8, 4, 6]).reshape([P, 64, C * 64])  # P w r g c j h t i
    else:
        w = w.permute([0, 2, 7, 3, 1, 5, 8, 4, 6]).reshape([P * 64, 64])
    return gl.convert_layout(w, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)


@gluon.jit
def activate(y, ACTIVATION: gl.constexpr):
    """The fused activations in fp32."""
    if ACTIVATION == RELU:
        y = gl.where(y < 0, 0.0, y)
    elif ACTIVATION == SILU:
        y = y / (1 + gl.exp(-y))
    elif ACTIVATION == GELU:
        y = 0.5 * y * (1 + gl.erf(y * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y / (1 + gl.exp(-2 * inner))
    return y


@gluon.jit
def finish(y, tile, out_ptr, bias_ptr, alpha, M, N, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr, BM: gl.constexpr):
    """Sums [64, BM] of one tile -> scaled, with bias and activation, to out [M, N]."""
    y *= alpha
    n = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, y.type.layout))
    m = gl.arange(0, BM, gl.SliceLayout(0, y.type.layout))[None, :]
    if ACTIVATION == SWIGLU:
        # Rows 16 w + g are of the gate, 16 w + 8 + g of the up projection: output row 8 w + g.
        row = n // 16 * 8 + n % 8 + (n % 16) // 8 * N
        half = n // 16 * 8 + n % 8
        if HAS_BIAS:
            y += gl.load(bias_ptr + row, mask=half < N, other=0).to(gl.float32)[:, None]
        pair = y.reshape([4, 2, 8, BM]).permute([0, 2, 3, 1])
        gate, up = gl.split(pair)
        z = (gate / (1 + gl.exp(-gate)) * up).reshape([32, BM])
        rows = tile * 32 + gl.arange(0, 32, gl.SliceLayout(1, z.type.layout))[:, None]
        m = gl.arange(0, BM, gl.SliceLayout(0, z.type.layout))[None, :]
        gl.store(out_ptr + m * N + rows, z.to(out_ptr.dtype.element_ty), mask=(m < M) & (rows < N))
    else:
        if HAS_BIAS:
            y += gl.load(bias_ptr + n, mask=n < N, other=0).to(gl.float32)[:, None]
        y = activate(y, ACTIVATION)
        n = n[:, None]
        gl.store(out_ptr + m * N + n, y.to(out_ptr.dtype.element_ty), mask=(m < M) & (n < N))


@gluon.jit(do_not_specialize=["M", "groups", "groups_per_split"])
def decode_kernel(
    x_ptr,
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
    KW: gl.constexpr,
    BM: gl.constexpr,
    BLOCK: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PDL: gl.constexpr,
    words_layout: gl.constexpr,
    scales_layout: gl.constexpr,
    x_layout: gl.constexpr,
    mma: gl.constexpr,
):
    """Tile program_id(0) of 64 rows, slice program_id(1) of the inputs; M is at most BM.

    KW warps a row of warps take groups in turn. With SPLIT > 1 the slices' sums go to memory, and the last program of a
    tile to arrive adds them in fixed order: one launch, and the same bits every time.
    """
    SCALES: gl.constexpr = 4096 // BLOCK
    tile, split = gl.program_id(0), gl.program_id(1)
    first = split * groups_per_split
    last = gl.minimum(first + groups_per_split, groups)
    base = tile.to(gl.int64) * groups
    kw_words = gl.arange(0, KW, gl.SliceLayout(1, words_layout))[:, None]
    at_words = gl.arange(0, 2048, gl.SliceLayout(0, words_layout))[None, :]
    kw_scales = gl.arange(0, KW, gl.SliceLayout(1, scales_layout))[:, None]
    at_scales = gl.arange(0, SCALES, gl.SliceLayout(0, scales_layout))[None, :]
    words_ptr += base * 2048
    scales_ptr += base * SCALES
    kw_x = gl.arange(0, KW, gl.SliceLayout(1, gl.SliceLayout(2, x_layout)))[:, None, None]
    m = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(2, x_layout)))[None, :, None]
    k = gl.arange(0, 256, gl.SliceLayout(0, gl.SliceLayout(1, x_layout)))[None, None, :]
    acc = gl.zeros([KW, 64, BM], gl.float32, mma)
    # Past the end the last group is read again; x is 0 there.
    words = gl.load(words_ptr + gl.minimum(first + kw_words, last - 1) * 2048 + at_words)
    scales = gl.load(scales_ptr + gl.minimum(first + kw_scales, last - 1) * SCALES + at_scales)
    if PDL:
        # The next launch may start to load its weights; this one has, and now waits for whoever makes x.
        gdc_launch_dependents()
        gdc_wait()
    for group in range(first, last, KW):
        after = group + KW
        next_words = gl.load(words_ptr + gl.minimum(after + kw_words, last - 1) * 2048 + at_words)
        next_scales = gl.load(scales_ptr + gl.minimum(after + kw_scales, last - 1) * SCALES + at_scales)
        at = (group + kw_x) * 256 + k
        x = gl.load(x_ptr + m * stride_x + at, mask=(m < M) & (at < K) & (group + kw_x < last), other=0)
        b = gl.convert_layout(x.permute([0, 2, 1]), gl.DotOperandLayout(1, mma, 2), assert_trivial=True)
        acc = mma_v2(fragments(words, scales, 1, 4, BLOCK, mma), b, acc)
        words, scales = next_words, next_scales
    y = gl.sum(acc, axis=0)
    alpha = gl.load(alpha_ptr)
    if SPLIT == 1:
        finish(y, tile, out_ptr, bias_ptr, alpha, M, N, HAS_BIAS, ACTIVATION, BM)
    else:
        row = gl.arange(0, 64, gl.SliceLayout(1, y.type.layout))[:, None]
        column = gl.arange(0, BM, gl.SliceLayout(0, y.type.layout))[None, :]
        slot_ptr = partial_ptr + tile.to(gl.int64) * (SPLIT * 64 * BM) + column * 64 + row
        gl.store(slot_ptr + split * (64 * BM), y, mask=column < M)
        gl.thread_barrier()
        arrived = gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT - 1:
            gl.store(counter_ptr + tile, 0)
            total = gl.zeros_like(y)
            for other in gl.static_range(SPLIT):
                total += gl.load(slot_ptr + other * (64 * BM), mask=column < M, other=0)
            finish(total, tile, out_ptr, bias_ptr, alpha, M, N, HAS_BIAS, ACTIVATION, BM)


def _doublings(count: int, place: list[int]) -> list[list[int]]:
    return [[step << i for step in place] for i in range(count.bit_length() - 1)]


def layouts(kw: int, bm: int, block: int) -> dict[str, object]:
    """Who holds what, for `kw` warps along the inputs and `bm` rows of x."""
    scales = 4096 // block
    lane = scales // 32  # words of a lane
    return {
        "words_layout": gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 512], [0, 1024]],
            [[0, 4 << i] for i in range(5)],
            [[0, 128], [0, 256], *_doublings(kw, [1, 0])],
            [],
            [kw, 2048],
        ),
        "scales_layout": gl.DistributedLinearLayout(
            [[0, 1 << i] for i in range(lane.bit_length() - 1)],
            [[0, 0], [0, 0], *([0, lane << i] for i in range(3))],
            [[0, scales // 4], [0, scales // 2], *_doublings(kw, [1, 0])],
            [],
            [kw, scales],
        ),
        "x_layout": gl.DistributedLinearLayout(
            [[0, 0, each] for each in (1, 8, 16, 32, 64, 128)] + _doublings(bm // 8, [0, 8, 0]),
            [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
            [[0, 0, 0], [0, 0, 0], *_doublings(kw, [1, 0, 0])],
            [],
            [kw, bm, 256],
        ),
        "mma": gl.NVMMADistributedLayout([2, 0], [kw, 4, 1], [1, 16, 8]),
    }
