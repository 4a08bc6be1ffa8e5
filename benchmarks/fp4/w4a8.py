"""4-bit weights with inputs in FP8 beside 16-bit ones and bf16: GPU time, by replays of a CUDA graph.

    python benchmarks/fp4/w4a8.py [--shapes 8192x8192 ...] [--ms 256 4096 ...] [--arms NAME ...] [--rounds 5] [--small]

Measured as in `linear.py`: a graph holds one call for each copy of the weight, arms take turns round by round, a figure
is the median of the rounds. "ready" is torch's scaled product alone, on operands that are in E4M3 already: what the
rest can reach at best. The parts are what comes before it: x to E4M3, and the weight unpacked to E4M3 in slabs. Every
arm is first compared with its definition: products as in `linear.py`, parts bit for bit; a row with wrong numbers
reports no speed. FP8 is taken here for every number of rows, so that the best `FP8_ROWS` can be read off.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from apt_model.ops import fp4
from apt_model.ops.fp4 import fp8, naive, slab
from benchmarks import record
from benchmarks.fp4 import cells as timed_cells
from benchmarks.fp4 import linear, peers

DEVICE = timed_cells.DEVICE
SHAPES, SMALL_SHAPES = linear.SHAPES[:4], linear.SMALL_SHAPES
MS, SMALL_MS = (256, 512, 1024, 2048, 4096, 8192), (5, 33)
GOAL_M, GOAL = 4096, 1.6


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight [N, K] in one format, and x [M, K]."""

    x: Tensor
    packed: fp4.PackedWeight
    order: fp4.Shuffled

    @property
    def nbytes(self) -> int:
        return self.packed.packed.nbytes + self.packed.scale.nbytes

    def copies(self) -> list[fp4.Shuffled]:
        return [peers._clone(self.order) for _ in range(copies_of(self.nbytes))]


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is timed, each call with a copy of the weight of its own, and what it should give."""

    calls: list[Callable[[Tensor], Tensor]]
    expected: Callable[[], Tensor]
    exact: bool = False


def copies_of(nbytes: int) -> int:
    return peers.copies_of(nbytes, 2 if DEVICE == "cpu" else None)


def dense(case, weight):
    copies = [weight.clone() for _ in range(copies_of(weight.nbytes))]
    return Arm([partial(peers._linear, weight=each) for each in copies], lambda: case.x.float() @ weight.float().mT)


def w4a16(case, _):
    calls = [partial(fp4.linear, weight=each) for each in case.copies()]
    return Arm(calls, lambda: naive.linear(case.x.float(), case.packed))


def w4a8(case, _, *, fast):
    def call(x, weight):
        fp8.FAST_ACCUMULATION = fast
        return fp4.linear(x, weight, activation_dtype="fp8")

    return Arm([partial(call, weight=each) for each in case.copies()], lambda: definition(case))


def definition(case):
    return naive.linear_in_e4m3(case.x.float(), case.packed)


def ready(case, _, *, fast):
    """The product alone, of the whole weight."""
    (x8, scale), unit = naive.rows_in_e4m3(case.x), naive.e4m3_unit(case.packed)
    rest = unit if case.packed.global_scale is None else unit / case.packed.global_scale
    w8 = naive.weight_in_e4m3(case.packed, unit)
    rests = rest.expand(1, len(w8)).contiguous()

    def call(_, weight):
        return torch._scaled_mm(x8, weight.T, scale, rests, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return Arm([partial(call, weight=w8.clone()) for _ in range(copies_of(w8.nbytes))], lambda: definition(case))


def rows_part(case, _):
    """X to E4M3."""
    factor, width = torch.ones(1, device=DEVICE), case.x.shape[1]

    def call(x):
        if DEVICE == "cpu":
            return naive.rows_in_e4m3(x)[0]
        return fp8.quantize_rows(x, factor, min(4096, len(case.packed.packed))).values[:, :width]

    return Arm([call] * 2, lambda: naive.rows_in_e4m3(case.x)[0], exact=True)


def unpack_part(case, _):
    """The whole weight to E4M3, slab by slab, into the same memory."""
    rows, width = case.packed.shape
    unit = naive.e4m3_unit(case.packed)
    height = slab.height(rows, width, 1)
    last = (rows - 1) // height * height
    memory = torch.empty(height, width, dtype=naive.E4M3, device=DEVICE)

    def call(_, weight):
        if DEVICE == "cpu":
            return naive.weight_in_e4m3(case.packed, unit)[last:]
        for first in range(0, rows, height):
            part = slab.unpack(weight._replace(global_scale=weight.alpha[2:]), memory, row=first)
        return part

    calls = [partial(call, weight=each) for each in case.copies()]
    return Arm(calls, lambda: naive.weight_in_e4m3(case.packed, unit)[last:], exact=True)


ARMS = {
    "bf16": ("nvfp4", dense),
    "W4A16 nvfp4": ("nvfp4", w4a16),
    "W4A8 nvfp4, fast sums": ("nvfp4", partial(w4a8, fast=True)),
    "W4A8 nvfp4, fp32 sums": ("nvfp4", partial(w4a8, fast=False)),
    "W4A8 mxfp4, fast sums": ("mxfp4", partial(w4a8, fast=True)),
    "W4A8 mxfp4, fp32 sums": ("mxfp4", partial(w4a8, fast=False)),
    "ready, fast sums": ("nvfp4", partial(ready, fast=True)),
    "ready, fp32 sums": ("nvfp4", partial(ready, fast=False)),
    "part: x": ("nvfp4", rows_part),
    "part: unpack nvfp4": ("nvfp4", unpack_part),
    "part: unpack mxfp4": ("mxfp4", unpack_part),
}
BASE = "bf16"


def ready_to_time(build, case, weight):
    """An arm's timer, and how far it is from what it should give."""
    arm = build(case, weight)
    limits = (0, 0) if arm.exact else timed_cells.LIMITS
    made = timed_cells.cell(arm.calls, case.x, lambda: arm.expected().float(), limits=limits)
    made.graph.operands = arm  # a replay reads the memory that its calls were recorded with
    return made


