"""Weights and x come to shared memory in bulk; from there weights go to registers, decoded, and so to wgmma.

The weights are the first operand of the warpgroup's product and x the second, so that few rows of x make a narrow
instruction and not an empty one. Needs compute capability 9.
"""

# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from apt_model.ops.fp4.kernel_decode import bias_of_tile, finish_split, fragments, layout, weights_of_words
from apt_model.ops.fp4.kernel_names import barrier, tma_load
from apt_model.ops.fp4.ptx import decoding_turned

# As `SPREAD_BF16` and `SPREAD_SHIFTED`, of one of a word's two products or blocks: turned right by $2 bits first.
SPREAD_BF16_TURNED = gl.constexpr("""
{
.reg .b32 v, k;
mov.b32 k, 0x70007000;
shf.r.wrap.b32 v, $1, $1, $2;
lop3.b32 $0, v, 0x0FF00FF0, k, 0xEA;
}
""")
SPREAD_SHIFTED_TURNED = gl.constexpr("""
{
.reg .b32 v;
shf.r.wrap.b32 v, $1, $1, $2;
and.b32 v, v, 0x0FF00FF0;
shl.b32 $0, v, 3;
}
""")
DECODE_BF16_TURNED = gl.constexpr(decoding_turned(torch.bfloat16))
DECODE_FP16_TURNED = gl.constexpr(decoding_turned(torch.float16))


@gluon.jit
def bring_weights(
    words_desc, scales_desc, tile, chunk, full, words, scales, turn, C: gl.constexpr, BM: gl.constexpr,
    TURNED: gl.constexpr, pred,
):  # fmt: skip
    """Start to bring a step's codes and scales to their places; `full` also waits for x's BM rows."""
    PIECES: gl.constexpr = scales.shape[1] * scales.shape[2]
    WG: gl.constexpr = PIECES // C
    SCALES: gl.constexpr = scales.shape[3]
    at = turn % words.shape[0]
    mbarrier.expect(full.index(at), C * BM * 128 + PIECES * (2048 + SCALES * 4), pred=pred)
    if TURNED:
        tma_load(words_desc, [chunk, tile * WG * 2, 0], full.index(at), words.index(at), pred=pred)
        tma_load(scales_desc, [chunk, tile * WG, 0], full.index(at), scales.index(at), pred=pred)
    else:
        tma_load(words_desc, [tile * WG, chunk * 2, 0], full.index(at), words.index(at), pred=pred)
        tma_load(scales_desc, [tile * WG, chunk, 0], full.index(at), scales.index(at), pred=pred)


@gluon.jit
def bring_x(x_desc, m_first, chunk, full, shared, turn, pred):
    """Start to bring x of a step to its place."""
    at = turn % shared.shape[0]
    tma_load(x_desc, [m_first, chunk * 64], full.index(at), shared.index(at), pred=pred)


