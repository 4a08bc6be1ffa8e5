"""A trial: dX = dY W by a kernel that takes the weight apart itself, beside slabs and beside bf16.

    python benchmarks/fp4/turned.py [--shapes 8192x8192 ...] [--ms 2048 4096] [--compile-only] [--out FOLDER]

The order of the weights is the forward kernels'. A step takes 64 outputs at 128 inputs: they are decoded to registers,
stored as a tile of shared memory, and read from there turned, as the first operand of the warpgroups' product, while the
next step's are decoded. Every result is compared with the definition before it is timed; GPU time by graph replay over
rotating weights. Not part of the package: what slabs cannot reach (docs/decisions/0010) is to be seen here first.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from apt_model.ops.fp4 import naive, select
from apt_model.ops.fp4.kernel_decode import finish, fragments, layout
from apt_model.ops.fp4.kernel_names import barrier, tma_load
from apt_model.ops.fp4.kernel_tile import in_memory
from apt_model.ops.fp4.layout import shuffle
from benchmarks import record
from benchmarks.fp4.tune import ROTATING_BYTES, random_packed

SHAPES, MS = ["28672x8192", "8192x8192", "14336x4096", "4096x4096"], [256, 1024, 2048, 4096]
# Rows of dY a program takes, and stages.
SETTINGS = [(256, 4), (256, 3), (128, 4), (128, 6)]
LARGEST_ERROR = 5e-3


@gluon.jit
def bring(
    dy_desc, words_desc, scales_desc, m_first, inputs, step, full, dy, words, scales, BM: gl.constexpr, pred
):  # fmt: skip
    """Start to bring a step's codes, scales and dY."""
    SCALES: gl.constexpr = scales.shape[3]
    at = step % words.shape[0]
    mbarrier.expect(full.index(at), BM * 128 + 4096 + SCALES * 8, pred=pred)
    tma_load(words_desc, [step, inputs * 4, 0], full.index(at), words.index(at), pred=pred)
    tma_load(scales_desc, [step, inputs * 2, 0], full.index(at), scales.index(at), pred=pred)
    tma_load(dy_desc, [m_first, step * 64], full.index(at), dy.index(at), pred=pred)


