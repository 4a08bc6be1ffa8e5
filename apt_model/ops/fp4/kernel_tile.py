"""More rows of x: weights go from memory to registers as in `kernel_decode.py`, x through shared memory to wgmma.

The weights are the first operand of the warpgroup's product and x the second, so that few rows of x make a narrow
instruction and not an empty one. Needs compute capability 9.
"""

# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
from apt_model.ops.fp4.kernel_decode import SWIGLU, activate, fragments
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit
def finish_tile(
    y, tile, m_first, out_ptr, bias_ptr, alpha, M, N,
    HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr, ROWS: gl.constexpr, BM: gl.constexpr, out_layout: gl.constexpr,
):  # fmt: skip
    y *= alpha
    n = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, y.type.layout))
    if ACTIVATION == SWIGLU:
        half = n // 16 * 8 + n % 8
        if HAS_BIAS:
            y += gl.load(bias_ptr + half + (n % 16) // 8 * N, mask=half < N, other=0).to(gl.float32)[:, None]
        gate, up = gl.split(y.reshape([ROWS // 16, 2, 8, BM]).permute([0, 2, 3, 1]))
        z = (gate / (1 + gl.exp(-gate)) * up).reshape([ROWS // 2, BM])
        z = gl.convert_layout(z.to(out_ptr.dtype.element_ty), out_layout)
        rows = tile * (ROWS // 2) + gl.arange(0, ROWS // 2, gl.SliceLayout(1, out_layout))[:, None]
    else:
        if HAS_BIAS:
            y += gl.load(bias_ptr + n, mask=n < N, other=0).to(gl.float32)[:, None]
        z = gl.convert_layout(activate(y, ACTIVATION).to(out_ptr.dtype.element_ty), out_layout)
        rows = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))[:, None]
    m = m_first + gl.arange(0, BM, gl.SliceLayout(0, out_layout))[None, :]
    gl.store(out_ptr + m.to(gl.int64) * N + rows, z, mask=(m < M) & (rows < N))


@gluon.jit
def load_chunk(words_ptr, scales_ptr, chunk, SCALES: gl.constexpr):
    """Codes and scales of the 64 inputs of one chunk."""
    words = gl.load(words_ptr + chunk * 512)
    return words, gl.load(scales_ptr + (chunk // 4) * SCALES + (chunk % 4) * (SCALES // 128))


@gluon.jit
def bring_x(x_desc, m_first, chunk, full, shared, stage, C: gl.constexpr, BM: gl.constexpr, pred):
    """Start to bring C chunks of BM rows of x."""
    mbarrier.expect(full.index(stage), C * BM * 128, pred=pred)
    tma.async_copy_global_to_shared(x_desc, [m_first, chunk * 64], full.index(stage), shared.index(stage), pred=pred)


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
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PDL: gl.constexpr,
    words_layout: gl.constexpr,
    scales_layout: gl.constexpr,
    out_layout: gl.constexpr,
    mma: gl.constexpr,
):
    """Rows program_id(0) of x (BM of them) by tile program_id(1) of WG * 64 rows, slice program_id(2) of the inputs.

    A step takes C chunks of 64 inputs. While the matrix unit works on one chunk, the next one's weights are decoded, and
    those of AHEAD more and x of STAGES - 1 more steps are on their way.
    """
    SCALES: gl.constexpr = 4096 // BLOCK
    m_tile, tile, split = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    first = split * steps_per_split * C
    last = gl.minimum(first + steps_per_split * C, chunks)
    wg_words = gl.arange(0, WG, gl.SliceLayout(1, words_layout))[:, None]
    at_words = gl.arange(0, 512, gl.SliceLayout(0, words_layout))[None, :]
    wg_scales = gl.arange(0, WG, gl.SliceLayout(1, scales_layout))[:, None]
    at_scales = gl.arange(0, SCALES // 4, gl.SliceLayout(0, scales_layout))[None, :]
    # A lane's words of the four chunks of a group lie side by side.
    LANE: gl.constexpr = SCALES // 128
    at_scales = at_scales // LANE * (4 * LANE) + at_scales % LANE
    words_ptr += (tile * WG + wg_words).to(gl.int64) * groups * 2048 + at_words
    scales_ptr += (tile * WG + wg_scales).to(gl.int64) * groups * SCALES + at_scales
    words = ()
    scales = ()
    for i in gl.static_range(AHEAD):
        q, s = load_chunk(words_ptr, scales_ptr, gl.minimum(first + i, last - 1), SCALES)
        words = words + (q,)
        scales = scales + (s,)
    m_first = m_tile * BM
    shared = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, C * 64], x_desc.layout)
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
    a = fragments(words[0], scales[0], WG * 64, 1, BLOCK, mma)
    a_before = a
    for step in range(first, last, C):
        turn = (step - first) // C
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
                gl.thread_barrier()
                ahead = turn + STAGES - 1
                bring_x(
                    x_desc, m_first, first + ahead * C, full, shared, ahead % STAGES, C, BM, first + ahead * C < last
                )
            a_before = a
            q, s = load_chunk(words_ptr, scales_ptr, gl.minimum(step + c + AHEAD, last - 1), SCALES)
            words = words[1:] + (q,)
            scales = scales[1:] + (s,)
            a = fragments(words[0], scales[0], WG * 64, 1, BLOCK, mma)
            if C == 1:
                # Around the loop the operand changes registers, which the matrix unit must be done with.
                acc, a_before = warpgroup_mma_wait(0, deps=[acc, a_before])
    acc, a_before = warpgroup_mma_wait(0, deps=[acc, a_before])
    alpha = gl.load(alpha_ptr)
    if SPLIT == 1:
        finish_tile(acc, tile, m_first, out_ptr, bias_ptr, alpha, M, N, HAS_BIAS, ACTIVATION, WG * 64, BM, out_layout)
    else:
        here = tile * gl.num_programs(0) + m_tile
        row = gl.arange(0, WG * 64, gl.SliceLayout(1, mma))[:, None]
        column = gl.arange(0, BM, gl.SliceLayout(0, mma))[None, :]
        AREA: gl.constexpr = WG * 64 * BM
        slot_ptr = partial_ptr + here.to(gl.int64) * (SPLIT * AREA) + column * (WG * 64) + row
        gl.store(slot_ptr + split * AREA, acc, mask=m_first + column < M)
        gl.thread_barrier()
        arrived = gl.atomic_add(counter_ptr + here, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT - 1:
            gl.store(counter_ptr + here, 0)
            total = gl.zeros_like(acc)
            for other in gl.static_range(SPLIT):
                total += gl.load(slot_ptr + other * AREA, mask=m_first + column < M, other=0)
            finish_tile(
                total, tile, m_first, out_ptr, bias_ptr, alpha, M, N, HAS_BIAS, ACTIVATION, WG * 64, BM, out_layout
            )


@gluon.constexpr_function
def _powers(count):
    return [1 << i for i in range(count.bit_length() - 1)]


@gluon.constexpr_function
def tile_layouts(wg: int, bm: int, block: int, *, gated: bool) -> dict[str, object]:
    """Who holds what, for `wg` warpgroups of 64 rows and `bm` rows of x."""
    quarter = 4096 // block // 4
    groups = [[each, 0] for each in _powers(wg)]
    rows = wg * 64 // (2 if gated else 1)
    along = min(rows // 8, 32)
    return {
        "words_layout": gl.DistributedLinearLayout(
            [[0, 1], [0, 2]], [[0, 4 << i] for i in range(5)], [[0, 128], [0, 256], *groups], [], [wg, 512]
        ),
        "scales_layout": gl.DistributedLinearLayout(
            [[0, each] for each in _powers(32 // block)],
            [[0, 0], [0, 0], *([0, quarter // 32 << i] for i in range(3))],
            [[0, quarter // 4], [0, quarter // 2], *groups],
            [],
            [wg, quarter],
        ),
        "out_layout": gl.BlockedLayout([8, 1], [along, 32 // along], [1, 4 * wg], [0, 1]),
        "mma": gl.NVMMADistributedLayout([3, 0], [4 * wg, 1], [16, bm, 16]),
    }
