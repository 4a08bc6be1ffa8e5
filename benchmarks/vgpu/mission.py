"""The mission's stack, 2 000 MB of GPU over 8 000 MB of RAM over 32 000 MB of SSD, and a model of 40 GB that runs in it.

    python benchmarks/vgpu/mission.py [--blocks 92] [--caps 2000 8000 32000] [--folder FOLDER] [--small] [--out FOLDER]
    python benchmarks/vgpu/mission.py --disk [--blocks 8]   # all blocks on disk, beside accelerate's disk_offload

The model is a stack of Llama-3-8B's decoder blocks; the same weights all in the GPU say what is right and how long
compute takes. It is attached without values, which are made block by block as they are asked for. A pass takes its whole
batch through a layer before the next one. Outputs are compared bit for bit. Capacities are
sampled while it runs: the stack's own counts, the arena's pages, the bytes of the store's files, the process.

The link is the pinned copy of 1 GiB, the disk the best of plain O_DIRECT reads by several threads over the store's own
files into memory that was touched, both in the same run. What they allow is the larger of compute, bytes over the link
by its rate, and bytes from the disk by its rate; the time is shown over that.
"""

import argparse
import contextlib
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn
from typing_extensions import Self

from apt_model.optimization import VGPUStack
from benchmarks import record
from benchmarks.fp4.cells import DEVICE, synchronize
from benchmarks.vgpu.stack_of_blocks import Stack, bytes_of, inputs_of, stack_of
from benchmarks.vgpu.streaming import GPU, HostMemory, link_bytes_per_s, release

SLOWER = 1.15
PIECE, READERS = 8 << 20, (4, 8, 16)


class Drawn:
    """Values of a stack's blocks, drawn when they are asked for: each block's from its own seed."""

    def __init__(self, *, small: bool) -> None:
        self.small, self.block, self.number = small, None, -1
        self.like = stack_of(1, "meta", small=small).blocks[0].state_dict()

    def of(self, number: int) -> nn.Module:
        if number != self.number:
            torch.manual_seed(number)
            self.block = stack_of(1, GPU, small=self.small, seed=number).blocks[0]
            self.number = number
        return self.block

    def __contains__(self, name: str) -> bool:
        return name.startswith("blocks.")

    def place(self, _: str) -> None:
        return None

    def kind(self, name: str):
        found = self.like[name.split(".", 2)[2]]
        return found.dtype, tuple(found.shape)

    def read(self, name: str) -> Tensor:
        _, number, rest = name.split(".", 2)
        return self.of(int(number)).get_parameter(rest).detach().cpu()


def in_gpu(count: int, drawn: Drawn, *, small: bool) -> Stack:
    model = stack_of(0, GPU, small=small)
    for number in range(count):
        model.blocks.append(drawn.of(number))
        drawn.number = -1  # it is this model's now
    return model.requires_grad_(False).eval()


class Watch:
    """What is held while it runs, sampled every 20 ms."""

    def __init__(self, stack: VGPUStack) -> None:
        self.stack, self.stopped, self.samples = stack, threading.Event(), 0
        self.most = {"level_mb": [0.0] * len(stack.levels), "arena_bytes": 0, "file_bytes": 0}

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()
        for level, most in zip(self.stack.levels, self.most["level_mb"], strict=True):
            assert most * 1e6 <= level.capacity, (level.config, most)
        memory = self.stack._memory
        assert self.most["arena_bytes"] <= memory.host.capacity
        assert self.most["file_bytes"] <= memory.disk.capacity

    def run(self) -> None:
        memory = self.stack._memory
        while not self.stopped.wait(0.02):
            self.samples += 1
            used = [level.used / 1e6 for level in self.stack.levels]
            self.most["level_mb"] = [max(pair) for pair in zip(self.most["level_mb"], used, strict=True)]
            self.most["arena_bytes"] = max(self.most["arena_bytes"], memory.arena.committed)
            self.most["file_bytes"] = max(self.most["file_bytes"], file_bytes(memory.store.folder))


def file_bytes(folder: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError):  # one that is being replaced
        for each in os.scandir(folder):
            total += each.stat().st_blocks * 512 if each.name.endswith(".blob") else 0
    return total


