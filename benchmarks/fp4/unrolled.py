"""A trial: `kernel_tile` with stages that the compiler can tell apart, beside the kernel as it is and beside bf16.

    python benchmarks/fp4/unrolled.py [--shapes 8192x8192 ...] [--ms 1 16 ...] [--gradient] [--out FOLDER]

A stage that is picked by a number is, to the compiler, all of its allocation: it has all warps of a program wait for each
other before and after each bulk copy, five to six times a step. Here each stage is an allocation of its own, and the loop
goes over all stages at once: one wait a step, the one that is needed. Codes are read a product before they are decoded.
Slices of the inputs become whole rounds: what is beyond their end comes as zeros, which costs no memory but a product.
For the gradient codes are read by `ldmatrix`, with no two lanes at one bank, where the kernel as it is has four; the
result's rows are put in order at the end.

Every result is compared with the definition before it is timed; arms take turns. Not part of the package: what it gains
is to be seen here first (docs/decisions/0010).
"""

# ruff: noqa: RUF005, SIM108 - Triton neither unpacks in a tuple nor leaves out half of an expression
import argparse
import itertools
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from apt_model.ops.fp4 import compiled, kernel_tile, launch, naive, plan
from apt_model.ops.fp4.kernel_decode import bias_of_tile, finish_split, fragments, layout
from apt_model.ops.fp4.kernel_names import barrier, tma_load
from apt_model.ops.fp4.kernel_tile import in_memory, place, turned_weights
from apt_model.ops.fp4.layout import shuffle
from apt_model.ops.fp4.tables import Tile
from benchmarks import record
from benchmarks.fp4.cells import Replay
from benchmarks.fp4.tune import ROTATING_BYTES, SHAPES, random_packed, warm_aside

# For rows of x up to the key; of these the kernel as it is knows the first of its table besides.
SETTINGS = {
    8: [(1, 8, 4, 4, 4), (1, 8, 4, 4, 2), (1, 8, 8, 2, 1), (2, 8, 8, 2, 1), (1, 8, 8, 2, 4), (4, 8, 4, 4, 1)],
    16: [(1, 16, 4, 3, 4), (1, 16, 4, 4, 4), (1, 16, 8, 2, 1), (2, 16, 8, 2, 1), (1, 16, 8, 2, 4), (2, 16, 4, 4, 2)],
    64: [(1, 64, 2, 4, 2), (2, 64, 4, 2, 1), (2, 64, 2, 4, 2), (2, 64, 2, 4, 1), (1, 64, 4, 2, 4), (4, 64, 2, 4, 4)],
    256: [(1, 128, 4, 2, 1), (2, 128, 2, 3, 1), (2, 128, 4, 2, 1), (2, 256, 2, 3, 1), (2, 256, 2, 2, 1)],
    1024: [(2, 256, 2, 3, 1), (2, 256, 1, 4, 1), (2, 256, 1, 5, 1), (2, 256, 2, 2, 1)],
}
LARGEST_ERROR, ROUNDS = 5e-3, 7


@gluon.jit
def expect(full, words, scales, shared, pred):
    """Tell a stage's three barriers how many bytes will come: codes, scales and x."""
    mbarrier.expect(full[0], words.shape[0] * words.shape[1] * words.shape[2] * 4, pred=pred)
    mbarrier.expect(full[1], scales.shape[0] * scales.shape[1] * scales.shape[2] * 4, pred=pred)
    mbarrier.expect(full[2], shared.shape[0] * shared.shape[1] * 2, pred=pred)


@gluon.jit
def wait(full, phase, pred):
    """Until a stage's codes, scales and x have come."""
    mbarrier.wait(full[0], phase, pred=pred)
    mbarrier.wait(full[1], phase, pred=pred)
    mbarrier.wait(full[2], phase, pred=pred)