@gluon.jit
def weights_of_chunk(
    words, scales, c: gl.constexpr, BLOCK: gl.constexpr, FP16: gl.constexpr, TURNED: gl.constexpr,
    words_layout: gl.constexpr, scales_layout: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """The c-th chunk of a step's, decoded: [WG * 64, 64], the first operand."""
    if TURNED:
        q = words.slice(c, 1, dim=0).load(words_layout)
        s = scales.slice(c, 1, dim=0).load(scales_layout)
        w = turned_fragments(q, s, scales.shape[1], BLOCK, FP16, mma)
    else:
        WG: gl.constexpr = words.shape[0]
        q = words.slice(c * 2, 2, dim=1).load(words_layout).reshape([WG, 512])
        s = scales.slice(c, 1, dim=1).load(scales_layout).reshape([WG, 1024 // BLOCK])
        w = fragments(q, s, WG, BLOCK, FP16, mma)
    return w


@gluon.jit
def turned_fragments(words, scales, P: gl.constexpr, BLOCK: gl.constexpr, FP16: gl.constexpr, mma: gl.constexpr):
    """Words and scale words of P chunks of a tile -> weights [P * 64 inputs, 64 outputs], a product's first operand.

    A warp reads the codes of its own 16 inputs at all outputs, decodes them as `fragments` does, and turns each 8 x 8.
    """
    w = turned_weights(words, scales, P, BLOCK, FP16)
    w = w.permute([0, 4, 5, 8, 2, 1, 7, 3, 6]).reshape([P * 64, 64])  # P j j h g, w r t i
    return gl.convert_layout(w, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)


@gluon.jit
def turned_weights(words, scales, P: gl.constexpr, BLOCK: gl.constexpr, FP16: gl.constexpr):
    """Words and scale words of P chunks -> weights, each 8 x 8 turned: [P, w, g, t, j, j, i, r, h], both bits of j.

    Named as rows and inputs were before they changed places.
    """
    q = words.reshape([P, 4, 8, 4, 2, 2])  # P w g t and both bits of j
    at: gl.constexpr = q.type.layout
    if BLOCK == 16:
        WHICH: gl.constexpr = 5  # the bit of j that tells a word's two blocks apart
        s = scales.reshape([P, 4, 8, 2])
        s = gl.convert_layout(s, gl.SliceLayout(3, gl.SliceLayout(5, at)), assert_trivial=True).expand_dims(3)
    else:
        WHICH: gl.constexpr = 4
        s = scales.reshape([P, 4, 8])
        s = gl.convert_layout(s, gl.SliceLayout(3, gl.SliceLayout(4, gl.SliceLayout(5, at))), assert_trivial=True)
        s = s.expand_dims(3).expand_dims(4)
    s, q = gl.broadcast(s.expand_dims(5), q)
    by, q = gl.broadcast(along(WHICH, at) * 8, q)
    SPREAD: gl.constexpr = SPREAD_BF16_TURNED if BLOCK == 16 and not FP16 else SPREAD_SHIFTED_TURNED
    s = gl.inline_asm_elementwise(SPREAD, "=r,r,r", [s, by], dtype=gl.int32, is_pure=True, pack=1)
    return weights_of_words(q, s, DECODE_BF16_TURNED, DECODE_FP16_TURNED, FP16)


@gluon.jit
def along(DIM: gl.constexpr, at: gl.constexpr):
    """0 and 1 along dimension 4 or 5 of the six of layout `at`."""
    outer: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(9 - DIM, at))
    n = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, outer))))
    n = n.expand_dims(0).expand_dims(1).expand_dims(2).expand_dims(3)
    return n.expand_dims(9 - DIM)


@gluon.jit
def place(column, row, columns, rows, GROUP: gl.constexpr):
    """Which of `columns` by `rows` pieces a program takes: those that run at once are GROUP columns and all their rows.

    So they read little that differs, which stays in the second-level cache. GROUP 0 leaves the order as it is.
    """
    if GROUP > 0:
        at = row * columns + column
        first = at // (GROUP * rows) * GROUP
        wide = gl.minimum(columns - first, GROUP)
        at = at - first * rows
        column = first + at % wide
        row = at // wide
    return column, row