def disk_bytes_per_s(folder: Path, most: int = 8 << 30) -> dict[int, float]:
    """Plain reads of the store's files past the page cache, by how many threads read."""
    paths, taken = [], 0
    for path in sorted(folder.glob("*.blob")):
        if taken < most:
            paths.append(path)
            taken += path.stat().st_size
    pieces = [(path, at) for path in paths for at in range(0, path.stat().st_size, PIECE)]
    found = {}
    for count in READERS:
        whole = torch.zeros(count * PIECE + 4096, dtype=torch.uint8)
        start = -whole.data_ptr() % 4096
        views = [whole[start + i * PIECE : start + (i + 1) * PIECE].numpy().data for i in range(count)]
        files = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths}
        free = list(range(count))

        def read(piece, files=files, views=views, free=free):
            mine = free.pop()
            done = os.preadv(files[piece[0]], [views[mine]], piece[1])
            free.append(mine)
            return done

        begin = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            total = sum(pool.map(read, pieces))
        found[count] = total / (time.perf_counter() - begin)
        for each in files.values():
            os.close(each)
    return found


@torch.no_grad()
def passes(model: nn.Module, x: tuple[Tensor, ...], count: int) -> tuple[float, Tensor]:
    """Median of passes behind one that is not counted, and the last output."""
    out, seconds = model(*x), []
    synchronize()
    for _ in range(count):
        begin = time.perf_counter()
        out = model(*x)
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds), out


class Run:
    """A stack, the model in it, and the same model in the GPU."""

    def __init__(self, given: argparse.Namespace, caps: list[float]) -> None:
        self.given, self.rows = given, []
        self.drawn = Drawn(small=given.small)
        self.link = link_bytes_per_s()
        release()
        begin = time.perf_counter()
        self.base = in_gpu(given.blocks, self.drawn, small=given.small)
        self.nbytes = bytes_of(self.base)
        print(f"{self.nbytes / 1e9:.2f} GB in the GPU after {time.perf_counter() - begin:.1f} s", flush=True)
        levels = [{"capacity_mb": cap, "device": device} for cap, device in zip(caps, (GPU, "cpu", "ssd"), strict=True)]
        if given.folder:
            levels[2]["path"] = tempfile.mkdtemp(prefix="mission-", dir=given.folder)
        self.stack = VGPUStack.from_config({"levels": levels})
        model = stack_of(given.blocks, "meta", small=given.small)
        begin, memory = time.perf_counter(), HostMemory()
        with Watch(self.stack), memory:
            self.model = self.stack.attach(model, weights=self.drawn)
        self.layout = self.stack._models[id(self.model)].layout
        chosen = self.layout.plan
        self.facts = {
            "levels": levels, "weight_bytes": self.nbytes, "attach_s": time.perf_counter() - begin, "slots": chosen.slots,
            "slot_bytes": chosen.slot_bytes, "blobs": len(self.layout.blobs), "staging": chosen.staging,
            "homes": [chosen.homes.count(home) for home in range(3)], "disk_bytes": chosen.disk_bytes,
            "streamed_bytes": chosen.streamed_bytes, "host_peak_growth_bytes": memory.peak, "link_bytes_per_s": self.link,
        }  # fmt: skip
        self.disk = disk_bytes_per_s(self.stack._memory.store.folder)
        self.facts["disk_bytes_per_s"] = self.disk
        print(f"attached: {self.facts}", flush=True)

    def row(self, tokens: str, count: int) -> dict:
        x = inputs_of(tokens, GPU, small=self.given.small)
        compute_s, want = passes(self.base, x, 1)
        before = self.stack.stats()
        with Watch(self.stack) as watch:
            seconds, out = passes(self.model, x, count)
        after = self.stack.stats()
        first, then = before["levels"][0], after["levels"][0]
        hits, misses = (then[key] - first[key] for key in ("hits", "misses"))
        moved = (then["bytes_in"] - first["bytes_in"]) / (count + 1)
        link_s = moved / self.link if self.link else None
        disk_s = self.facts["disk_bytes"] / max(self.disk.values())
        allowed = max(compute_s, link_s or 0.0, disk_s)
        row = {
            "tokens": tokens, "seconds": seconds, "compute_s": compute_s, "link_s": link_s, "disk_s": disk_s,
            "slow_down": seconds / compute_s, "over_allowed": seconds / allowed, "allowed_slow_down": allowed / compute_s,
            "disk_efficiency": disk_s / seconds, "same_bits": torch.equal(out, want), "moved_bytes": moved,
            "hit_rate": hits / (hits + misses) if hits + misses else None,
            "stall_s": (after["stall_ms"] - before["stall_ms"]) / 1e3 / (count + 1),
            "samples": watch.samples, "most_held": watch.most, **self.facts,
        }  # fmt: skip
        self.rows.append(row)
        keys = ("tokens", "seconds", "compute_s", "link_s", "disk_s", "slow_down", "over_allowed", "same_bits", "hit_rate",
                "stall_s", "samples", "most_held")  # fmt: skip
        print({key: row[key] for key in keys}, flush=True)
        return row

    def enough_tokens(self, row: dict) -> int:
        """Tokens a pass from which, at this row's rate of compute, disk and link cost at most 15 %."""
        each = row["compute_s"] / math.prod(map(int, row["tokens"].split("x")))
        return math.ceil(max(row["link_s"] or 0.0, row["disk_s"]) / SLOWER / each)

    def close(self) -> None:
        self.stack.close(restore=False)


