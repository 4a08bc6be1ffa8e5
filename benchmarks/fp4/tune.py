"""Try launch settings of the FP4 kernels; every setting is checked against the definition before it is timed.

    python benchmarks/fp4/tune.py [--shapes ...] [--ms ...] [--kinds decode tile] [--out FOLDER]

Settings are compiled first, in processes of their own.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from apt_model.ops.fp4 import naive
from apt_model.ops.fp4.format import PackedWeight
from apt_model.ops.fp4.kernel_decode import decode_kernel, layouts
from apt_model.ops.fp4.kernel_tile import tile_kernel
from apt_model.ops.fp4.layout import shuffle
from benchmarks import record

SHAPES = ["28672x8192", "8192x8192", "14336x4096", "4096x4096"]
STATE = {}
CODES = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "swiglu": 5}


def random_packed(n, k, form):
    """Codes and scales at random: what they stand for does not matter to the speed."""
    block = 16 if form == "nvfp4" else 32
    codes = torch.randint(0, 256, (n, -(-k // 16) * 8), device="cuda", dtype=torch.uint8)
    scale = torch.randint(0x20, 0x48, (n, -(-k // block)), device="cuda", dtype=torch.uint8)
    if form == "nvfp4":
        scale[::7, ::5] = 0
        return PackedWeight(codes, scale.view(torch.float8_e4m3fn), torch.full((1,), 48.0, device="cuda"), k)
    return PackedWeight(codes, scale + 80, None, k)


def constants(setting, block, bias, activation):
    """Compile-time arguments and warps of a setting (kind, ..., pdl)."""
    gated = activation == "swiglu"
    if setting[0] == "decode":
        _, wg, bm, kept, ahead, split, pdl = setting
        fixed = {"SPLIT": split, "WG": wg, "BM": bm, "KEPT": kept, "AHEAD": ahead, **layouts(wg, bm, block, gated, 2)}
    else:
        _, wg, bm, c, stages, ahead, split, pdl = setting
        fixed = {
            "SPLIT": split,
            "WG": wg,
            "C": c,
            "BM": bm,
            "STAGES": stages,
            "AHEAD": ahead,
            **layouts(wg, bm, block, gated, 3),
        }
        del fixed["x_layout"]
    warps = 4 * wg
    return {
        "BLOCK": block, "HAS_BIAS": bias, "ACTIVATION": CODES[activation], "PDL": bool(pdl), **fixed, "num_warps": warps,
        "launch_pdl": bool(pdl),
    }  # fmt: skip


def grouped(x, kept, bm):
    """X [M, K] as [K / 64, M, 64]."""
    m, k = x.shape
    return TensorDescriptor(
        x, [k // 64, m, 64], [64, x.stride(0), 1], [kept * 4, bm, 64], gl.NVMMASharedLayout(128, 16, 3)
    )


def launch(x, s, out, setting, bias=None, activation=None):  # noqa: PLR0917 - as the kernels take them
    if not STATE:
        STATE.update(
            counters=torch.zeros(65536, dtype=torch.int32, device="cuda"), partial=torch.empty(2**27, device="cuda")
        )
    tiles, groups = s.words.shape[:2]
    m, n = x.shape[0], out.shape[1]
    options = constants(setting, s.block, bias is not None, activation)
    if setting[0] == "decode":
        _, wg, bm, kept, _, split, _ = setting
        desc = grouped(x, kept, bm) if kept else x
        decode_kernel[(-(-tiles // wg), split)](
            desc, s.words, s.scales, s.alpha, bias, out, STATE["partial"], STATE["counters"], m, n, x.shape[1], x.stride(0),
            groups, -(-groups // split), **options,
        )  # fmt: skip
    else:
        _, wg, bm, c, _, _, split, _ = setting
        chunks = -(-x.shape[1] // 64)
        steps = -(-chunks // c)
        desc = TensorDescriptor.from_tensor(x, [bm, 64 * c], gl.NVMMASharedLayout(128, 16, 2))
        tile_kernel[(-(-m // bm), -(-tiles // wg), split)](
            desc, s.words, s.scales, s.alpha, bias, out, STATE["partial"], STATE["counters"], m, n, groups, chunks,
            -(-steps // split), **options,
        )  # fmt: skip
    return out


def warm(settings, block):
    x = torch.empty(256, 4096, device="cuda", dtype=torch.bfloat16)
    for setting in settings:
        options = constants(setting, block, False, None)
        types = (torch.int32, torch.int32, torch.float32, None, torch.bfloat16, torch.float32, torch.int32)
        try:
            if setting[0] == "decode":
                desc = grouped(x, setting[3], setting[2]) if setting[3] else None
                decode_kernel.warmup(
                    desc if setting[3] else torch.bfloat16, *types, 3, 4096, 4096, 4096, 16, 4, grid=(1,), **options
                )
            else:
                desc = TensorDescriptor.from_tensor(x, [setting[2], 64 * setting[3]], gl.NVMMASharedLayout(128, 16, 2))
                tile_kernel.warmup(desc, *types, 3, 4096, 16, 64, 4, grid=(1,), **options)
        except Exception as error:  # noqa: BLE001 - a setting that does not fit the machine
            print("no", setting, type(error).__name__, str(error)[:100].replace("\n", " "), flush=True)


def candidates(n, k, m, kinds):
    """Settings worth a try."""
    tiles, groups = -(-n // 64), -(-k // 256)
    found = []
    if "decode" in kinds and m <= 16:
        bm = 8 if m <= 8 else 16
        for wg, split, ahead in itertools.product((1, 2, 4), (1, 2, 4, 8, 16), (4, 8)):
            per = -(-groups // split)
            warps = -(-tiles // wg) * split * wg * 4
            if (
                -(-groups // per) != split
                or bm * 512 * per > 132_000
                or per & (per - 1)
                or tiles % wg
                or not 132 * 8 <= warps <= 132 * 96
            ):
                continue
            found.append(("decode", wg, bm, per, ahead, split, 1))
    if "tile" in kinds and m > 1:
        for wg, bm, c, stages, split in itertools.product(
            (1, 2, 4), (16, 32, 64, 128, 256), (1, 2, 4), (3, 4, 5), (1, 2, 3, 4, 6, 8)
        ):
            steps = k // 64 // c
            per = -(-steps // split)
            m_tiles, n_tiles = -(-m // bm), -(-tiles // wg)
            warps = m_tiles * n_tiles * split * wg * 4
            if (
                wg * bm > 512
                or (wg, bm) == (1, 256)
                or bm * 64 * c * 2 * stages > 200_000
                or c * bm < 64
                or c * bm > 512
            ):
                continue
            if -(-steps // per) != split or per < 4 or tiles % wg or bm >= 2 * max(m, 9) or (c == 1 and bm < 256):
                continue
            if (m > 32 and bm < 64) or (m > 64 and bm < 128) or warps < 132 * 4 or (split > 1 and warps > 132 * 24):
                continue
            found.append(
                ("tile", wg, bm, c, stages, 2 if wg * bm >= 512 and wg > 2 else 4 if wg * bm > 256 else 5, split, 1)
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--ms", nargs="*", type=int, default=[1, 16, 64, 256, 1024])
    parser.add_argument("--kinds", nargs="*", default=["decode", "tile"])
    parser.add_argument("--formats", nargs="*", default=["nvfp4"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=200, help="stop trying after this long")
    parser.add_argument("--warm", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    begin = time.time()
    cells = [(*map(int, shape.split("x")), m) for shape in options.shapes for m in options.ms]
    every = sorted({each for n, k, m in cells for each in candidates(n, k, m, options.kinds)})
    if options.warm:
        part, parts = options.warm
        for form in options.formats:
            warm(every[part::parts], 16 if form == "nvfp4" else 32)
        return
    parts = min(15, os.cpu_count())
    workers = [subprocess.Popen([sys.executable, *sys.argv, "--warm", str(i), str(parts)]) for i in range(parts)]  # noqa: S603
    for worker in workers:
        worker.wait()
    print(f"{len(every)} settings compiled in {time.time() - begin:.0f} s", flush=True)
    rows = []
    for shape, form in itertools.product(options.shapes, options.formats):
        n, k = map(int, shape.split("x"))
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
        packed = random_packed(n, k, form)
        first = shuffle(packed)
        copies = max(2, -(-400_000_000 // (first.words.nbytes + first.scales.nbytes)))
        rotating = [
            first,
            *(first._replace(words=first.words.clone(), scales=first.scales.clone()) for _ in range(copies - 1)),
        ]
        dense = [w, *(w.clone() for _ in range(max(1, 400_000_000 // w.nbytes)))]
        for m in options.ms:
            if time.time() - begin > options.seconds:
                continue
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            expected = naive.linear(x, packed).float()
            size = expected.norm()

            def base(x=x, dense=dense):
                for each in dense:
                    F.linear(x, each)

            bf16 = record.graph_seconds(base, repeat=2, rounds=3) / len(dense)
            found = []
            for setting in candidates(n, k, m, options.kinds):

                def ours(setting=setting, x=x, out=out, rotating=rotating):
                    for each in rotating:
                        launch(x, each, out, setting)

                try:
                    out.fill_(torch.nan)
                    launch(x, first, out, setting)
                    error = ((out.float() - expected).norm() / size).item()
                    seconds = record.graph_seconds(ours, repeat=1 if m > 256 else 2, rounds=3) / len(rotating)
                except Exception as problem:  # noqa: BLE001 - a setting that does not fit the machine
                    print("no", setting, type(problem).__name__, str(problem)[:80].replace("\n", " "))
                    continue
                if not error < 5e-3:
                    print("WRONG", shape, m, setting, error, flush=True)
                    continue
                found.append((seconds, setting, error))
                rows.append(
                    {
                        "shape": shape,
                        "format": form,
                        "m": m,
                        "setting": setting,
                        "us": seconds * 1e6,
                        "ratio": bf16 / seconds,
                    }
                )
            found.sort()
            traffic = first.words.nbytes + first.scales.nbytes
            for kind in options.kinds:
                best = [each for each in found if each[1][0] == kind][:3]
                print(
                    f"{shape} {form} M={m}: bf16 {bf16 * 1e6:.1f} us; "
                    + "; ".join(
                        f"{'-'.join(map(str, s))} {t * 1e6:.2f} us {bf16 / t:.2f}x {traffic / t / 1e12:.2f} TB/s"
                        for t, s, e in best
                    ),
                    flush=True,
                )
        del rotating, dense
    if options.out:
        (options.out / "tune.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
