"""The disk of a folder: plain reads and writes past the page cache, and what the VGPU stack's store makes of it."""

import contextlib
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import Self

from apt_model.core.errors import StorageError
from apt_model.optimization.bench.rows import Ceiling, Row, checked, random_bytes, wrong_share
from apt_model.vgpu.disk import DiskStore
from apt_model.vgpu.disk_files import DirectFile, allocate, bytes_of
from apt_model.vgpu.units import PAGE

READ, WRITE = "disk read", "disk write"
_WAYS = {WRITE: "write to the VGPU stack's store", READ: "read of the VGPU stack's store"}
_CHUNK, _THREADS = 8 << 20, 8
# Of the first file, from whose time the size of the others follows; how many times each is measured.
_FIRST, _ROUNDS = 4 << 20, 3
_PREFIX = "apt-bench-"

Clock = Callable[[], float]


class Scratch:
    """A folder below one that is given, which goes with its `with`, and in it a file of at most `most` bytes.

    `StorageError` where it cannot be made or filled: no room, read-only, not there.

    Args:
        folder: where; None: the temporary folder, which TMPDIR names.
        most: bytes of the file, at most a quarter of what the disk has free.
        seconds: for which the file is written and read at most, each time, by the rate of the first bytes.
        clock: in seconds.
    """

    def __init__(self, folder: Path | None, most: int, seconds: float, clock: Clock = time.perf_counter) -> None:
        self._given, self._most, self._seconds, self.clock = folder, most, seconds, clock

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as held:
            try:
                made = tempfile.mkdtemp(prefix=_PREFIX, dir=self._given)
                held.callback(shutil.rmtree, made, ignore_errors=True)
                self.folder = Path(made)
                self.file = self.folder / "plain"
                free = shutil.disk_usage(self.folder).free // 4
                self.size = min(self._most, free) // PAGE * PAGE
                if self.size < min(_FIRST, self._most):
                    raise StorageError(f"{self.folder.parent}: {free / 1e6:.1f} MB may be used of the disk, too few")
                self.data = aligned(self.size)
                self.data.copy_(random_bytes(self.size))
                first = min(_FIRST, self.size)
                rate = first / self.write(first)
                self.size = max(first, min(self.size, int(rate * self._seconds))) // PAGE * PAGE
                self.data = self.data[: self.size]
            except OSError as error:
                where = self._given or tempfile.gettempdir()
                raise StorageError(f"{where}: the disk cannot be measured: {error.strerror or error}") from error
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def write(self, size: int | None = None) -> float:
        """Seconds to write the file anew with O_DIRECT, its room allocated before."""
        size = self.size if size is None else size
        self.file.unlink(missing_ok=True)
        allocate(self.file, size)
        view = bytes_of(self.data[:size], "data")
        return self._served(os.O_RDWR, lambda file, at: file.write(view[at : at + _CHUNK], at), size)

    def read(self, out: Tensor) -> float:
        """Seconds to read the file into `out` with O_DIRECT."""
        view = bytes_of(out, "out")
        return self._served(os.O_RDONLY, lambda file, at: file.read(view[at : at + _CHUNK], at), len(view))

    def _served(self, flags: int, serve: Callable[[DirectFile, int], None], size: int) -> float:
        file = DirectFile(self.file, flags)
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                return self.timed(lambda: list(pool.map(lambda at: serve(file, at), range(0, size, _CHUNK))))
        finally:
            self.direct = file.direct
            file.close()

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds of one call."""
        begin = self.clock()
        work()
        return max(self.clock() - begin, 1e-9)


def aligned(size: int) -> Tensor:
    """Bytes that begin at a page."""
    whole = torch.zeros(size + PAGE, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE
    return whole[start : start + size]


def measured(scratch: Scratch) -> tuple[dict[str, Ceiling], list[Row]]:
    """Plain writes and reads, which are the ceilings, and the VGPU stack's store, which compares checksums as it reads.

    All take turns, as others use the disk too; the fastest of three counts.
    """
    out, wrong = aligned(scratch.size), {"plain": 0.0, "store": 0.0}
    plain: dict[str, list[float]] = {WRITE: [], READ: []}
    ours: dict[str, list[float]] = {WRITE: [], READ: []}
    with DiskStore(scratch.folder / "store", 2 * scratch.size + PAGE, threads=_THREADS, chunk=_CHUNK) as store:
        for _ in range(_ROUNDS):
            plain[WRITE].append(scratch.write())
            plain[READ].append(scratch.read(out.zero_()))
            wrong["plain"] = max(wrong["plain"], wrong_share(out, scratch.data))
            ours[WRITE].append(scratch.timed(lambda: store.write("blob", scratch.data)))
            out.zero_()
            ours[READ].append(scratch.timed(lambda: store.read("blob", out)))
            wrong["store"] = max(wrong["store"], wrong_share(out, scratch.data))
    ceilings = {name: _ceiling(scratch, min(times), wrong["plain"]) for name, times in plain.items()}
    rows = []
    for name, what in _WAYS.items():
        row = Row(part="disk", what=what, shape=f"{scratch.size / 2**20:.0f} MiB", work={name: float(scratch.size)})
        rows.append(checked(row, lambda: wrong["store"], 0.0, functools.partial(min, ours[name])))
    return ceilings, rows


def _ceiling(scratch: Scratch, seconds: float, wrong: float) -> Ceiling:
    past = "with O_DIRECT" if scratch.direct else "through the page cache, as this file system takes no O_DIRECT"
    how = f"{scratch.size / 2**20:.0f} MiB by {_THREADS} threads in pieces of {_CHUNK >> 20} MiB, {past}"
    if wrong:
        return Ceiling(unit="GB/s", how=how, why=f"{wrong:.1e} of the bytes were read as others than were written")
    return Ceiling(unit="GB/s", how=how, rate=scratch.size / seconds / 1e9)