def mission(given: argparse.Namespace) -> list[dict]:
    run = Run(given, given.caps)
    length = 16 if given.small else 2048
    run.row("1x1", 1)
    large = run.row(f"8x{length}", 1)
    enough = run.enough_tokens(large)
    print(f"slow-down of at most {SLOWER} from {enough} tokens a pass on")
    batch = math.ceil(enough / length)
    try:
        row = run.row(f"{batch}x{length}", 1)
        print(f"{'met' if row['slow_down'] <= SLOWER else 'NOT met'}: slow-down {row['slow_down']:.3f}")
    except torch.OutOfMemoryError as error:
        print(f"not tried: {batch * length} tokens beside the whole model in the GPU: {error}")
    run.close()
    return run.rows


def from_disk(given: argparse.Namespace) -> list[dict]:
    """All blocks on the disk: RAM has room for what is on its way only."""
    block = bytes_of(stack_of(1, "meta", small=given.small)) / 1e6
    spare = 1 if given.small else 64
    run = Run(given, [3 * block + spare, 3 * block + spare, given.blocks * block + spare])
    run.row("1x1", 3)
    run.close()
    rows = run.rows
    if DEVICE == "cuda":
        rows.append(peer(given, run))
    return rows


def peer(given: argparse.Namespace, run: Run) -> dict:
    """What disk_offload of accelerate takes, its files dropped from the page cache before each pass."""
    from accelerate import disk_offload

    x = inputs_of("1x1", GPU, small=given.small)
    _, want = passes(run.base, x, 1)
    seconds, same = [], True
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        model = disk_offload(run.base.cpu(), folder, execution_device=torch.device(GPU))
        for _ in range(3):
            for path in Path(folder).glob("*.dat"):
                file = os.open(path, os.O_RDONLY)
                os.fsync(file)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)
            with torch.no_grad():
                begin = time.perf_counter()
                out = model(*x)
                synchronize()
                seconds.append(time.perf_counter() - begin)
            same = same and torch.equal(out.to(GPU), want)
    row = {"arm": "accelerate disk_offload, cold", "seconds": statistics.median(seconds), "same_bits": same}
    print(row, f"ours {row['seconds'] / run.rows[0]['seconds']:.2f} times as fast", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, help="default 92; 8 with --disk or --small")
    parser.add_argument("--caps", type=float, nargs=3, help="MB of GPU, RAM and SSD; default 2000 8000 32000")
    parser.add_argument("--disk", action="store_true", help="all blocks on the disk, beside accelerate's disk_offload")
    parser.add_argument("--folder", type=Path, help="where the files lie; default TMPDIR")
    parser.add_argument("--small", action="store_true", help="a tiny model, to check the script without a GPU")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    given = parser.parse_args()
    given.blocks = given.blocks or (8 if given.disk or given.small else 92)
    given.caps = given.caps or ([8.0, 15.0, 40.0] if given.small else [2000.0, 8000.0, 32000.0])
    rows = from_disk(given) if given.disk else mission(given)
    print(record.write("vgpu_from_disk" if given.disk else "vgpu_mission", rows, folder=given.out))


if __name__ == "__main__":
    main()