@gluon.jit
def bring_weights(
    words_desc, scales_desc, tile, chunk, full, words, scales, WG: gl.constexpr, TURNED: gl.constexpr, pred
):
    """Start to bring a step's codes and scales to their places."""
    if TURNED:
        tma_load(words_desc, [chunk, tile * WG * 16, 0], full[0], words, pred=pred)
        tma_load(scales_desc, [chunk, tile * WG, 0], full[1], scales, pred=pred)
    else:
        tma_load(words_desc, [tile * WG, chunk * 2, 0], full[0], words, pred=pred)
        tma_load(scales_desc, [tile * WG, chunk, 0], full[1], scales, pred=pred)


@gluon.constexpr_function
def in_order(name, wg, block):
    """Who reads what of the codes [1, wg * 16, 32] of wg chunks of a tile, or of their scales [1, wg, 64 or 32].

    A warp takes the words of one t of all four j: lane 4 g + j has that of row g. With rows of 128 bytes, whose pieces of
    16 are turned (the swizzle), this is `ldmatrix`, and no two lanes want one bank.
    """
    over, places = [1 << i for i in range(wg.bit_length() - 1)], 32 // block
    if name == "words":
        return gl.DistributedLinearLayout(
            [[0, 4, 0], [0, 8, 0]],
            [[0, 0, 1], [0, 0, 2], [0, 0, 16], [0, 1, 0], [0, 2, 0]],
            [[0, 0, 4], [0, 0, 8], *([0, 16 * each, 0] for each in over)],
            [],
            [1, wg * 16, 32],
        )
    return gl.DistributedLinearLayout(
        [[0, 0, 8 * places], [0, 0, 16 * places]],
        [[0, 0, 0], [0, 0, places // 2], *([0, 0, places << i] for i in range(3))],
        [[0, 0, 0], [0, 0, 0], *([0, each, 0] for each in over)],
        [],
        [1, wg, 32 * places],
    )


@gluon.jit
def turned_fragments(words, scales, P: gl.constexpr, BLOCK: gl.constexpr, FP16: gl.constexpr, mma: gl.constexpr):
    """As `kernel_tile.turned_fragments`, of words read in that order; row 16 t + 8 h + 2 j + i is input 16 j + 8 h + 2 t + i."""
    w = turned_weights(words, scales, P, BLOCK, FP16)
    w = w.permute([0, 3, 8, 2, 1, 7, 4, 5, 6]).reshape([P * 64, 64])  # P t h g, w r j j i
    return gl.convert_layout(w, gl.DotOperandLayout(0, mma, 2), assert_trivial=True)


@gluon.jit
def read(
    words, scales, c: gl.constexpr, WG: gl.constexpr, BLOCK: gl.constexpr, TURNED: gl.constexpr,
    words_layout: gl.constexpr, scales_layout: gl.constexpr,
):  # fmt: skip
    """The c-th chunk of a step's, as it is in memory."""
    if TURNED:
        q = words.slice(c, 1, dim=0).load(words_layout)
        s = scales.slice(c, 1, dim=0).load(scales_layout)
    else:
        q = words.slice(c * 2, 2, dim=1).load(words_layout).reshape([WG, 512])
        s = scales.slice(c, 1, dim=1).load(scales_layout).reshape([WG, 1024 // BLOCK])
    return q, s


@gluon.jit
def decoded(
    q, s, WG: gl.constexpr, BLOCK: gl.constexpr, FP16: gl.constexpr, TURNED: gl.constexpr, mma: gl.constexpr
):  # fmt: skip
    """A chunk as the first operand, [WG * 64, 64]."""
    if TURNED:
        w = turned_fragments(q, s, WG, BLOCK, FP16, mma)
    else:
        w = fragments(q, s, WG, BLOCK, FP16, mma)
    return w


@gluon.jit(do_not_specialize=["M", "chunks", "steps_per_split"])
def tile_kernel(
    x_desc, words_desc, scales_desc, alpha_ptr, bias_ptr, out_ptr, partial_ptr, counter_ptr, M, N, chunks, steps_per_split,
    SPLIT: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, TURNED: gl.constexpr,
    GROUP: gl.constexpr, BLOCK: gl.constexpr, FP16: gl.constexpr, HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """As `kernel_tile.tile_kernel`."""
    TYPE: gl.constexpr = gl.float16 if FP16 else gl.bfloat16
    words_layout: gl.constexpr = in_order("words", WG, BLOCK) if TURNED else in_memory("words", WG, BLOCK, TURNED)
    scales_layout: gl.constexpr = in_order("scales", WG, BLOCK) if TURNED else in_memory("scales", WG, BLOCK, TURNED)
    out_layout: gl.constexpr = layout("out", WG, BM, BLOCK, ACTIVATION, 3)
    mma: gl.constexpr = layout("mma", WG, BM, BLOCK, ACTIVATION, 3)
    m_tile, tile = place(gl.program_id(0), gl.program_id(1), gl.num_programs(0), gl.num_programs(1), GROUP)
    split = gl.program_id(2)
    first = split * steps_per_split * C
    last = gl.minimum(first + steps_per_split * C, chunks)
    ROUND: gl.constexpr = C * STAGES
    end = first + (last - first + ROUND - 1) // ROUND * ROUND
    m_first = m_tile * BM
    DOWN: gl.constexpr = C if TURNED else WG
    ACROSS: gl.constexpr = WG if TURNED else C
    shared = ()
    words = ()
    scales = ()
    full = ()
    for _ in gl.static_range(STAGES):
        shared = shared + (gl.allocate_shared_memory(TYPE, [BM, C * 64], x_desc.layout),)
        words = words + (
            gl.allocate_shared_memory(
                gl.int32, [DOWN, ACROSS * (16 if TURNED else 2), 32 if TURNED else 256], words_desc.layout
            ),
        )
        scales = scales + (gl.allocate_shared_memory(gl.int32, [DOWN, ACROSS, 1024 // BLOCK], scales_desc.layout),)
        full = full + (
            (
                gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
                gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
                gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
            ),
        )
    for i in gl.static_range(STAGES):
        for j in gl.static_range(3):
            mbarrier.init(full[i][j], count=1)
    for i in gl.static_range(STAGES):
        expect(full[i], words[i], scales[i], shared[i], True)
    barrier()
    # Beyond a slice's end is beyond the weight's, so that zeros come.
    for i in gl.static_range(STAGES - 1):
        chunk = gl.where(first + i * C < last, first + i * C, 1 << 20)
        bring_weights(words_desc, scales_desc, tile, chunk, full[i], words[i], scales[i], WG, TURNED, True)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for i in gl.static_range(STAGES - 1):
        chunk = gl.where(first + i * C < last, first + i * C, 1 << 20)
        tma_load(x_desc, [m_first, chunk * 64], full[i][2], shared[i])
    alpha = gl.load(alpha_ptr)
    bias = bias_of_tile(bias_ptr, tile, N, HAS_BIAS, ACTIVATION, WG * 64, mma)
    acc = gl.zeros([WG * 64, BM], gl.float32, mma)
    wait(full[0], 0, True)
    q, s = read(words[0], scales[0], 0, WG, BLOCK, TURNED, words_layout, scales_layout)
    a = decoded(q, s, WG, BLOCK, FP16, TURNED, mma)
    a_before = a
    # What is decoded next has been read a product before: reading takes as long as half of the decoding.
    if C == 1:
        wait(full[1], 0, first + C < end)
    q, s = read(words[1 // C], scales[1 // C], 1 % C, WG, BLOCK, TURNED, words_layout, scales_layout)
    for base in range(first, end, ROUND):
        phase = (base - first) // ROUND & 1
        for i in gl.static_range(STAGES):
            for c in gl.static_range(C):
                x = shared[i].slice(c * 64, 64, dim=1).permute((1, 0))
                acc = warpgroup_mma(a, x, acc, is_async=True)
                acc, a_before = warpgroup_mma_wait(1, deps=[acc, a_before])
                if c == 0:
                    # Every warpgroup is past the step before this one, so its place is free.
                    barrier()
                    chunk = base + (i + STAGES - 1) * C
                    pred = chunk < end
                    chunk = gl.where(chunk < last, chunk, 1 << 20)
                    bring_weights(
                        words_desc, scales_desc, tile, chunk, full[(i + STAGES - 1) % STAGES],
                        words[(i + STAGES - 1) % STAGES], scales[(i + STAGES - 1) % STAGES], WG, TURNED, pred,
                    )  # fmt: skip
                    tma_load(
                        x_desc, [m_first, chunk * 64], full[(i + STAGES - 1) % STAGES][2],
                        shared[(i + STAGES - 1) % STAGES], pred=pred,
                    )  # fmt: skip
                    # For its next turn; every warp has waited for this one.
                    expect(full[i], words[i], scales[i], shared[i], base + (i + STAGES) * C < end)
                if (c + 2) % C == 0:
                    wait(
                        full[(i + (c + 2) // C) % STAGES], phase ^ ((i + (c + 2) // C) // STAGES),
                        base + (i + (c + 2) // C) * C < end,
                    )  # fmt: skip
                q_next, s_next = read(
                    words[(i + (c + 2) // C) % STAGES], scales[(i + (c + 2) // C) % STAGES], (c + 2) % C, WG, BLOCK,
                    TURNED, words_layout, scales_layout,
                )  # fmt: skip
                a_before = a
                a = decoded(q, s, WG, BLOCK, FP16, TURNED, mma)
                q = q_next
                s = s_next
    acc, a_before = warpgroup_mma_wait(0, deps=[acc, a_before])
    if TURNED:
        acc = acc.reshape([WG, 4, 2, 4, 2, BM]).permute([0, 3, 2, 1, 4, 5]).reshape([WG * 64, BM])  # P j h t i
    finish_split(
        acc, tile, tile * gl.num_programs(0) + m_tile, split, m_first, out_ptr, bias, partial_ptr, counter_ptr,
        alpha, M, N, SPLIT, HAS_BIAS, ACTIVATION, WG * 64, BM, out_layout,
    )  # fmt: skip


KERNELS = {"as it is": kernel_tile.tile_kernel, "unrolled": tile_kernel}
BOXES, MAKE = plan.boxes, plan.make


def boxes(setting, block, turned):
    """As `plan.boxes`, with the codes of a weight that is turned in rows of 128 bytes."""
    found = BOXES(setting, block, turned)
    if turned:
        found = (found[0], ([setting.c, setting.wg * 16, 32], gl.NVMMASharedLayout(128, 32, 3)), found[2])
    return found


def make(x, weight, *others, turned=False, **options):
    """As `plan.make`, likewise."""
    made = MAKE(x, weight, *others, turned=turned, **options)
    if turned and made.launch is not None:
        of, (tiles, groups) = made.launch, weight.words.shape[:2]
        codes = (tiles, groups * 64, 32)
        views = (of.views[0], (codes, plan.contiguous(codes)), of.views[2])
        made = made._replace(launch=compiled.Launch(of.kernel, of.index, of.grid, of.numbers, views))
    return made


def take(kernel):
    """Let launches be of this kernel from here on."""
    kernel_tile.tile_kernel = KERNELS[kernel]
    trial = kernel == "unrolled"
    plan.boxes, launch.make = (boxes, make) if trial else (BOXES, MAKE)
    compiled._known.clear()


def jobs(options):
    """Shape, rows of x, launch and kernel of all that is tried."""
    for shape, m in itertools.product(options.shapes, options.ms):
        bucket = next((each for each in SETTINGS if m <= each), max(SETTINGS))
        settings = [Tile(*each) for each in SETTINGS[bucket]]
        n, k = map(int, shape.split("x"))
        shipped = launch.shipped(launch.bucket_of(min(m, launch.MOST_ROWS)), n, k, torch.device("cuda", 0)).setting
        if isinstance(shipped, Tile) and not options.gradient:
            settings.insert(0, shipped)
        for setting, kernel in itertools.product(dict.fromkeys(settings), KERNELS):
            yield (n, k, m), setting, kernel


def warm(options):
    """Compile a share of the launches by doing each once."""
    part, parts = options.warm
    held = {}
    for (n, k, m), setting, kernel in list(jobs(options))[part::parts]:
        if (n, k) not in held:
            held[n, k] = shuffle(random_packed(n, k, options.format), torch.bfloat16)
        x = torch.randn(m, n if options.gradient else k, device="cuda", dtype=torch.bfloat16)
        take(kernel)
        try:
            launch.run(x, held[n, k], None, None, setting, turned=options.gradient)
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - a launch that does not fit the machine
            print(n, k, m, setting, kernel, type(error).__name__, str(error)[:100], flush=True)


def measure(cell, tries, options):
    """Rows of one shape and number of rows."""
    (n, k, m), turned = cell, options.gradient
    packed = random_packed(n, k, options.format)
    first = shuffle(packed, torch.bfloat16)
    copies = max(1, min(12, ROTATING_BYTES // (first.words.nbytes + first.scales.nbytes)))
    orders = [
        first,
        *(first._replace(words=first.words.clone(), scales=first.scales.clone()) for _ in range(copies)),
    ]
    w = naive.dequantize(packed, torch.bfloat16)
    dense = [w, *(w.clone() for _ in range(max(1, ROTATING_BYTES // w.nbytes)))]
    x = torch.randn(m, n if turned else k, device="cuda", dtype=torch.bfloat16)
    exact = naive.dequantize(packed, torch.float32)
    expected = x.float() @ (exact if turned else exact.T)
    product = torch.mm if turned else torch.nn.functional.linear
    ready, rows = {"bf16": Replay([partial(_dense, product, each) for each in dense], x)}, []
    for setting, kernel in tries:
        take(kernel)
        row = {"N": n, "K": k, "M": m, "gradient": turned, "kernel": kernel, **setting._asdict()}
        rows.append(row)
        calls = [partial(_launch, setting, turned, order) for order in orders]
        try:
            row["error"] = float((calls[0](x).float() - expected).norm() / expected.norm())
            if row["error"] < LARGEST_ERROR:
                ready[setting, kernel] = Replay(calls, x)
        except Exception as error:  # noqa: BLE001 - a launch that does not fit the machine
            row["why"] = f"{type(error).__name__}: {str(error)[:80]}"
    times = {name: [] for name in ready}
    for _ in range(ROUNDS):
        for name, each in ready.items():
            times[name].append(each.seconds())
    base = statistics.median(times["bf16"])
    for row, (setting, kernel) in zip(rows, tries, strict=True):
        if (setting, kernel) in times:
            row["us"] = 1e6 * statistics.median(times[setting, kernel])
            row["speed"] = 1e6 * base / row["us"]
    for kernel in KERNELS:
        best = sorted((row for row in rows if row["kernel"] == kernel and "us" in row), key=lambda row: row["us"])[:3]
        shown = "; ".join(
            f"{'-'.join(str(row[name]) for name in Tile._fields)} {row['us']:.2f} us {row['speed']:.2f}x"
            for row in best
        )
        wrong = [row for row in rows if row["kernel"] == kernel and not row.get("error", 1) < LARGEST_ERROR]
        print(f"{n}x{k} M={m} {'dX ' if turned else ''}{kernel}: {shown}; {len(wrong)} wrong or failed", flush=True)
    return rows


def _dense(product, weight, x):
    return product(x, weight)


def _launch(setting, turned, order, x):
    return launch.run(x, order, None, None, setting, turned=turned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--ms", nargs="*", type=int, default=[1, 16, 64, 256, 1024])
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--gradient", action="store_true", help="dX in place of the product")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    parser.add_argument("--warm", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.warm:
        warm(options)
        return
    warm_aside()
    rows = []
    for cell, tries in itertools.groupby(jobs(options), key=lambda job: job[0]):
        rows += measure(cell, [(setting, kernel) for _, setting, kernel in tries], options)
    print(record.write("fp4_unrolled_gradient" if options.gradient else "fp4_unrolled", rows, folder=options.out))


if __name__ == "__main__":
    main()
