"""Quantising a thousand million weights on a GPU, matrix by matrix: the kernel, what `quantize` takes, and the definition.

    python benchmarks/fp4/quantize.py [--small] [--out FOLDER]

Distinct matrices of 8192 x 4096, as many as make 1e9 weights: far more than a cache. `quantize` is the whole call, with
its two reads for the largest weight and its wait for the answer; `kernel` is the launch alone. The kernel's bytes are
compared with the definition's in the same run, on the first matrix on the GPU and on some of its rows on the CPU. Bytes
are what must move: the weight read once, codes and scales written once. With --small and no GPU the kernel runs in
Triton's interpreter, which checks the script and measures nothing.
"""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from apt_model.ops.fp4 import fused_quantize, get_format, quantize
from benchmarks import record

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEFINITION = sys.modules["apt_model.ops.fp4.quantize"]
ROWS, WIDTH, WEIGHTS, GOAL_S = 8192, 4096, 1e9, 0.5
ROWS_ON_CPU = 64


class Case:
    """Matrices of one type in one format, with room for the kernel's results."""

    def __init__(self, name, dtype, *, weighted, small):
        self.form, (rows, width) = get_format(name), (12, 200) if small else (ROWS, WIDTH)
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.weights = [
            torch.randn(rows, width, device=DEVICE, generator=generator, dtype=torch.float32).to(dtype) * 0.02
            for _ in range(2 if small else -int(-WEIGHTS // (rows * width)))
        ]
        self.importance = torch.rand(width, device=DEVICE, generator=generator) if weighted else None
        made = quantize(self.weights[0], name, importance=self.importance)
        self.packed, self.scale, self.divisor = made.packed, made.scale.view(torch.uint8), made.global_scale
        self.cost = None if self.importance is None else DEFINITION._cost(self.importance, self.weights[0], self.form)
        self.moved = sum(each.nbytes for each in self.weights) + len(self.weights) * (
            self.packed.nbytes + self.scale.nbytes
        )

    def quantize(self):
        for weight in self.weights:
            quantize(weight, self.form.name, importance=self.importance)

    def kernel(self):
        for weight in self.weights:
            self.launch(weight)

    def launch(self, weight):
        window = DEFINITION.WINDOWS[self.form.name]
        fused_quantize.quantize_rows(weight, self.form, window, self.divisor, self.cost, self.packed, self.scale)

    def definition(self):
        step = max(1, DEFINITION.SLAB_WEIGHTS // self.weights[0].shape[1])
        for weight in self.weights:
            for slab in weight.split(step):
                DEFINITION.quantize_rows(slab, self.form, self.divisor, self.cost)

    def check(self):
        """Raise `AssertionError` where the kernel's bytes are not the definition's."""
        self.packed.fill_(0xA5)
        self.scale.fill_(0xA5)
        self.launch(self.weights[0])
        for device, rows in ((DEVICE, None), ("cpu", ROWS_ON_CPU)):
            weight, divisor, cost = (
                None if each is None else each.to(device) for each in (self.weights[0][:rows], self.divisor, self.cost)
            )
            expected = DEFINITION.quantize_rows(weight, self.form, divisor, cost)
            for got, wanted in zip((self.packed, self.scale), expected, strict=True):
                assert torch.equal(got[:rows].to(device), wanted), f"not the definition's on {device}"


def seconds(call):
    if DEVICE == "cuda":
        return record.gpu_seconds(call, repeat=3, warm_up=1)
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two tiny matrices, to check the script; needs no GPU")
    parser.add_argument(
        "--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>, none if small"
    )
    options = parser.parse_args()
    if DEVICE == "cpu":
        if not options.small:
            parser.error("needs a GPU; --small checks the script without one")
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is first imported
    table = []
    for name, dtype, weighted in itertools.product(("nvfp4", "mxfp4"), (torch.bfloat16, torch.float32), (False, True)):
        case = Case(name, dtype, weighted=weighted, small=options.small)
        case.check()
        for arm in ("kernel", "quantize", "definition"):
            taken = seconds(getattr(case, arm)) / sum(each.numel() for each in case.weights)
            row = {
                "arm": arm, "format": name, "weight": str(dtype), "importance": weighted,
                "s_per_1e9": taken * 1e9, "goal_s_per_1e9": GOAL_S,
                "bytes_per_s": case.moved / sum(each.numel() for each in case.weights) / taken,
            }  # fmt: skip
            table.append(row)
            print(
                f"{name} {str(dtype)[6:]:8s} {'weighted' if weighted else '':8s} {arm:10s} "
                f"{row['s_per_1e9']:9.4f} s per 1e9 weights, {row['bytes_per_s'] / 1e12:.3f} TB/s"
            )
        del case
    if options.out or not options.small:
        print(record.write("fp4_quantize", table, folder=options.out))


if __name__ == "__main__":
    main()
