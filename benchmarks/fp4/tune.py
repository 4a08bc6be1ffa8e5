"""Try launches of the FP4 kernels; each is compared with the definition before it is timed.

    python benchmarks/fp4/tune.py [--shapes 8192x8192 ...] [--ms 1 16 ...] [--kinds decode tile] [--out FOLDER]

Launches are compiled first, in processes of their own. GPU time by graph replay over rotating weights of at least 400 MB.
The best of each cell is what `apt_model/ops/fp4/tables.py` holds.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F

from apt_model.ops.fp4 import launch, measured, naive
from apt_model.ops.fp4.format import PackedWeight
from apt_model.ops.fp4.layout import shuffle
from apt_model.ops.fp4.tables import Decode, Tile
from benchmarks import record

SHAPES = ["28672x8192", "8192x8192", "14336x4096", "4096x4096"]
ROTATING_BYTES = 400_000_000


def random_packed(n, k, form):
    """Codes and scales at random: what they stand for does not matter to the speed."""
    block = 16 if form == "nvfp4" else 32
    codes = torch.randint(0, 256, (n, -(-k // 16) * 8), device="cuda", dtype=torch.uint8)
    scale = torch.randint(0x20, 0x48, (n, -(-k // block)), device="cuda", dtype=torch.uint8)
    if form == "mxfp4":
        return PackedWeight(codes, scale + 80, None, k)
    scale[::7, ::5] = 0
    return PackedWeight(codes, scale.view(torch.float8_e4m3fn), torch.full((1,), 48.0, device="cuda"), k)


def candidates(n, k, m, kinds):
    device = torch.device("cuda", torch.cuda.current_device())
    found = measured.candidates(m, n, k, launch.is_hopper(device), launch.facts(device.index)[1])
    return [each for each in found if type(each).__name__.lower() in kinds]


def warm(jobs, form):
    """Compile each launch by doing it once."""
    orders = {}
    for (n, k, m), setting in jobs:
        if (n, k) not in orders:
            orders[n, k] = shuffle(random_packed(n, k, form), torch.bfloat16)
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        try:
            launch.run(x, orders[n, k], None, None, setting)
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - a launch that does not fit the machine
            print("no", n, k, m, setting, type(error).__name__, str(error)[:100].replace("\n", " "), flush=True)


def warm_aside():
    parts = min(15, os.cpu_count() or 1)
    command = [sys.executable, *sys.argv, "--warm"]
    workers = [subprocess.Popen([*command, str(part), str(parts)]) for part in range(parts)]  # noqa: S603
    for worker in workers:
        worker.wait()


def seconds_of(setting, x, orders, expected):
    """GPU time of one product, or why there is none."""
    try:
        out = launch.run(x, orders[0], None, None, setting)
        error = float((out.float() - expected).norm() / expected.norm())
        if not error < measured.LARGEST_ERROR:
            return f"wrong: {error}"

        def call():
            for order in orders:
                launch.run(x, order, None, None, setting)

        return record.graph_seconds(call, repeat=1 if len(x) > 256 else 2, rounds=3) / len(orders)
    except Exception as problem:  # noqa: BLE001 - a launch that does not fit the machine
        return f"{type(problem).__name__}: {str(problem)[:80]}".replace("\n", " ")


def measure(shape, form, options, until):
    n, k = map(int, shape.split("x"))
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
    packed = random_packed(n, k, form)
    first = shuffle(packed, torch.bfloat16)
    held = first.words.nbytes + first.scales.nbytes
    orders = [first]
    while len(orders) * held < ROTATING_BYTES or len(orders) < 2:
        orders.append(first._replace(words=first.words.clone(), scales=first.scales.clone()))
    dense = [w, *(w.clone() for _ in range(max(1, ROTATING_BYTES // w.nbytes)))]
    for m in options.ms:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        expected = naive.linear(x, packed).float()
        bf16 = record.graph_seconds(lambda x=x: [F.linear(x, each) for each in dense], repeat=2, rounds=3) / len(dense)
        found = []
        for setting in candidates(n, k, m, options.kinds):
            if time.time() > until:
                print("time is up", flush=True)
                break
            seconds = seconds_of(setting, x, orders, expected)
            if isinstance(seconds, str):
                print(shape, m, setting, seconds, flush=True)
                continue
            found.append((seconds, setting))
            kind = type(setting).__name__
            yield {
                "shape": shape, "format": form, "m": m, "kind": kind, **setting._asdict(), "us": seconds * 1e6,
                "bf16_us": bf16 * 1e6, "ratio": bf16 / seconds, "bytes_per_s": held / seconds,
            }  # fmt: skip
        for kind in (Decode, Tile):
            best = sorted((each for each in found if isinstance(each[1], kind)), key=lambda each: each[0])[:3]
            shown = "; ".join(
                f"{'-'.join(map(str, s))} {t * 1e6:.2f} us {bf16 / t:.2f}x {held / t / 1e12:.2f} TB/s" for t, s in best
            )
            if best:
                print(f"{shape} {form} M={m}: bf16 {bf16 * 1e6:.1f} us; {kind.__name__} {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--ms", nargs="*", type=int, default=[1, 16, 64, 256, 1024], help="rows of x")
    parser.add_argument("--kinds", nargs="*", default=["decode", "tile"])
    parser.add_argument("--formats", nargs="*", default=["nvfp4"])
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    parser.add_argument("--seconds", type=float, default=200, help="stop trying after this long")
    parser.add_argument("--warm", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    begin = time.time()
    cells = [(*map(int, shape.split("x")), m) for shape in options.shapes for m in options.ms]
    jobs = {each: (cell, each) for cell in cells for each in candidates(*cell, options.kinds)}
    every = sorted(jobs.values(), key=str)
    if options.warm:
        part, parts = options.warm
        for form in options.formats:
            warm(every[part::parts], form)
        return
    warm_aside()
    print(f"{len(every)} launches compiled in {time.time() - begin:.0f} s", flush=True)
    rows = []
    for shape, form in itertools.product(options.shapes, options.formats):
        rows += measure(shape, form, options, begin + options.seconds)
    print(record.write("fp4_tune", rows, folder=options.out))


if __name__ == "__main__":
    main()
