"""A linear over 4-bit weights beside bf16 and beside other libraries': GPU time, by replays of a CUDA graph.

    python benchmarks/fp4/linear.py [--shapes 8192x8192 ...] [--ms 1 16 ...] [--arms NAME ...] [--rounds 5] [--eager] [--small]

A graph holds one call for each copy of the weight, and the copies are several times the cache. Arms are interleaved,
round by round; a figure is the median of the rounds. Every arm's result is first compared with an fp32 product of its own
dequantised weight (ours with `naive.linear` on the same codes): a row whose numbers are wrong reports no speed.
With --eager also the wall time of calls without a graph, host included. `plot.py` draws the file that this writes.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks import record
from benchmarks.fp4 import peers
from benchmarks.fp4.cells import (
    DEVICE,
    attempt,
    goals_note,
    in_processes,
    measure,
    ready_cells,
    summary,
    synchronize,
    table,
    weight_of,
)

SHAPES = ("28672x8192", "8192x8192", "14336x4096", "4096x4096", "3072x768")
SMALL_SHAPES = ("96x80", "72x48")
MS = (1, 4, 16, 64, 256, 1024, 4096)
EAGER_UP_TO = 16
# Speed over bf16 that `ours nvfp4` is to reach on an H200, for M = 1, 16, 64, 256, 1024, 4096.
GOAL_MS = (1, 16, 64, 256, 1024, 4096)
GOALS = {
    shape: dict(zip(GOAL_MS, speeds, strict=True))
    for shape, speeds in {
        (28672, 8192): (3.1, 2.9, 2.0, 1.0, 0.92, 0.97),
        (8192, 8192): (2.8, 2.6, 1.8, 0.95, 0.90, 0.96),
        (14336, 4096): (2.5, 2.4, 1.6, 0.95, 0.88, 0.95),
        (4096, 4096): (2.0, 1.9, 1.2, 0.9, 0.85, 0.93),
    }.items()
}


def measure_shape(shape, options, broken):
    """All arms at all M of one [N, K]."""
    weight, rows = weight_of(shape), []
    builders = {name: peers.ARMS[name] for name in options.arms} | (peers.LAYERS if options.eager else {})
    operands, why = {}, {}
    for name, build in builders.items():
        operands[name], why[name] = attempt(build, weight, 2 if DEVICE == "cpu" else None)
    del weight
    for m in options.ms:
        x = torch.randn(m, shape[1], device=DEVICE).bfloat16()
        eager = options.eager and m <= EAGER_UP_TO
        failed = {name: why[name] or broken.get((name, m)) for name in operands}
        wanted = {name: operand for name, operand in operands.items() if eager or name not in peers.LAYERS}
        ready = ready_cells(wanted, x, failed, layers=peers.LAYERS, eager=eager)
        measure(ready, options.rounds)
        for name in builders:
            if name in peers.LAYERS and not eager:
                continue
            row = {"N": shape[0], "K": shape[1], "M": m, "arm": name}
            if name in ready:
                row |= ready[name].row(ready.get(peers.BASE))
                row |= {"copies": len(operands[name].calls), "bytes": operands[name].nbytes}
                row["weight_error"] = operands[name].weight_error
                if "us" in row:
                    moved = row["bytes"] + x.nbytes + 2 * m * shape[0]
                    row["bytes_per_s"] = 1e6 * moved / row["us"]
                    row["tflops"] = 2e-6 * m * shape[0] * shape[1] / row["us"]
            else:
                row["why"] = failed[name]
            rows.append(row)
        if m in peers.MARLIN.get(shape, {}):
            row = {"N": shape[0], "K": shape[1], "M": m, "arm": "Marlin int4", "speed": peers.MARLIN[shape][m]}
            rows.append(row | {"quoted": "an earlier run of another program on an NVIDIA H200, fp16"})
    return rows


def warm(shape, names, ms):
    """What a process of its own does: compile every kernel into the cache on disk, and see whether it runs at all."""
    weight = weight_of(shape)
    with torch.no_grad():
        for name in names:
            operand = peers.ARMS[name](weight, 1)
            if name.startswith("gemlite"):
                peers._tune_briefly(compile_only=True)
            for m in ms:
                operand.calls[0](torch.randn(m, shape[1], device=DEVICE).bfloat16())
    synchronize()


def warm_caches(shapes, arms, ms):
    """Run `warm` for the arms that compile, side by side -> {shape: {(arm, M): why it cannot run}}."""
    jobs = []
    for shape in shapes:
        jobs += [(shape, name, list(ms)) for name in peers.OURS if name in arms]
        if "gemlite mxfp4" in arms and importlib.util.find_spec("gemlite"):
            # Its kernels differ below M=64, with M as a constant or not.
            groups = [[m] for m in ms if m < 64] + [[m for m in ms if m >= 64]]
            jobs += [(shape, "gemlite mxfp4", group) for group in groups if group]
    commands = [("--warm", "--shapes", shape, "--arms", name, "--ms", *group) for shape, name, group in jobs]
    broken = {shape: {} for shape in shapes}
    for (shape, name, group), why in zip(jobs, in_processes(__file__, commands), strict=True):
        if why is not None:
            broken[shape] |= {(name, m): why for m in group}
    return broken


def eager_table(rows):
    """Wall time of a call without a graph; the ratio is to the bf16 twin at the same shape and M."""
    timed = {(row["N"], row["K"], row["M"], row["arm"]): row for row in rows if "eager_us" in row}
    lines = ["| eager call | N x K | M | us | host us | over bf16 |", "|---|---|---|---|---|---|"]
    for (n, k, m, name), row in timed.items():
        twin = "nn.Linear" if name in peers.LAYERS else peers.BASE
        ratio = row["eager_us"] / timed[n, k, m, twin]["eager_us"] if (n, k, m, twin) in timed else float("nan")
        if name in (*peers.OURS, *peers.LAYERS, peers.BASE):
            lines.append(f"| {name} | {n} x {k} | {m} | {row['eager_us']:.1f} | {row['host_us']:.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def behind(rows):
    """Cells where some peer is faster than `ours nvfp4`."""
    speeds = {(row["N"], row["K"], row["M"], row["arm"]): row["speed"] for row in rows if "speed" in row}
    found = []
    for (n, k, m, name), speed in speeds.items():
        own = speeds.get((n, k, m, peers.OURS[0]))
        if own is not None and name not in (peers.BASE, *peers.OURS) and speed > own:
            found.append(f"{n}x{k} M={m}: {name} {speed:.2f}x, ours {own:.2f}x")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", help=f"N x K; default {' '.join(SHAPES)}")
    parser.add_argument("--ms", nargs="*", type=int, help=f"rows of x; default {' '.join(map(str, MS))}")
    parser.add_argument("--arms", nargs="*", help=f"of {', '.join(peers.ARMS)}; bf16 is always measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help=f"wall time of eager calls too, up to M={EAGER_UP_TO}")
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes and our arms, to check the script without a GPU"
    )
    parser.add_argument("--no-warm", action="store_true", help="do not compile in processes of their own first")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.arms = options.arms or list((peers.BASE, *peers.OURS) if options.small else peers.ARMS)
    options.ms = options.ms or ((1, 5, 33) if options.small else MS)
    names = options.shapes or (SMALL_SHAPES if options.small else SHAPES)
    if unknown := [name for name in options.arms if name not in peers.ARMS]:
        parser.error(f"--arms: expected some of {list(peers.ARMS)}, got {unknown}")
    shapes = {name: tuple(map(int, name.split("x"))) for name in names}
    if options.warm:
        warm(*shapes.values(), options.arms, options.ms)
        return
    options.arms = list(dict.fromkeys((peers.BASE, *options.arms)))
    begin = time.perf_counter()
    broken = {name: {} for name in shapes}
    if DEVICE == "cuda" and not options.no_warm:
        broken = warm_caches(shapes, options.arms, options.ms)
        print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    rows = []
    with torch.no_grad():
        for name, shape in shapes.items():
            rows += measure_shape(shape, options, broken[name])
            functions = [row for row in rows if row["arm"] not in peers.LAYERS]
            took = f"{time.perf_counter() - begin:.0f} s"
            print(f"\n{table(functions, shape, GOALS.get(shape))}\n{took}", flush=True)
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
            path = record.write("fp4_linear", rows, folder=options.out)  # after every shape: a later one may fail
    if options.eager:
        print(f"\n{eager_table(rows)}")
        print(
            "\n".join(
                dict.fromkeys(
                    f"{row['arm']}: {row['why']}" for row in rows if row["arm"] in peers.LAYERS and "why" in row
                )
            )
        )
    ahead = behind(rows)
    print("\n".join(["", f"cells where a peer is ahead of {peers.OURS[0]}: {len(ahead)}", *ahead[:20], ""]))
    print(*(summary(rows, name, GOALS) for name in peers.OURS if name in options.arms), sep="\n\n")
    print(goals_note())
    wrong = [row for row in rows if "WRONG" in (row.get("why") or "")]
    print(json.dumps({"rows": len(rows), "wrong": len(wrong), "file": str(path)}))
    if any(row["arm"] in peers.OURS for row in wrong):
        sys.exit("ours gave wrong numbers")


if __name__ == "__main__":
    main()
