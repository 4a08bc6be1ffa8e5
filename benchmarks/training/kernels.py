"""Where a training step's GPU time goes, by kind of kernel: a companion of throughput.py.

python benchmarks/training/kernels.py "nn.Transformer" "APT plain" "APT, all on" [--eager] [--top 20]
"""

import argparse
import collections
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.profiler import ProfilerActivity

from benchmarks.training.throughput import SMALL, Arm, Shape, warm_caches

KINDS = {
    "matrix product": ("gemm", "nvjet", "cutlass", "cublas", "sm90_xmma", "splitK"),
    "attention": ("flash", "fmha", "cudnn"),
    "optimizer": ("FusedAdam", "multi_tensor", "foreach"),
    "compiled": ("triton_",),
}


def kind(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def profile(arm: Arm, steps: int, top: int) -> None:
    for _ in range(3):
        arm.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            arm.step()
        torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total: dict[str, float] = collections.defaultdict(float)
    for event in kernels:
        total[kind(event.key)] += event.self_device_time_total / steps / 1e3
    print(
        f"== {arm.name}: {sum(total.values()):.1f} ms  " + "  ".join(f"{k} {v:.2f}" for k, v in sorted(total.items()))
    )
    for event in kernels[:top]:
        each = event.self_device_time_total / event.count
        print(
            f"{event.self_device_time_total / steps / 1e3:8.3f} ms {event.count // steps:5d} x {each:8.1f} us  {event.key[:110]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--top", type=int, default=20)
    options = parser.parse_args()
    if not options.eager:
        warm_caches(options.arms, ["--small"] if options.small else [])
    for name in options.arms:
        arm = Arm(name, SMALL if options.small else Shape(), compiled=not options.eager)
        profile(arm, 3, options.top)
        del arm
        torch.compiler.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
