"""What the benchmarks of FP4 products share: calls compared first, then timed in turns, by replays of a CUDA graph."""

import concurrent.futures
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from functools import partial

import torch

from benchmarks import record
from benchmarks.fp4 import peers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative error of the whole, and largest error against the largest value: bf16 rounds to 0.2%, and sums in bf16 lose as much.
LIMITS = (0.01, 0.05)
MEASURE_S, GRAPH_S, EAGER_S = 0.012, 0.2, 0.05


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


def cell(calls, x, expected, *, limits=LIMITS, graph=True, eager=False):
    """One arm, compared and ready to be timed: what its first copy gives, its last, and its graph. `expected` is called."""
    found, timer = [call(x) for call in (calls[0], calls[-1])], None
    if graph and DEVICE == "cuda":
        timer = Replay(calls, x)
        found.append(timer.out)
    elif graph:
        timer = Wall(calls, x)
    whole, worst = errors(found, expected())
    if not (whole <= limits[0] and worst <= limits[1]):
        raise ArithmeticError(f"WRONG NUMBERS: relative error {whole:.2g}, largest {worst:.2g}")
    return Cell((whole, worst), timer, Wall(calls, x) if eager else None)


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


def ready_cells(operands, x, failed, *, layers=(), eager=False):
    """Arm -> its cell, of those that work; `failed` has why not and is told of more. Layers are timed by the host only."""
    cells = {}
    for name, operand in operands.items():
        if failed.get(name) is None:
            expected = partial(operand.product, x)
            made, failed[name] = attempt(cell, operand.calls, x, expected, graph=name not in layers, eager=eager)
            cells |= {} if made is None else {name: made}
    return cells


def measure(cells, rounds):
    """In turns, so that what changes with time changes for all."""
    for _ in range(rounds):
        for each in cells.values():
            each.measure()


def in_processes(script, jobs, *, seconds=150, workers=None):
    """Run `script` once for each list of arguments, side by side -> why each failed, or None.

    Such a process compiles its kernels into the cache on disk, and shows whether they run at all.
    """

    def one(job):
        try:
            done = subprocess.run(  # noqa: S603
                [sys.executable, script, *map(str, job)], capture_output=True, text=True, check=False, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return f"its kernels did not compile in {seconds} s"
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return None if done.returncode == 0 else f"alone in a process (exit {done.returncode}): {last[:300]}"

    with concurrent.futures.ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, jobs))


def table(rows, shape, goals=None, *, in_us=(peers.BASE,)):
    """Speed over bf16, an arm a line and an M a column; the spread is the widest of the line. `goals` are M -> speed.

    Arms `in_us` show their microseconds instead.
    """
    mine = [row for row in rows if (row["N"], row["K"]) == shape]
    ms = sorted({row["M"] for row in mine})
    lines = [f"| {shape[0]} x {shape[1]} | {' | '.join(f'M={m}' for m in ms)} | spread |", "|---" * (len(ms) + 2) + "|"]
    for name in dict.fromkeys(row["arm"] for row in mine):
        by_m = {row["M"]: row for row in mine if row["arm"] == name}
        shown = [_shown(by_m.get(m, {}), absolute=name in in_us) for m in ms]
        spreads = [(row["us_highest"] - row["us_lowest"]) / row["us"] for row in by_m.values() if "us" in row]
        lines.append(f"| {name} | {' | '.join(shown)} | {f'{max(spreads):.0%}' if spreads else '-'} |")
        if name == peers.OURS[0] and goals:
            marks = [_goal(by_m.get(m, {}).get("speed"), goals.get(m)) for m in ms]
            lines.append(f"| (goal) | {' | '.join(marks)} | |")
    return "\n".join([*lines, *reasons(mine)])


def _shown(row, *, absolute):
    if "why" in row:
        return "WRONG" if "WRONG" in row["why"] else "failed"
    if absolute and "us" in row:
        return f"{row['us']:.1f} us"
    return f"{row['speed']:.2f}x" if "speed" in row else "-"


def _goal(speed, goal):
    if goal is None or speed is None:
        return "-" if goal is None else f"{goal}"
    return f"{goal} {'met' if speed >= goal else 'MISSED'}"


def reasons(rows):
    """Why arms have no figures: each reason once, with the M that it holds for."""
    found = {}
    for row in rows:
        if row.get("why"):
            found.setdefault((row["arm"], row["why"]), []).append(row["M"])
    lines = [f"{arm}, M={', '.join(map(str, dict.fromkeys(ms)))}: {why}" for (arm, why), ms in found.items()]
    return lines[:8]


def summary(rows, arm, goals):
    """Speed of one arm over bf16, a shape a line and an M a column, with the goals that there are: (N, K) -> M -> speed."""
    mine = {(row["N"], row["K"], row["M"]): row for row in rows if row["arm"] == arm}
    ms = sorted({m for _, _, m in mine})
    lines = [f"| {arm}, speed over bf16 | {' | '.join(f'M={m}' for m in ms)} |", "|---" * (len(ms) + 1) + "|"]
    for n, k in dict.fromkeys((n, k) for n, k, _ in mine):
        shown = []
        for m in ms:
            row, goal = mine.get((n, k, m), {}), goals.get((n, k), {}).get(m)
            speed = row.get("speed")
            text = _shown(row, absolute=False) if speed is None else f"{speed:.2f}"
            met = goal is not None and speed is not None and speed >= goal
            shown.append((f"**{text}**" if met else text) + (f" ({goal})" if goal is not None else ""))
        lines.append(f"| {n} x {k} | {' | '.join(shown)} |")
    return "\n".join(lines)


def goals_note(card="H200"):
    """For whom the goals are."""
    device = record.machine()["device"]
    return f"goals in brackets, those met in bold{'' if card in device else f'; they are for an NVIDIA {card}, this is {device}'}"
