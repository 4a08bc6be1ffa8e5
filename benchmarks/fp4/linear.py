"""A linear over 4-bit weights beside bf16 and beside other libraries': GPU time, by replays of a CUDA graph.

    python benchmarks/fp4/linear.py [--shapes 8192x8192 ...] [--ms 1 16 ...] [--arms NAME ...] [--rounds 5] [--eager] [--small]

A graph holds one call for each copy of the weight, and the copies are several times the cache. Arms are interleaved,
round by round; a figure is the median of the rounds. Every arm's result is first compared with an fp32 product of its own
dequantised weight (ours with `naive.linear` on the same codes): a row whose numbers are wrong reports no speed.
With --eager also the wall time of calls without a graph, host included. `plot.py` draws the file that this writes.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks import record
from benchmarks.fp4 import peers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ("28672x8192", "8192x8192", "14336x4096", "4096x4096", "3072x768")
SMALL_SHAPES = ("96x80", "72x48")
MS = (1, 4, 16, 64, 256, 1024, 4096)
EAGER_UP_TO = 16
# Relative error of the whole, and largest error against the largest value: bf16 rounds to 0.2%, and sums in bf16 lose as much.
LIMITS = (0.01, 0.05)
MEASURE_S, GRAPH_S, EAGER_S = 0.012, 0.2, 0.05
# Speed over bf16 that `ours nvfp4` is to reach on an H200, for M = 1, 16, 64, 256, 1024, 4096.
GOALS = {
    (28672, 8192): (3.1, 2.9, 2.0, 1.0, 0.92, 0.97),
    (8192, 8192): (2.8, 2.6, 1.8, 0.95, 0.90, 0.96),
    (14336, 4096): (2.5, 2.4, 1.6, 0.95, 0.88, 0.95),
    (4096, 4096): (2.0, 1.9, 1.2, 0.9, 0.85, 0.93),
}
GOAL_MS = (1, 16, 64, 256, 1024, 4096)


class Replay:
    """Calls in a CUDA graph, as many as there are copies unless they are slow."""

    def __init__(self, calls, x):
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for call in calls:  # compiles, tunes, and makes each copy's layout
                call(x)
            few = calls[:4]
            one = record.gpu_seconds(lambda: [call(x) for call in few], repeat=1, warm_up=1) / len(few)
        torch.cuda.synchronize()
        calls = calls[: max(2, int(GRAPH_S / one))]
        self.graph, self.count = torch.cuda.CUDAGraph(), len(calls)
        with torch.cuda.graph(self.graph, stream=self.stream):
            for call in calls:
                self.out = call(x)
        self.replays = max(1, round(MEASURE_S / record.gpu_seconds(self.graph.replay, repeat=1, warm_up=1)))

    def seconds(self):
        return record.gpu_seconds(self.graph.replay, repeat=self.replays, warm_up=0) / self.count


class Wall:
    """Calls one after another, timed by the host."""

    def __init__(self, calls, x):
        self.calls, self.x, self.repeat = calls, x, len(calls[:4])
        self.seconds()
        self.repeat = max(20, min(200, int(EAGER_S / self.seconds())))

    def seconds(self):
        synchronize()
        begin = time.perf_counter()
        for i in range(self.repeat):
            self.calls[i % len(self.calls)](self.x)
        self.issued = (time.perf_counter() - begin) / self.repeat
        synchronize()
        return (time.perf_counter() - begin) / self.repeat


@dataclasses.dataclass
class Cell:
    """What one arm shows at one shape and M."""

    errors: tuple[float, float]
    graph: Replay | Wall | None
    wall: Wall | None
    seconds: list[float] = dataclasses.field(default_factory=list)
    wall_seconds: list[float] = dataclasses.field(default_factory=list)
    issued: list[float] = dataclasses.field(default_factory=list)

    def measure(self):
        if self.graph is not None:
            self.seconds.append(self.graph.seconds())
        if self.wall is not None:
            self.wall_seconds.append(self.wall.seconds())
            self.issued.append(self.wall.issued)

    def row(self, base):
        found = {"error": self.errors[0], "error_largest": self.errors[1]}
        if self.seconds:
            us = [1e6 * each for each in self.seconds]
            found |= {"us": statistics.median(us), "us_lowest": min(us), "us_highest": max(us)}
            found["calls_in_graph"] = getattr(self.graph, "count", None)
            if base is not None and base.seconds:
                found["speed"] = statistics.median(base.seconds) / statistics.median(self.seconds)
        if self.wall_seconds:
            found["eager_us"] = 1e6 * statistics.median(self.wall_seconds)
            found["host_us"] = 1e6 * statistics.median(self.issued)
        return found


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def errors(found, expected):
    """The worst of several results: relative error of the whole, and of the worst place against the largest value."""
    differences = [each.float() - expected for each in found]
    whole = torch.stack([each.norm() for each in differences]).max() / expected.norm()
    worst = torch.stack([each.abs().max() for each in differences]).max() / expected.abs().max()
    return float(whole), float(worst)  # a NaN anywhere stays one: torch's max keeps it, Python's may not


def cell(operand, x, *, graph, eager):
    """One arm, compared and ready to be timed: what its first copy gives, its last, and its graph."""
    found, timer = [call(x) for call in (operand.calls[0], operand.calls[-1])], None
    if graph and DEVICE == "cuda":
        timer = Replay(operand.calls, x)
        found.append(timer.out)
    elif graph:
        timer = Wall(operand.calls, x)
    whole, worst = errors(found, operand.product(x))
    if not (whole <= LIMITS[0] and worst <= LIMITS[1]):
        raise ArithmeticError(f"WRONG NUMBERS: relative error {whole:.2g}, largest {worst:.2g}")
    return Cell((whole, worst), timer, Wall(operand.calls, x) if eager else None)


def attempt(function, *arguments, **options):
    """(result, None) or (None, why not): a peer that fails costs its own rows only."""
    try:
        return function(*arguments, **options), None
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is what its row says
        if DEVICE == "cuda":
            torch.cuda.set_stream(torch.cuda.default_stream())  # a capture that fails leaves its own behind
            torch.cuda.synchronize()  # an error that stays with the device ends the run here
        return None, peers.why_of(error)


def weight_of(shape):
    torch.manual_seed(0)
    return torch.randn(shape, device=DEVICE).mul_(0.02).bfloat16()


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
        cells, failed = {}, {}
        for name, operand in operands.items():
            layer = name in peers.LAYERS
            failed[name] = why[name] or broken.get((name, m))
            if failed[name] is None and (eager or not layer):
                cells[name], failed[name] = attempt(cell, operand, x, graph=not layer, eager=eager)
        ready = {name: each for name, each in cells.items() if each is not None}
        for _ in range(options.rounds):
            for each in ready.values():
                each.measure()
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
        ours = [name for name in peers.OURS if name in arms]
        jobs += [(shape, [name], list(ms)) for name in ours]
        if "gemlite mxfp4" in arms:  # its kernels differ below M=64, with M as a constant or not
            groups = [[m] for m in ms if m < 64] + [[m for m in ms if m >= 64]]
            jobs += [(shape, ["gemlite mxfp4"], group) for group in groups if group]

    def one(job):
        shape, names, ms = job
        command = [sys.executable, __file__, "--warm", "--shapes", shape, "--arms", *names, "--ms", *map(str, ms)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)  # noqa: S603
        except subprocess.TimeoutExpired:
            return "its kernels did not compile in 150 s"
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return None if done.returncode == 0 else f"alone in a process (exit {done.returncode}): {last[:300]}"

    broken = {shape: {} for shape in shapes}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for (shape, names, group), why in zip(jobs, pool.map(one, jobs), strict=True):
            if why is not None:
                broken[shape] |= {(name, m): why for name in names for m in group}
    return broken


def table(rows, shape):
    """Speed over bf16, an arm a line and an M a column; the spread is the widest of the line."""
    mine = [row for row in rows if (row["N"], row["K"]) == shape and row["arm"] not in peers.LAYERS]
    ms = sorted({row["M"] for row in mine})
    lines = [f"| {shape[0]} x {shape[1]} | {' | '.join(f'M={m}' for m in ms)} | spread |", "|---" * (len(ms) + 2) + "|"]
    for name in dict.fromkeys(row["arm"] for row in mine):
        by_m = {row["M"]: row for row in mine if row["arm"] == name}
        cells = [_table_cell(by_m.get(m, {}), absolute=name == peers.BASE) for m in ms]
        spreads = [(row["us_highest"] - row["us_lowest"]) / row["us"] for row in by_m.values() if "us" in row]
        lines.append(f"| {name} | {' | '.join(cells)} | {f'{max(spreads):.0%}' if spreads else '-'} |")
        if name == "ours nvfp4" and shape in GOALS:
            goal = dict(zip(GOAL_MS, GOALS[shape], strict=True))
            marks = [_goal(by_m.get(m, {}).get("speed"), goal.get(m)) for m in ms]
            lines.append(f"| (goal) | {' | '.join(marks)} | |")
    lines += [f"{row['arm']}, M={row['M']}: {row['why']}" for row in mine if row.get("why")][:8]
    return "\n".join(lines)


def _table_cell(row, *, absolute):
    if "why" in row:
        return "WRONG" if "WRONG" in row["why"] else "failed"
    if absolute and "us" in row:
        return f"{row['us']:.1f} us"
    return f"{row['speed']:.2f}x" if "speed" in row else "-"


def _goal(speed, goal):
    if goal is None or speed is None:
        return "-" if goal is None else f"{goal}"
    return f"{goal} {'met' if speed >= goal else 'MISSED'}"


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
            print(f"\n{table(rows, shape)}\n{time.perf_counter() - begin:.0f} s", flush=True)
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
    print("\n".join(["", f"cells where a peer is ahead of {peers.OURS[0]}: {len(behind(rows))}", *behind(rows)[:20]]))
    wrong = [row for row in rows if "WRONG" in (row.get("why") or "")]
    print(json.dumps({"rows": len(rows), "wrong": len(wrong), "file": str(path)}))
    if any(row["arm"] in peers.OURS for row in wrong):
        sys.exit("ours gave wrong numbers")


if __name__ == "__main__":
    main()