@gluon.constexpr_function
def in_memory(name, wg, block, turned):
    """Who reads what of a chunk's codes [wg, 2, 256], or of its scales [wg, 1, 64 (nvfp4) or 32 (mxfp4)].

    With `turned` of the codes [1, wg * 2, 256] of wg chunks of a tile, or of their scales [1, wg, 64 or 32].
    """
    over, places = [1 << i for i in range(wg.bit_length() - 1)], 32 // block
    if name == "words" and turned:
        return gl.DistributedLinearLayout(
            [[0, 0, 128], [0, 1, 0]],
            [[0, 0, 4 << i] for i in range(5)],
            [[0, 0, 1], [0, 0, 2], *([0, 2 * each, 0] for each in over)],
            [],
            [1, wg * 2, 256],
        )
    if name == "words":
        return gl.DistributedLinearLayout(
            [[0, 0, 1], [0, 0, 2]],
            [[0, 0, 4 << i] for i in range(5)],
            [[0, 0, 128], [0, 1, 0], *([each, 0, 0] for each in over)],
            [],
            [wg, 2, 256],
        )
    lanes = [[0, 0, 0], [0, 0, 0], *([0, 0, places << i] for i in range(3))]
    tiles = [[0, 0, 8 * places], [0, 0, 16 * places]]
    if turned:
        return gl.DistributedLinearLayout(
            tiles, lanes, [[0, 0, 0], [0, 0, places // 2], *([0, each, 0] for each in over)], [], [1, wg, 32 * places]
        )
    return gl.DistributedLinearLayout(
        [[0, 0, 1]] if places == 2 else [], lanes, [*tiles, *([each, 0, 0] for each in over)], [], [wg, 1, 32 * places]
    )


@gluon.jit(do_not_specialize=["M", "chunks", "steps_per_split"])
def tile_kernel(
    x_desc,
    words_desc,
    scales_desc,
    alpha_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    M,
    N,
    chunks,
    steps_per_split,
    SPLIT: gl.constexpr,
    WG: gl.constexpr,
    C: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK: gl.constexpr,
    FP16: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PDL: gl.constexpr,
    TURNED: gl.constexpr,
    GROUP: gl.constexpr,
):
    """BM rows of x by a tile of WG * 64 rows of the weight; slice program_id(2) of the inputs.

    With TURNED the weight's rows and inputs change places, and `chunks` counts tiles of 64 rows.

    No slice is empty (its first step is waited for).

    A step takes C chunks of 64 inputs. While the matrix unit works on one chunk the next one's weights are decoded, and
    those and x of STAGES - 1 more steps are on their way. (Weights loaded to registers would be waited for all at once:
    the assembler has one counter for all loads that a loop carries.)
    """
    TYPE: gl.constexpr = gl.float16 if FP16 else gl.bfloat16
    words_layout: gl.constexpr = in_memory("words", WG, BLOCK, TURNED)
    scales_layout: gl.constexpr = in_memory("scales", WG, BLOCK, TURNED)
    out_layout: gl.constexpr = layout("out", WG, BM, BLOCK, ACTIVATION, 3)
    mma: gl.constexpr = layout("mma", WG, BM, BLOCK, ACTIVATION, 3)
    m_tile, tile = place(gl.program_id(0), gl.program_id(1), gl.num_programs(0), gl.num_programs(1), GROUP)
    split = gl.program_id(2)
    first = split * steps_per_split * C
    last = gl.minimum(first + steps_per_split * C, chunks)
    m_first = m_tile * BM
    shared = gl.allocate_shared_memory(TYPE, [STAGES, BM, C * 64], x_desc.layout)
    DOWN: gl.constexpr = C if TURNED else WG
    ACROSS: gl.constexpr = WG if TURNED else C
    words = gl.allocate_shared_memory(gl.int32, [STAGES, DOWN, ACROSS * 2, 256], words_desc.layout)
    scales = gl.allocate_shared_memory(gl.int32, [STAGES, DOWN, ACROSS, 1024 // BLOCK], scales_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(STAGES - 1):
        chunk = first + i * C
        bring_weights(words_desc, scales_desc, tile, chunk, full, words, scales, i, C, BM, TURNED, chunk < last)
    if PDL:
        # The next launch may start to load its weights; this one has, and now waits for whoever makes x.
        gdc_launch_dependents()
        gdc_wait()
    for i in gl.static_range(STAGES - 1):
        bring_x(x_desc, m_first, first + i * C, full, shared, i, first + i * C < last)
    alpha = gl.load(alpha_ptr)
    bias = bias_of_tile(bias_ptr, tile, N, HAS_BIAS, ACTIVATION, WG * 64, mma)
    acc = gl.zeros([WG * 64, BM], gl.float32, mma)
    mbarrier.wait(full.index(0), 0)
    q, s = words.index(0), scales.index(0)
    a = weights_of_chunk(q, s, 0, BLOCK, FP16, TURNED, words_layout, scales_layout, mma)
    a_before = a
    for step in range(first, last, C):
        turn = (step - first) // C
        x = shared.index(turn % STAGES)
        for c in gl.static_range(C):
            acc = warpgroup_mma(a, x.slice(c * 64, 64, dim=1).permute((1, 0)), acc, is_async=True)
            acc, a_before = warpgroup_mma_wait(1, deps=[acc, a_before])
            if c == 0:
                # Every warpgroup is past the step before this one, so its place is free.
                barrier()
                ahead = turn + STAGES - 1
                chunk = first + ahead * C
                bring_weights(
                    words_desc, scales_desc, tile, chunk, full, words, scales, ahead, C, BM, TURNED, chunk < last
                )
                bring_x(x_desc, m_first, chunk, full, shared, ahead, chunk < last)
            a_before = a
            if c + 1 < C:
                q, s = words.index(turn % STAGES), scales.index(turn % STAGES)
                a = weights_of_chunk(q, s, c + 1, BLOCK, FP16, TURNED, words_layout, scales_layout, mma)
            else:
                mbarrier.wait(full.index((turn + 1) % STAGES), (turn + 1) // STAGES & 1, pred=step + C < last)
                q, s = words.index((turn + 1) % STAGES), scales.index((turn + 1) % STAGES)
                a = weights_of_chunk(q, s, 0, BLOCK, FP16, TURNED, words_layout, scales_layout, mma)
    acc, a_before = warpgroup_mma_wait(0, deps=[acc, a_before])
    finish_split(
        acc, tile, tile * gl.num_programs(0) + m_tile, split, m_first, out_ptr, bias, partial_ptr, counter_ptr,
        alpha, M, N, SPLIT, HAS_BIAS, ACTIVATION, WG * 64, BM, out_layout,
    )  # fmt: skip
