"""What the disk gives and what the store makes of it: GB/s of reads and writes past the page cache.

    python benchmarks/vgpu/disk.py [--small] [--folder FOLDER] [--gib 8] [--blob-mib 64] [--rounds 3] [--out FOLDER]

The ceilings are plain loops of threads over the same files (`preadv`) or new ones (`pwritev`) with O_DIRECT and aligned
memory that was touched before, the best number of threads taken. The store reads into the same memory with a few reads
in flight, checksums compared and not, and writes with one call at a time and with four; every write takes checksums.
The peer is safetensors' `load_file` of as many bytes that were dropped from the page cache, each page of the result
touched, because it maps files. Rounds go through all arms in turn, and the median of each is taken: a disk shared with
others changes within minutes.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import load_file, save_file

from apt_model.vgpu.disk import DiskStore
from benchmarks import record

THREADS = (1, 4, 8, 16)
BLOCK = 8 << 20
IN_FLIGHT, SLOTS = 4, 16
TENSORS_PER_FILE = 8


def aligned(size):
    whole = torch.zeros(size + 4096, dtype=torch.uint8)
    start = -whole.data_ptr() % 4096
    return whole[start : start + size]


def in_threads(count, work):
    """Seconds that `count` threads take for the queue that they share."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    begin = time.perf_counter()
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return time.perf_counter() - begin


class Disk:
    """A store full of blobs, the memory that its reads fill, and the peer's files beside it."""

    def __init__(self, folder, total, blob):
        self.folder, self.total, self.blob = folder, total, blob
        self.store = DiskStore(folder / "store", 2 * total + (1 << 20))
        self.memory = [aligned(blob) for _ in range(SLOTS)]
        self.offsets = range(0, blob, BLOCK)
        self.data = aligned(blob).copy_(torch.randint(256, (blob,), dtype=torch.uint8))
        self.keys = [str(number) for number in range(total // blob)]
        for key in self.keys:
            self.store.write(key, self.data)
        self.peers = []
        for start in range(0, len(self.keys), TENSORS_PER_FILE):
            keys = self.keys[start : start + TENSORS_PER_FILE]
            self.peers.append(folder / f"{start}.safetensors")
            save_file({key: self.data.clone() for key in keys}, self.peers[-1])

    def slot(self, number):
        return self.memory[number % SLOTS]

    def ceiling_read(self, threads):
        files = [os.open(self.store.place_of(key)[0], os.O_RDONLY | os.O_DIRECT) for key in self.keys]
        # Where the bytes go makes a fifth of the speed on a virtual machine: the same memory in the same turn for all.
        views = [self.slot(number).numpy().data for number in range(len(files))]
        pieces = iter([(*pair, offset) for pair in zip(files, views, strict=True) for offset in self.offsets])
        lock = threading.Lock()

        def work():
            while True:
                with lock:
                    file, view, offset = next(pieces, (None, None, 0))
                if file is None:
                    return
                view = view[offset : offset + BLOCK]
                assert os.preadv(file, [view], offset) == len(view)

        taken = in_threads(threads, work)
        for file in files:
            os.close(file)
        return taken

    def ceiling_write(self, threads):
        paths = [self.folder / f"{key}.raw" for key in self.keys]
        begin = time.perf_counter()
        files = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT) for path in paths]
        for file in files:
            os.posix_fallocate(file, 0, self.blob)
        taken = time.perf_counter() - begin
        pieces = iter([(file, offset) for file in files for offset in self.offsets])
        view = self.data.numpy().data
        lock = threading.Lock()

        def work():
            while True:
                with lock:
                    file, offset = next(pieces, (None, 0))
                if file is None:
                    return
                part = view[offset : offset + BLOCK]
                assert os.pwritev(file, [part], offset) == len(part)

        taken += in_threads(threads, work)
        for file, path in zip(files, paths, strict=True):
            os.close(file)
            path.unlink()
        return taken

    def store_read(self, *, verify):
        before = self.store.seconds_reading
        handles = []
        for number, key in enumerate(self.keys):
            if number >= IN_FLIGHT:
                handles[number - IN_FLIGHT].wait()
            handles.append(self.store.read_async(key, self.slot(number), verify=verify))
        for handle in handles:
            handle.wait()
        assert torch.equal(self.memory[0], self.data)
        return self.store.seconds_reading - before

    def store_write(self, calls):
        with DiskStore(self.folder / "written", self.total + (1 << 20)) as store, ThreadPoolExecutor(calls) as pool:
            begin = time.perf_counter()
            list(pool.map(lambda key: store.write(key, self.data), self.keys))
            taken = time.perf_counter() - begin
        shutil.rmtree(self.folder / "written")
        return taken

    def peer_read(self):
        taken = 0.0
        for path in self.peers:
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
            begin = time.perf_counter()
            loaded = load_file(path)
            for tensor in loaded.values():
                tensor[::4096].sum()
            taken += time.perf_counter() - begin
        return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="1 GiB, to check the script or a small machine")
    parser.add_argument("--folder", type=Path, help="where on the disk; default a temporary folder")
    parser.add_argument("--gib", type=int, default=8)
    parser.add_argument("--blob-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>, none if small"
    )
    options = parser.parse_args()
    total, blob = (1 if options.small else options.gib) << 30, options.blob_mib << 20
    folder = Path(tempfile.mkdtemp(prefix="bench-disk-", dir=options.folder))
    try:
        disk = Disk(folder, total, blob)
        arms = {
            **{f"ceiling read, {n} threads": lambda n=n: disk.ceiling_read(n) for n in THREADS},
            "store read": lambda: disk.store_read(verify=False),
            "store read, verified": lambda: disk.store_read(verify=True),
            "safetensors load_file, cold": disk.peer_read,
            **{f"ceiling write, {n} threads": lambda n=n: disk.ceiling_write(n) for n in THREADS},
            "store write, 1 call": lambda: disk.store_write(1),
            "store write, 4 calls": lambda: disk.store_write(4),
        }
        taken = {arm: [] for arm in arms}
        for _ in range(options.rounds):
            for arm, call in arms.items():
                taken[arm].append(call())
        disk.store.close()
    finally:
        shutil.rmtree(folder)
    speed = {arm: total / statistics.median(seconds) / 1e9 for arm, seconds in taken.items()}
    table = []
    for arm, gb_s in speed.items():
        kind = "write" if "write" in arm else "read"
        top = max(value for name, value in speed.items() if name.startswith(f"ceiling {kind}"))
        rounds = [round(total / each / 1e9, 3) for each in taken[arm]]
        table.append({
            "arm": arm, "gb_s": gb_s, "share_of_ceiling": gb_s / top, "best_gb_s": max(rounds), "rounds_gb_s": rounds,
            "bytes": total, "blob_bytes": blob,
        })  # fmt: skip
        print(f"{arm:30s} {gb_s:7.3f} GB/s, {gb_s / top:5.1%} of the ceiling; rounds {rounds}")
    if options.out or not options.small:
        print(record.write("vgpu_disk", table, folder=options.out))


if __name__ == "__main__":
    main()
