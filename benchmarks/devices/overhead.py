"""What a call of the device manager costs over torch's function that it ends in, and what choosing a device costs.

PYTHONPATH=. python benchmarks/devices/overhead.py                  # on the device that "auto" means
PYTHONPATH=. python benchmarks/devices/overhead.py --built npu      # on the one that tests build, by a vendor's name
PYTHONPATH=. python benchmarks/devices/overhead.py --folder amd-epyc-2-cores    # to benchmarks/results/<folder>/
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import timeit
from pathlib import Path

import torch

from apt_model.core.system import get_device, get_device_manager
from benchmarks import record

ROOT = Path(__file__).parents[2]
GOAL_CALL_US, GOAL_AUTO_MS = 1.0, 5.0
ROUNDS, CALLS = 31, 5000
# Method of the manager -> function of torch's module for the device.
CALLED = {
    "synchronize": "synchronize",
    "memory_allocated": "memory_allocated",
    "peak_memory": "max_memory_allocated",
    "reset_peak_memory": "reset_peak_memory_stats",
    "empty_cache": "empty_cache",
    "current_stream": "current_stream",
    "current_index": "current_device",
}


def microseconds(*calls):
    """Of each call, the median over rounds in which they take turns."""
    times = [[] for _ in calls]
    for _ in range(ROUNDS):
        for each, call in zip(times, calls, strict=True):
            each.append(timeit.timeit(call, number=CALLS) / CALLS * 1e6)
    return [statistics.median(each) for each in times]


def rows(device):
    module = torch.get_device_module(device.kind)
    found = []
    for method, name in CALLED.items():
        raw = getattr(module, name, None)
        if raw is None:
            continue
        managed = getattr(device, method)
        if method != "current_index":  # which touches no device where the number is known
            managed()
        own, through = microseconds(raw, managed)
        over = through - own
        found.append({
            "call": method, "torch": f"torch.{device.kind}.{name}", "torch_us": round(own, 3),
            "manager_us": round(through, 3), "over_us": round(over, 3), "goal_us": GOAL_CALL_US,
            "met": over <= GOAL_CALL_US,
        })  # fmt: skip
    return found


def choosing():
    """The first choice of a process, in processes of their own with torch loaded, and all later ones."""
    code = (
        "import time, torch\nfrom apt_model.core.system import manager\nbegin = time.perf_counter()\n"
        "manager.get_device()\nprint(time.perf_counter() - begin)"
    )
    command = [sys.executable, "-c", code]
    cold = [float(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(5)]  # noqa: S603
    get_device()
    warm = microseconds(get_device)[0]
    begin = time.perf_counter()
    worst = 0.0
    while time.perf_counter() - begin < 1:
        start = time.perf_counter()
        get_device()
        worst = max(worst, time.perf_counter() - start)
    return {
        "call": "get_device('auto')", "warm_us": round(warm, 2), "worst_in_a_second_us": round(worst * 1e6, 1),
        "cold_ms": [round(each * 1e3, 1) for each in cold], "goal_ms": GOAL_AUTO_MS, "met": warm / 1e3 <= GOAL_AUTO_MS,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", choices=("npu", "hpu"))
    parser.add_argument("--folder")
    options = parser.parse_args()
    if options.built and "APT_TEST_DEVICE_LIBRARY" not in os.environ:
        sys.path.insert(0, str(ROOT / "tests" / "backend"))
        import built_device

        command = [sys.executable, *sys.argv]
        raise SystemExit(subprocess.run(command, env=built_device.environment(options.built), check=False).returncode)  # noqa: S603
    device = get_device_manager()
    found = [*rows(device), choosing()]
    for row in found:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if options.folder:
        above = record.header()
        above["machine"]["device"] = f"{device.name()} ({device.kind})"
        name = "device_overhead" + (f"_built_{options.built}" if options.built else "")
        print(record.write(name, found, folder=ROOT / "benchmarks" / "results" / options.folder, above=above))


if __name__ == "__main__":
    main()