def measure_shape(shape, options):
    weight, rows = timed_cells.weight_of(shape), []
    held = {}
    for form in ("nvfp4", "mxfp4"):
        packed = fp4.quantize(weight, form)
        held[form] = (packed, fp4.shuffle_if_reversible(packed, weight.dtype))
    for m in options.ms:
        x = torch.randn(m, shape[1], device=DEVICE).bfloat16()
        cells, failed = {}, {}
        for name in options.arms:
            form, build = ARMS[name]
            cells[name], failed[name] = timed_cells.attempt(ready_to_time, build, Case(x, *held[form]), weight)
        timed = {name: each for name, each in cells.items() if each is not None}
        timed_cells.measure(timed, options.rounds)
        for name in options.arms:
            row = {"N": shape[0], "K": shape[1], "M": m, "arm": name}
            if name in timed:
                row |= timed[name].row(None if name.startswith("part") else timed.get(BASE))
                if not name.startswith("part"):
                    row["tflops"] = 2e-6 * m * shape[0] * shape[1] / row["us"]
            else:
                row["why"] = failed[name]
            rows.append(row)
        cells.clear()
        timed.clear()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return rows


def table(rows, shape):
    """Speed over bf16 (parts and bf16: microseconds), an arm a line and an M a column."""
    lines = [timed_cells.table(rows, shape, in_us=[name for name in ARMS if name == BASE or name.startswith("part")])]
    for row in rows:
        is_meant = (row["N"], row["K"], row["M"]) == (*shape, GOAL_M) and f"{shape[0]}x{shape[1]}" in SHAPES
        if is_meant and row["arm"].startswith("W4A8") and "speed" in row:
            verdict = "met" if row["speed"] >= GOAL else "MISSED"
            lines.append(f"{row['arm']}, M={GOAL_M}: goal {GOAL} {verdict} ({row['speed']:.2f})")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", help=f"N x K; default {' '.join(SHAPES)}")
    parser.add_argument("--ms", nargs="*", type=int, help=f"rows of x; default {' '.join(map(str, MS))}")
    parser.add_argument("--arms", nargs="*", help=f"of {', '.join(ARMS)}; bf16 is always measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to check the script without a GPU")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    options = parser.parse_args()
    if unknown := [name for name in options.arms or () if name not in ARMS]:
        parser.error(f"--arms: expected some of {list(ARMS)}, got {unknown}")
    options.arms = list(dict.fromkeys((BASE, *(options.arms or ARMS))))
    options.ms = options.ms or (SMALL_MS if options.small else MS)
    shapes = [
        tuple(map(int, name.split("x"))) for name in options.shapes or (SMALL_SHAPES if options.small else SHAPES)
    ]
    fp8.FP8_ROWS = 1
    begin, rows = time.perf_counter(), []
    with torch.no_grad():
        for shape in shapes:
            rows += measure_shape(shape, options)
            print(f"\n{table(rows, shape)}\n{time.perf_counter() - begin:.0f} s", flush=True)
            path = record.write("fp4_w4a8", rows, folder=options.out)  # after every shape: a later one may fail
    wrong = [row for row in rows if "WRONG" in (row.get("why") or "")]
    print(json.dumps({"rows": len(rows), "wrong": len(wrong), "file": str(path)}))
    if wrong:
        sys.exit("wrong numbers")


if __name__ == "__main__":
    main()
