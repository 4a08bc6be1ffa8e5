"""What a fused product waits for: each launch as it is, and with one of its parts taken out.

    python benchmarks/fp4/parts.py [--out FOLDER]

The kernels' sources are changed and compiled anew: without the decoding of the codes, without x (nothing is brought or
waited for), with the weights from the first-level cache (each program reads its first chunk again and again), with
both of the first and the third, without the exchange of sums between programs, and without the early start beside the
launch before. The results of such a kernel are wrong; what it no longer takes is what the part costs where nothing else
hides it.
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F

from apt_model.ops.fp4 import compiled, kernel_decode, kernel_tile, launch
from apt_model.ops.fp4.layout import shuffle
from apt_model.ops.fp4.tables import HOPPER
from benchmarks import record
from benchmarks.fp4.tune import ROTATING_BYTES, random_packed

CELLS = ((28672, 8192, 8), (28672, 8192, 16), (8192, 8192, 16), (14336, 4096, 16), (8192, 8192, 64), (28672, 8192, 64))
# A word four times over, and its scales, so that both are waited for.
UNDECODED = """
{
mov.b32 {$0, $1}, $8;
mov.b32 {$2, $3}, $8;
mov.b32 {$4, $5}, $9;
mov.b32 {$6, $7}, $9;
}
"""
# Per kernel: what is replaced by what.
CHANGES = {
    "whole": {},
    "no decoding": {"decode": [("gl.constexpr(decoding(torch.bfloat16))", f"gl.constexpr({UNDECODED!r})")]},
    "no x": {
        "decode": [
            ("        mbarrier.wait(full, 0)\n", ""), ("        mbarrier.expect(full, KEPT * BM * 512)\n", ""),
            ("        tma_load(x, [first * 4, 0, 0], full, shared)\n", ""),
        ],
        "tile": [
            ("    mbarrier.expect(full.index(stage), C * BM * 128, pred=pred)\n", ""),
            ("    tma_load(x_desc, [m_first, chunk * 64], full.index(stage), shared.index(stage), pred=pred)\n", "    pass\n"),
            ("        mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)\n", ""),
        ],
    },
    "weights from the cache": {
        "decode": [
            ("load_chunk(words_ptr, scales_ptr, AHEAD + c, SCALES)", "load_chunk(words_ptr, scales_ptr, 0, SCALES)"),
            ("load_chunk(words_ptr, scales_ptr, i, SCALES)", "load_chunk(words_ptr, scales_ptr, 0, SCALES)"),
            ("        words_ptr += AHEAD * 512\n", ""), ("        scales_ptr += AHEAD * SCALES\n", ""),
        ],
        "tile": [
            ("load_chunk_if(words_ptr, scales_ptr, i,", "load_chunk_if(words_ptr, scales_ptr, 0,"),
            ("load_chunk_if(words_at, scales_at, AHEAD + c,", "load_chunk_if(words_ptr, scales_ptr, 0,"),
        ],
    },
    "no exchange of sums": {"decode": [("    if SPLIT == 1:\n", "    if SPLIT >= 1:\n")]},
    "no early start": {"decode": [("    if PDL:\n", "    if False:\n")], "tile": [("    if PDL:\n", "    if False:\n")]},
}  # fmt: skip
CHANGES["no decoding, weights from the cache"] = {
    kind: [*CHANGES["no decoding"].get(kind, ()), *CHANGES["weights from the cache"][kind]]
    for kind in ("decode", "tile")
}


def variant(changes, folder, number):
    """The two kernels with parts of their sources replaced."""
    made = {}
    for kind, module in (("decode", kernel_decode), ("tile", kernel_tile)):
        text = Path(module.__file__).read_text(encoding="utf-8")
        for old, new in changes.get(kind, ()):
            if old not in text:
                raise SystemExit(f"{kind}: {old!r} is not in the kernel any more")
            text = text.replace(old, new)
        text = text.replace("apt_model.ops.fp4.kernel_decode import", f"decode_{number} import")
        path = folder / f"{kind}_{number}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        made[kind] = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = made[kind]
        spec.loader.exec_module(made[kind])
    return made["decode"].decode_kernel, made["tile"].tile_kernel


def seconds(orders, x, setting):
    def call():
        for order in orders:
            launch.run(x, order, None, None, setting)

    return record.graph_seconds(call, repeat=2, rounds=3) / len(orders)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        kernels = {name: variant(each, Path(folder), i) for i, (name, each) in enumerate(CHANGES.items())}
        for n, k, m in CELLS:
            first = shuffle(random_packed(n, k, "nvfp4"), torch.bfloat16)
            held = first.words.nbytes + first.scales.nbytes
            copies = max(1, ROTATING_BYTES // held)
            orders = [
                first,
                *(first._replace(words=first.words.clone(), scales=first.scales.clone()) for _ in range(copies)),
            ]
            w = [
                torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
                for _ in range(max(2, ROTATING_BYTES // (2 * n * k)))
            ]
            x = torch.randn(1 if m == 8 else m, k, device="cuda", dtype=torch.bfloat16)
            bf16 = record.graph_seconds(lambda x=x, w=w: [F.linear(x, each) for each in w], repeat=2, rounds=3) / len(w)
            del w
            row = {"shape": f"{n}x{k}", "m": len(x), "bf16_us": bf16 * 1e6, "setting": str(HOPPER[n, k, m])}
            for name, (decode, tile) in kernels.items():
                kernel_decode.decode_kernel, kernel_tile.tile_kernel = decode, tile
                compiled._known.clear()
                row[name] = seconds(orders, x, HOPPER[n, k, m]) * 1e6
            rows.append(row)
            print(row, flush=True)
    print(record.write("fp4_parts", rows, folder=options.out))


if __name__ == "__main__":
    main()
