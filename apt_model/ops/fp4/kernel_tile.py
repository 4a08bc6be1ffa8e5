"""Weights and x come to shared memory in bulk; from there weights go to registers, decoded, and so to wgmma.

The weights are the first operand of the warpgroup's product and x the second, so that few rows of x make a narrow
instruction and not an empty one. Needs compute capability 9.
"""

# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from apt_model.ops.fp4.kernel_decode import bias_of_tile, finish_split, fragments, layout
from apt_model.ops.fp4.kernel_names import barrier, tma_load


@gluon.jit
def bring_weights(
    words_desc, scales_desc, tile, chunk, full, words, scales, turn, C: gl.constexpr, BM: gl.constexpr, pred
):
    """Start to bring C chunks of a tile's codes and scales to their places; `full` also waits for x's BM rows."""
    WG: gl.constexpr = words.shape[1]
    SCALES: gl.constexpr = scales.shape[3]
    at = turn % words.shape[0]
    mbarrier.expect(full.index(at), C * (BM * 128 + WG * (2048 + SCALES * 4)), pred=pred)
    tma_load(words_desc, [tile * WG, chunk * 2, 0], full.index(at), words.index(at), pred=pred)
    tma_load(scales_desc, [tile * WG, chunk, 0], full.index(at), scales.index(at), pred=pred)


@gluon.jit
def bring_x(x_desc, m_first, chunk, full, shared, turn, pred):
    """Start to bring x of a step to its place."""
    at = turn % shared.shape[0]
    tma_load(x_desc, [m_first, chunk * 64], full.index(at), shared.index(at), pred=pred)


@gluon.jit
def weights_of_chunk(
    words, scales, turn, c: gl.constexpr, BLOCK: gl.constexpr, FP16: gl.constexpr,
    words_layout: gl.constexpr, scales_layout: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """The c-th chunk of a step, decoded: [WG * 64, 64], the first operand."""
    WG: gl.constexpr = words.shape[1]
    at = turn % words.shape[0]
    q = words.index(at).slice(c * 2, 2, dim=1).load(words_layout).reshape([WG, 512])
    s = scales.index(at).slice(c, 1, dim=1).load(scales_layout).reshape([WG, 1024 // BLOCK])
    return fragments(q, s, WG, BLOCK, FP16, mma)


@gluon.constexpr_function
def in_memory(name, wg, block):
    """Who reads what of a chunk's codes [wg, 2, 256], or of its scales [wg, 1, 64 (nvfp4) or 32 (mxfp4)]."""
    over = [[1 << i, 0, 0] for i in range(wg.bit_length() - 1)]
    if name == "words":
        return gl.DistributedLinearLayout(
            [[0, 0, 1], [0, 0, 2]],
            [[0, 0, 4 << i] for i in range(5)],
            [[0, 0, 128], [0, 1, 0], *over],
            [],
            [wg, 2, 256],
        )
    places = 32 // block
    return gl.DistributedLinearLayout(
        [[0, 0, 1]] if places == 2 else [],
        [[0, 0, 0], [0, 0, 0], *([0, 0, places << i] for i in range(3))],
        [[0, 0, 8 * places], [0, 0, 16 * places], *over],
        [],
        [wg, 1, 32 * places],
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
):
    """Rows program_id(0) of x (BM of them) by tile program_id(1) of WG * 64 rows; slice program_id(2) of the inputs.

    No slice is empty (its first step is waited for).

    A step takes C chunks of 64 inputs. While the matrix unit works on one chunk the next one's weights are decoded, and
    those and x of STAGES - 1 more steps are on their way. (Weights loaded to registers would be waited for all at once:
    the assembler has one counter for all loads that a loop carries.)
    """
    TYPE: gl.constexpr = gl.float16 if FP16 else gl.bfloat16
    words_layout: gl.constexpr = in_memory("words", WG, BLOCK)
    scales_layout: gl.constexpr = in_memory("scales", WG, BLOCK)
    out_layout: gl.constexpr = layout("out", WG, BM, BLOCK, ACTIVATION, 3)
    mma: gl.constexpr = layout("mma", WG, BM, BLOCK, ACTIVATION, 3)
    m_tile, tile, split = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    first = split * steps_per_split * C
    last = gl.minimum(first + steps_per_split * C, chunks)
    m_first = m_tile * BM
    shared = gl.allocate_shared_memory(TYPE, [STAGES, BM, C * 64], x_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [STAGES, WG, C * 2, 256], words_desc.layout)
    scales = gl.allocate_shared_memory(gl.int32, [STAGES, WG, C, 1024 // BLOCK], scales_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(STAGES - 1):
        chunk = first + i * C
        bring_weights(words_desc, scales_desc, tile, chunk, full, words, scales, i, C, BM, chunk < last)
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
    a = weights_of_chunk(words, scales, 0, 0, BLOCK, FP16, words_layout, scales_layout, mma)
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
                bring_weights(words_desc, scales_desc, tile, chunk, full, words, scales, ahead, C, BM, chunk < last)
                bring_x(x_desc, m_first, chunk, full, shared, ahead, chunk < last)
            a_before = a
            if c + 1 < C:
                a = weights_of_chunk(words, scales, turn, c + 1, BLOCK, FP16, words_layout, scales_layout, mma)
            else:
                mbarrier.wait(full.index((turn + 1) % STAGES), (turn + 1) // STAGES & 1, pred=step + C < last)
                a = weights_of_chunk(words, scales, turn + 1, 0, BLOCK, FP16, words_layout, scales_layout, mma)
    acc, a_before = warpgroup_mma_wait(0, deps=[acc, a_before])
    finish_split(
        acc, tile, tile * gl.num_programs(0) + m_tile, split, m_first, out_ptr, bias, partial_ptr, counter_ptr,
        alpha, M, N, SPLIT, HAS_BIAS, ACTIVATION, WG * 64, BM, out_layout,
    )  # fmt: skip
