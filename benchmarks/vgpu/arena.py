"""Host memory until it is ready to be copied from, and what a GPU then copies: the arena beside torch's allocator.

    python benchmarks/vgpu/arena.py [--gib 8] [--repeat 3] [--small] [--out FOLDER]

Ready is: its pages are there, and pinned. `arena` asks for huge pages and `arena-small-pages` does not; each is a fresh
one every time, prepared in full. `torch` is `torch.empty(pin_memory=True)` with its cache emptied before, and
`torch-plain` pageable memory written once; the arms alternate. Beyond that a GPU copies one GiB pieces to itself from
each, by events. Without a GPU --small prepares a little and leaves out what is pinned.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from apt_model.core.system.cuda import CudaDevice
from apt_model.vgpu import host_pages
from apt_model.vgpu.arena import DevicePin, HostArena
from apt_model.vgpu.units import padded
from benchmarks import record

CUDA = torch.cuda.is_available()
GIB = 2**30
ARMS = ("arena", "arena-small-pages", "torch", "torch-plain")


def ready(arm, size, threads):
    """Seconds until memory is ready, a tensor of all of it, and what closes it."""
    begin = time.perf_counter()
    if arm.startswith("torch"):
        tensor = torch.empty(size, dtype=torch.uint8, pin_memory=arm == "torch")
        if arm == "torch-plain":
            tensor.fill_(0)
        return time.perf_counter() - begin, tensor, lambda: None
    asked = host_pages._HUGE
    host_pages._HUGE = None if arm == "arena-small-pages" else asked
    try:
        arena = HostArena(size, pin=DevicePin(CudaDevice()) if CUDA else None, threads=threads)
        arena.prepare(size)
    finally:
        host_pages._HUGE = asked
    taken = time.perf_counter() - begin
    assert arena.pinned_bytes == (size if CUDA else 0), "the driver refused to pin"
    # Regions lie in one segment each: the first is as good as all.
    return taken, arena.take(min(size, 8 * GIB)).tensor, arena.close


def copied(tensor):
    """Bytes a second to the GPU, in pieces that go one after another."""
    pieces = tensor.split(min(GIB, tensor.numel()))
    target = torch.empty_like(pieces[0], device="cuda")

    def copy():
        for piece in pieces:
            target[: piece.numel()].copy_(piece, non_blocking=True)

    return tensor.numel() / record.gpu_seconds(copy, repeat=3, warm_up=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8, help="of host memory")
    parser.add_argument("--repeat", type=int, default=3, help="times that each arm runs; the median counts")
    parser.add_argument("--threads", type=int, help="that bring pages; default one a core, up to 16")
    parser.add_argument("--small", action="store_true", help="a quarter GiB, to check the script; needs no GPU")
    parser.add_argument(
        "--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>, none if small"
    )
    options = parser.parse_args()
    if not CUDA and not options.small:
        parser.error("needs a GPU; --small checks the script without one")
    if not CUDA:
        print("no GPU: nothing is pinned, torch's pinned memory and the copies are left out")
    size = padded(int((0.25 if options.small else options.gib) * GIB), host_pages.HUGE_PAGE)
    threads = options.threads or host_pages.default_threads()
    arms = [arm for arm in ARMS if CUDA or arm != "torch"]
    seconds, rates = {arm: [] for arm in arms}, {}
    if CUDA:
        torch.zeros(1, device="cuda")  # starts the driver
    for _ in range(options.repeat):
        for arm in arms:
            if CUDA:
                torch._C._host_emptyCache()
            taken, tensor, close = ready(arm, size, threads)
            seconds[arm].append(taken)
            if CUDA:
                rates.setdefault(arm, []).append(copied(tensor))
                torch.cuda.synchronize()
            close()
            del tensor, close
    table = []
    for arm in arms:
        taken = statistics.median(seconds[arm])
        row = {
            "arm": arm, "gib": size / GIB, "threads": threads if arm.startswith("arena") else None,
            "pinned": CUDA and arm != "torch-plain", "ready_s": taken, "all_ready_s": seconds[arm],
            "gib_per_s": size / GIB / taken, "h2d_bytes_per_s": statistics.median(rates[arm]) if CUDA else None,
        }  # fmt: skip
        table.append(row)
        h2d = f", {row['h2d_bytes_per_s'] / 1e9:6.1f} GB/s to the GPU" if CUDA else ""
        print(f"{arm:18s} {taken:8.3f} s for {size / GIB:g} GiB, {row['gib_per_s']:6.2f} GiB/s{h2d}")
    if options.out or not options.small:
        print(record.write("vgpu_arena", table, folder=options.out))


if __name__ == "__main__":
    main()
