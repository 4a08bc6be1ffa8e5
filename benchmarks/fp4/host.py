"""What an eager call costs the host: microseconds to issue it, the device not waited for.

    python benchmarks/fp4/host.py [--shapes 4096x4096 ...] [--ms 1 16 256] [--bias] [--rounds 15] [--profile] [--small]

Shapes are N x K. A burst is `--calls` calls, fewer launches than the driver's queue holds, and then the device is waited
for; arms are interleaved round by round, and a figure is the median of the rounds' means (and the lowest). Beside the
layers: the operation alone, the launch alone, and the same launch by Triton's launcher. `slab` arms are the way for many
rows, fp32 and gradients, here at M = 16. With --profile also where the time of the layer goes, by cProfile, which makes
Python's part look larger than it is.
"""

import argparse
import cProfile
import gc
import pstats
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from torch import nn

from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.ops import fp4
from apt_model.ops.fp4 import compiled, launch, slab
from apt_model.ops.fp4.counters import take
from benchmarks import record

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPES, SMALL_SHAPES = ("4096x4096", "768x3072"), ("96x128",)
MS = (1, 16, 256)
SLAB_M = 16
GOAL = 1.3


def arms(rows, width, m, *, bias):
    """Name -> call, for one shape and M."""
    linear = nn.Linear(width, rows, bias=bias, device=DEVICE, dtype=torch.bfloat16)
    layer = FusedFP4Linear.from_linear(linear)
    x = torch.randn(m, width, device=DEVICE, dtype=torch.bfloat16)
    layer(x)
    order, given = layer.operand("weight", torch.bfloat16), linear.bias
    found = {
        "nn.Linear": lambda: linear(x),
        "FusedFP4Linear": lambda: layer(x),
        "F.linear": lambda: F.linear(x, linear.weight, given),
        "ops.fp4.linear": lambda: fp4.linear(x, order, given),
    }
    if isinstance(order, fp4.Shuffled):
        found |= launches(x, order, given)
        if m == SLAB_M:
            wide = x.float()
            found["slab.linear"] = lambda: slab.linear(x, order, given, None)
            found["FusedFP4Linear, fp32 x"] = lambda: layer(wide)
    else:
        print("launches alone need a CUDA device on which there are kernels")
    return found


def launches(x, order, bias):
    """The launch of a product by itself, into memory that is there."""
    setting = launch.choose(len(x), order, x.dtype)
    if setting is None:
        return {}
    for _ in range(2):
        launch.run(x, order, bias, None, setting)
    plan = launch._plan_of(x, order, bias, None, setting)
    go = plan.launch
    kernel, direct = go.kernel, go.direct
    out = x.new_empty(plan.shape)
    sums = x.new_empty(plan.sums, dtype=torch.float32) if plan.sums else None
    counters = take(plan.counters, order.counters, go.index)
    tensors = (x, order.words, order.scales, order.alpha, bias, out, sums, counters)

    def by_triton():
        first = [kernel.described(i, tensors[i], view) for i, view in enumerate(go.views)]
        kernel(go.grid, *first, *tensors[len(first) :], *go.numbers)

    found = {"launch.run": lambda: launch.run(x, order, bias, None, setting), "Triton's launcher": by_triton}
    if direct is None:
        print(f"no direct launch: {kernel.fault}")
        return found
    pointers = [each.data_ptr() for each in tensors if each is not None]
    for i, maps in enumerate(direct._maps):
        pointers[i] = maps.found[pointers[i]]
    stream = torch.cuda.current_stream().cuda_stream
    return found | {
        "direct launch": lambda: direct(tensors),
        "the driver's part of it": lambda: direct._launch(stream, pointers),
    }


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def burst(call, calls):
    """Seconds to issue one call, the mean of a burst."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    issued = (time.perf_counter() - begin) / calls
    synchronize()
    return issued


def measure(found, calls, rounds):
    """Name -> microseconds, one for each round."""
    for call in found.values():
        burst(call, calls)
    times = {name: [] for name in found}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in found.items():
                times[name].append(burst(call, calls) * 1e6)
    finally:
        gc.enable()
    return times


def profile(call, calls, bursts):
    """Print where the time of a call goes."""
    profiler = cProfile.Profile()
    for _ in range(bursts):
        synchronize()
        profiler.enable()
        for _ in range(calls):
            call()
        profiler.disable()
    print(f"{calls * bursts} calls:")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--ms", nargs="+", type=int, default=MS)
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--small", action="store_true", help="to see that it runs; writes nothing without --out")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    options = parser.parse_args()
    calls, rounds = (5, 2) if options.small else (options.calls, options.rounds)
    results = []
    with torch.no_grad():
        for shape in options.shapes or (SMALL_SHAPES if options.small else SHAPES):
            rows, width = map(int, shape.split("x"))
            for m in options.ms:
                found = arms(rows, width, m, bias=options.bias)
                times = measure(found, calls, rounds)
                base = statistics.median(times["nn.Linear"])
                for name, each in times.items():
                    us, lowest = statistics.median(each), min(each)
                    results.append({
                        "shape": shape, "m": m, "bias": options.bias, "arm": name, "host_us": us, "lowest_us": lowest,
                        "ratio_to_nn_linear": us / base,
                    })  # fmt: skip
                    goal = f", goal {GOAL}" if name == "FusedFP4Linear" else ""
                    print(
                        f"{shape:>10} M={m:<4} {name:24} {us:7.2f} us (lowest {lowest:6.2f}), {us / base:5.2f}x{goal}",
                        flush=True,
                    )
                if options.profile:
                    profile(found["FusedFP4Linear"], calls, 2 if options.small else 50)
    for each in compiled._known.values():
        if isinstance(each, compiled.Compiled):
            print(f"{each.function.fn.__name__}: direct unless: {each.fault}; {each.by_triton} launches by Triton")
    if options.out or not options.small:
        print(record.write("fp4_host" + "_bias" * options.bias, results, folder=options.out))


if __name__ == "__main__":
    main()