@gluon.jit
def codes(words, scales, step, BLOCK: gl.constexpr, words_layout: gl.constexpr, scales_layout: gl.constexpr):
    """A step's codes and scales, as `fragments` takes them for two tiles: here two chunks of one."""
    at = step % words.shape[0]
    q = words.index(at).reshape([2, 2, 256]).load(words_layout).reshape([2, 512])
    s = scales.index(at).reshape([2, 1, 1024 // BLOCK]).load(scales_layout).reshape([2, 1024 // BLOCK])
    return q, s


@gluon.jit
def decode(q, s, BLOCK: gl.constexpr, mma: gl.constexpr):
    """A step's weights: [64 outputs, 128 inputs]."""
    w = fragments(q, s, 2, BLOCK, False, mma)  # [(chunk, output), input]
    return w.reshape([2, 64, 64]).permute([1, 0, 2]).reshape([64, 128])


@gluon.jit(do_not_specialize=["M", "steps"])
def turned_kernel(
    dy_desc, words_desc, scales_desc, alpha_ptr, out_ptr, M, K, steps,
    BM: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Rows program_id(0) of dY (BM of them), 128 inputs from program_id(1): all outputs, 64 a step."""
    mma: gl.constexpr = layout("mma", 2, BM, BLOCK, 0, 3)
    out_layout: gl.constexpr = layout("out", 2, BM, BLOCK, 0, 3)
    words_layout: gl.constexpr = in_memory("words", 2, BLOCK)
    scales_layout: gl.constexpr = in_memory("scales", 2, BLOCK)
    m_first, inputs = gl.program_id(0) * BM, gl.program_id(1)
    dy = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, 64], dy_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [STAGES, 1, 4, 256], words_desc.layout)
    scales = gl.allocate_shared_memory(gl.int32, [STAGES, 1, 2, 1024 // BLOCK], scales_desc.layout)
    decoded = gl.allocate_shared_memory(gl.bfloat16, [64, 128], gl.NVMMASharedLayout(128, 16, 2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(STAGES):
        bring(dy_desc, words_desc, scales_desc, m_first, inputs, i, full, dy, words, scales, BM, i < steps)
    alpha = gl.load(alpha_ptr)
    acc = gl.zeros([128, BM], gl.float32, mma)
    mbarrier.wait(full.index(0), 0)
    q, s = codes(words, scales, 0, BLOCK, words_layout, scales_layout)
    decoded.store(decode(q, s, BLOCK, mma))
    mbarrier.wait(full.index(1), 0, pred=steps > 1)
    q, s = codes(words, scales, 1, BLOCK, words_layout, scales_layout)
    fence_async_shared()
    barrier()
    for step in range(steps):
        acc = warpgroup_mma(decoded.permute((1, 0)), dy.index(step % STAGES).permute((1, 0)), acc, is_async=True)
        w = decode(q, s, BLOCK, mma)
        # A tile that is stored beside a product in flight makes the assembler wait within each product.
        acc, w = warpgroup_mma_wait(0, deps=[acc, w])
        barrier()
        ahead = step + STAGES
        bring(dy_desc, words_desc, scales_desc, m_first, inputs, ahead, full, dy, words, scales, BM, ahead < steps)
        decoded.store(w)
        turn = step + 2
        mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1, pred=turn < steps)
        q, s = codes(words, scales, turn, BLOCK, words_layout, scales_layout)
        fence_async_shared()
        barrier()
    finish(acc, inputs, m_first, out_ptr, 0, alpha, M, K, False, 0, 128, BM, out_layout)


def turned(upstream, order, setting):
    """DL/dX [M, K] of upstream [M, N]."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    (m, n), k, (bm, stages) = upstream.shape, order.in_features, setting
    tiles, groups = order.words.shape[:2]
    plain, size = gl.NVMMASharedLayout(0, 32, 3), 1024 // order.block
    out = upstream.new_empty(m, k)
    turned_kernel[-(-m // bm), -(-k // 128)](
        TensorDescriptor(upstream, [m, n], [n, 1], [bm, 64], gl.NVMMASharedLayout(128, 16, 2)),
        TensorDescriptor(order.words, [tiles, groups * 8, 256], [groups * 2048, 256, 1], [1, 4, 256], plain),
        TensorDescriptor(order.scales, [tiles, groups * 4, size], [groups * 4 * size, size, 1], [1, 2, size], plain),
        order.alpha, out, m, k, tiles, bm, stages, order.block, num_warps=8,
    )  # fmt: skip
    return out


def compile_only():
    """For sm_90, without a GPU: registers, spills and shared memory of each setting."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    for bm, stages in SETTINGS:
        plain = gl.NVMMASharedLayout(0, 32, 3)
        signature = {
            "dy_desc": f"tensordesc<bf16[{bm}, 64],{gl.NVMMASharedLayout(128, 16, 2)!r}>",
            "words_desc": f"tensordesc<i32[1, 4, 256],{plain!r}>", "scales_desc": f"tensordesc<i32[1, 2, 64],{plain!r}>",
            "alpha_ptr": "*fp32", "out_ptr": "*bf16", "M": "i32", "K": "i32", "steps": "i32",
        }  # fmt: skip
        constants = {"BM": bm, "STAGES": stages, "BLOCK": 16}
        source = GluonASTSource(turned_kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        text = made.asm["ptx"]
        print(
            bm,
            stages,
            f"shared {made.metadata.shared}, {text.count('wgmma.mma_async')} products in the text",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--ms", nargs="*", type=int, default=MS)
    parser.add_argument("--compile-only", action="store_true", help="no GPU: only compile")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    options = parser.parse_args()
    if options.compile_only:
        compile_only()
        return
    rows = []
    for shape, m in itertools.product(options.shapes, options.ms):
        n, k = map(int, shape.split("x"))
        packed = random_packed(n, k, "nvfp4")
        first = shuffle(packed, torch.bfloat16)
        copies = max(1, min(8, ROTATING_BYTES // (first.words.nbytes + first.scales.nbytes)))
        orders = [
            first,
            *(first._replace(words=first.words.clone(), scales=first.scales.clone()) for _ in range(copies)),
        ]
        upstream = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
        w = naive.dequantize(packed, torch.bfloat16)
        expected = upstream.float() @ naive.dequantize(packed, torch.float32)
        row = {
            "shape": shape,
            "m": m,
            "bf16_us": record.graph_seconds(lambda a=upstream, w=w: a @ w, repeat=4, rounds=5) * 1e6,
        }
        arms = {"slabs": select.linear_gradient}
        arms |= {str(setting): lambda a, o, setting=setting: turned(a, o, setting) for setting in SETTINGS}
        for name, call in arms.items():
            error = float((call(upstream, first).float() - expected).norm() / expected.norm())
            if not error < LARGEST_ERROR:
                row[name] = f"wrong: {error:.1e}"
                continue

            def every(call=call, upstream=upstream, orders=orders):
                for order in orders:
                    call(upstream, order)

            row[name] = row["bf16_us"] / (record.graph_seconds(every, repeat=1, rounds=5) / len(orders) * 1e6)
        rows.append(row)
        print(row, flush=True)
    print(record.write("fp4_turned", rows, folder=options.out))


if __name__ == "__main__":
    main()
