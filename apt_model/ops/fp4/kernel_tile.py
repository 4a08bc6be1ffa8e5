"""More rows of x: weights go from memory to registers as in `kernel_decode.py`, x through shared memory to wgmma.

The weights are the first operand of the warpgroup's product and x the second, so that few rows of x make a narrow
instruction and not an empty one. Needs compute capability 9.
"""

# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from apt_model.ops.fp4.kernel_decode import at_chunk, finish_split, fragments, layout
from apt_model.ops.fp4.kernel_names import barrier, tma_load


@gluon.jit
def bring_x(x_desc, m_first, chunk, full, shared, stage, C: gl.constexpr, BM: gl.constexpr, pred):
    """Start to bring C chunks of BM rows of x."""
    mbarrier.expect(full.index(stage), C * BM * 128, pred=pred)
    tma_load(x_desc, [m_first, chunk * 64], full.index(stage), shared.index(stage), pred=pred)


@gluon.jit
def load_chunk_if(words_ptr, scales_ptr, i: gl.constexpr, there, SCALES: gl.constexpr):
    """Codes and scales of the 64 inputs of the i-th chunk from here; nothing is read where it is not `there`."""
    words = gl.load(words_ptr + i * 512, mask=there)
    return words, gl.load(scales_ptr + i * SCALES, mask=there)


@gluon.jit(do_not_specialize=["M", "chunks", "steps_per_split"])
def tile_kernel(
    x_desc,
    words_ptr,
    scales_ptr,
    alpha_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    M,
    N,
    groups,
    chunks,
    steps_per_split,
    SPLIT: gl.constexpr,
    WG: gl.constexpr,
    C: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
    BLOCK: gl.constexpr,
    FP16: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PDL: gl.constexpr,
):
    """Rows program_id(0) of x (BM of them) by tile program_id(1) of WG * 64 rows, slice program_id(2) of the inputs.

    A step takes C chunks of 64 inputs. While the matrix unit works on one chunk, the next one's weights are decoded,
    and those of AHEAD more and x of STAGES - 1 more steps are on their way.
    """
    SCALES: gl.constexpr = 1024 // BLOCK
    TYPE: gl.constexpr = gl.float16 if FP16 else gl.bfloat16
    words_layout: gl.constexpr = layout("words", WG, BM, BLOCK, ACTIVATION, 3)
    scales_layout: gl.constexpr = layout("scales", WG, BM, BLOCK, ACTIVATION, 3)
    out_layout: gl.constexpr = layout("out", WG, BM, BLOCK, ACTIVATION, 3)
    mma: gl.constexpr = layout("mma", WG, BM, BLOCK, ACTIVATION, 3)
    m_tile, tile, split = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    first = split * steps_per_split * C
    last = gl.minimum(first + steps_per_split * C, chunks)
    words_ptr, scales_ptr = at_chunk(
        words_ptr, scales_ptr, tile, groups, first, WG, SCALES, words_layout, scales_layout
    )  # fmt: skip
    words = ()
    scales = ()
    for i in gl.static_range(AHEAD):
        q, s = load_chunk_if(words_ptr, scales_ptr, i, first + i < last, SCALES)
        words = words + (q,)
        scales = scales + (s,)
    m_first = m_tile * BM
    shared = gl.allocate_shared_memory(TYPE, [STAGES, BM, C * 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    if PDL:
        # The next launch may start to load its weights; this one has, and now waits for whoever makes x.
        gdc_launch_dependents()
        gdc_wait()
    for i in gl.static_range(STAGES - 1):
        bring_x(x_desc, m_first, first + i * C, full, shared, i, C, BM, first + i * C < last)
    acc = gl.zeros([WG * 64, BM], gl.float32, mma)
    a = fragments(words[0], scales[0], WG, BLOCK, FP16, mma)
    a_before = a
    for step in range(first, last, C):
        turn = (step - first) // C
        # Pointers that the loop carries make ptxas wait for every product.
        words_at, scales_at = words_ptr + (step - first) * 512, scales_ptr + (step - first) * SCALES
        mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)
        x = shared.index(turn % STAGES)
        for c in gl.static_range(C):
            part = x
            if C > 1:
                part = x.slice(c * 64, 64, dim=1)
            acc = warpgroup_mma(a, part.permute((1, 0)), acc, is_async=True)
            if C > 1:
                acc, a_before = warpgroup_mma_wait(1, deps=[acc, a_before])
            if c == 0:
                # Every warpgroup is past the step before this one, so its place is free.
                barrier()
                ahead = turn + STAGES - 1
                bring_x(
                    x_desc, m_first, first + ahead * C, full, shared, ahead % STAGES, C, BM, first + ahead * C < last
                )
            a_before = a
            q, s = load_chunk_if(words_at, scales_at, AHEAD + c, step + c + AHEAD < last, SCALES)
            words = words[1:] + (q,)
            scales = scales[1:] + (s,)
            a = fragments(words[0], scales[0], WG, BLOCK, FP16, mma)
            if C == 1:
                # Around the loop the operand changes registers, which the matrix unit must be done with.
                acc, a_before = warpgroup_mma_wait(0, deps=[acc, a_before])
    acc, a_before = warpgroup_mma_wait(0, deps=[acc, a_before])
    finish_split(
        acc, tile, tile * gl.num_programs(0) + m_tile, split, m_first, out_ptr, bias_ptr, partial_ptr, counter_ptr,
        gl.load(alpha_ptr), M, N, SPLIT, HAS_BIAS, ACTIVATION, WG * 64, BM, out_layout,
    )  # fmt: skip
