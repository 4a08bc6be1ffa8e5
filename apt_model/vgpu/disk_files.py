"""Files read and written past the page cache, from and into memory of the caller, in pieces that threads serve."""

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apt_model.core.errors import InputError, StorageError
from apt_model.vgpu.units import PAGE, padded

LOG = logging.getLogger(__name__)
LOCK = "lock"
_O_DIRECT = getattr(os, "O_DIRECT", 0)
# Between two looks whether what is waited for can still come.
_LOOK_S = 0.5
_thread = threading.local()


def bytes_of(tensor: Tensor, name: str) -> memoryview:
    """The tensor's own memory."""
    if tensor.dtype is not torch.uint8 or tensor.dim() != 1 or tensor.device.type != "cpu":
        raise InputError(
            f"{name} must be torch.uint8 with one dimension on the CPU, and is {tensor.dtype} {list(tensor.shape)} on "
            f"{tensor.device}"
        )
    if not tensor.is_contiguous():
        raise InputError(f"{name} must be contiguous, and has stride {tensor.stride(0)}")
    return tensor.numpy().data


def fault(key: str, path: Path, offset: int, error: BaseException) -> StorageError:
    """The typed error for `error`, which ended the transfer of a blob at `offset`."""
    if isinstance(error, StorageError):
        return error
    if isinstance(error, CancelledError):
        reason = "the store was closed before this was done"
    elif isinstance(error, OSError):
        reason = error.strerror or str(error)
    else:
        reason = f"it was not served: {error!r}"
    found = StorageError(f"blob {key!r} in {path}, offset {offset}: {reason}")
    found.__cause__ = error
    return found


class ShortReadError(OSError):
    """A file ended before the bytes that were asked for; `offset` is where."""

    def __init__(self, offset: int) -> None:
        super().__init__(errno.EIO, f"the file is truncated: it ends at byte {offset}")
        self.offset = offset


class DirectFile:
    """An open file whose transfers bypass the page cache, unless its file system refuses that."""

    # Folders are many and the reason is the same: told once a process.
    _told = False

    def __init__(self, path: Path, flags: int) -> None:
        self.path, self.direct = path, bool(_O_DIRECT)
        try:
            self.descriptor = os.open(path, flags | os.O_CLOEXEC | _O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.direct:
                raise
            self.descriptor = os.open(path, flags | os.O_CLOEXEC)
            self._go_buffered()

    def read(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` on, which is a multiple of the alignment; nothing outside `view` is touched."""
        buffers, spare = self._buffers(view)
        self._transfer(os.preadv, buffers, offset)
        if spare is not None:
            kept = len(view) - len(view) % PAGE if len(buffers) > 1 else 0
            view[kept:] = spare[: len(view) - kept]

    def read_anywhere(self, view: memoryview, offset: int) -> None:
        """Fill `view` from any `offset` on, by way of memory of the thread."""
        before = offset % PAGE
        spare = _spare(padded(before + len(view)))
        self._transfer(os.preadv, [spare], offset - before, least=before + len(view))
        # As an array: a long copy of a memoryview would keep all other threads of Python waiting.
        np.copyto(np.frombuffer(view, np.uint8), np.frombuffer(spare, np.uint8)[before : before + len(view)])

    def check(self, size: int, offset: int, judge: Callable[[memoryview], None]) -> None:
        """Have `judge` look at the bytes at `offset`, in memory of the thread."""
        spare = _spare(padded(size))
        self._transfer(os.preadv, [spare], offset)
        judge(spare[:size])

    def write(self, view: memoryview, offset: int) -> None:
        """Put `view` at `offset`, then zeros up to the alignment."""
        buffers, spare = self._buffers(view)
        if spare is not None:
            kept = len(view) - len(view) % PAGE if len(buffers) > 1 else 0
            spare[: len(view) - kept] = view[kept:]
            spare[len(view) - kept :] = bytes(len(spare) - len(view) + kept)
        self._transfer(os.pwritev, buffers, offset)

    def close(self) -> None:
        """Close it; what still tries to use it gets an error, and no file opened since under the same number."""
        descriptor, self.descriptor = self.descriptor, -1
        os.close(descriptor)

    def _buffers(self, view: memoryview) -> tuple[list[memoryview], memoryview | None]:
        """Aligned memory for `view`: itself and a spare block for its tail, or all spare where it is not aligned."""
        if self.direct and _address(view) % PAGE:
            spare = _spare(padded(len(view)))
            return [spare], spare
        tail = len(view) % PAGE
        if not tail:
            return [view], None
        spare = _spare(PAGE)
        return ([view[:-tail], spare] if len(view) > tail else [spare]), spare

    def _transfer(
        self, call: Callable[[int, Sequence[memoryview], int], int], buffers: list[memoryview], offset: int, *,
        least: int | None = None,
    ) -> None:  # fmt: skip
        """All of `buffers`, or at least so many bytes where the file ends then."""
        end = offset + (sum(map(len, buffers)) if least is None else least)
        while offset < end:
            direct = self.direct  # another thread may go buffered during the call, which is refused all the same
            try:
                count = call(self.descriptor, buffers, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._go_buffered()
                continue
            offset += count
            buffers = _after(buffers, count)
            # Past the page cache a part of a block is the end of the file.
            if offset < end and (not count or (self.direct and count % PAGE)):
                raise ShortReadError(offset)

    def _go_buffered(self) -> None:
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~_O_DIRECT)
        self.direct = False  # not before: whoever sees it is not refused any more
        if not DirectFile._told:
            DirectFile._told = True
            LOG.warning("%s: this file system takes no O_DIRECT; reads and writes go through the page cache", self.path)


class Threads(ThreadPoolExecutor):
    """A pool that knows whether one of its threads has died, with whatever that one was to serve."""

    def __init__(self, count: int, name: str) -> None:
        self._started: list[threading.Thread] = []
        # Of the list and not of the pool, which its threads would keep alive.
        super().__init__(count, name, lambda started: started.append(threading.current_thread()), (self._started,))

        self._open = True

    def died(self) -> bool:
        """Whether a thread has ended before its time."""
        return self._open and any(not each.is_alive() for each in self._started)

    def retire(self) -> None:
        """Serve what is queued, and end; who waits for what a dead thread had is still told."""
        super().shutdown(wait=False)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As the pool's own."""
        self._open = False
        super().shutdown(wait, cancel_futures=cancel_futures)


class ReadHandle:
    """Pieces of one blob on their way: `wait` returns when all bytes are in place, or raises what went wrong."""

    def __init__(self, key: str, path: Path, ended: Callable[[StorageError | None], None]) -> None:
        self._key, self._path, self._ended = key, path, ended
        self._lock, self._over = threading.Lock(), threading.Event()
        self._left, self._error = 1, None  # type: int, StorageError | None
        self._failed_at = 0  # the offset of the error
        self._pool: Threads | None = None
        self._pieces: list[Future[None]] = []

    def start(self, pool: Threads, serve: Callable[[int], None], offsets: range) -> None:
        """Queue `serve` for every offset; a piece that fails keeps those behind it from being served."""
        self._pool = pool
        try:
            for offset in offsets:
                with self._lock:
                    self._left += 1
                try:
                    future = pool.submit(self._serve, serve, offset)
                except BaseException as error:
                    self._one_less(offset, error)
                    raise
                self._pieces.append(future)
                future.add_done_callback(partial(self._settle, offset))
        except RuntimeError:  # the pool is shut down or cannot start a thread: `wait` tells
            pass
        finally:
            self._one_less(0, None)

    def fail(self, error: BaseException, offset: int = 0) -> None:
        """Serve no piece behind this; of several errors the one at the lowest offset is what `wait` raises."""
        with self._lock:
            if self._error is None or offset < self._failed_at:
                self._error, self._failed_at = fault(self._key, self._path, offset, error), offset

    def done(self) -> bool:
        """Whether `wait` would return or raise at once."""
        return self._over.is_set()

    def wait(self) -> None:
        """Wait for the last piece; when this raises, no thread touches the caller's memory any more."""
        while not self._over.wait(_LOOK_S):
            if self._pool is not None and self._pool.died():
                self._give_up(RuntimeError("a thread that serves the disk has died"))
        if self._error is not None:
            raise self._error

    result = wait

    def finish(self) -> None:
        """`wait`, and on an interruption give up what is not yet served."""
        try:
            self.wait()
        except StorageError:
            raise
        except BaseException as error:
            self._give_up(error)
            with contextlib.suppress(StorageError):
                self.wait()
            raise

    def _give_up(self, error: BaseException) -> None:
        """Of pieces that no thread has begun, nothing is served any more."""
        self.fail(error)
        for piece in self._pieces:
            piece.cancel()

    def _serve(self, serve: Callable[[int], None], offset: int) -> None:
        if self._error is None or offset < self._failed_at:
            serve(offset)

    def _settle(self, offset: int, future: "Future[None]") -> None:
        self._one_less(offset, CancelledError() if future.cancelled() else future.exception())

    def _one_less(self, offset: int, error: BaseException | None) -> None:
        if error is not None:
            self.fail(error, getattr(error, "offset", offset))
        with self._lock:
            self._left -= 1
            last = not self._left
        if last:
            try:
                self._ended(self._error)
            except OSError as failure:
                self.fail(failure)
            finally:
                self._over.set()


def lock_folder(folder: Path) -> int:
    """Take the folder for this process; gives the lock file's descriptor, whose closing gives the folder back."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except OSError as error:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace") or "unknown"
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        raise StorageError(
            f"{folder} is in use by a store of process {holder}",
            remedy="close that store, end that process, or give another folder",
        ) from error
    return descriptor


def release_folder(lock: int, folder: Path | None, owner: int) -> None:
    """Undo `lock_folder`, and remove a folder that was temporary."""
    if os.getpid() != owner:  # a fork's copy of the store: the folder is its parent's
        return
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    fcntl.flock(lock, fcntl.LOCK_UN)  # closing alone leaves it to a fork that has the descriptor too
    os.close(lock)


def allocate(path: Path, size: int) -> None:
    """A new file with room on the disk, so that a full disk shows before anything is written."""
    # Not O_DIRECT: where the file system cannot allocate, the C library writes a byte a block instead.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        if size:
            os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Have the disk hold the file for good."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file that may be gone; one that will not go is no reason to fail what was done."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        LOG.warning("%s stays: %s", path, error)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data) if len(view) else 0


def _spare(size: int) -> memoryview:
    """Aligned memory of the calling thread, which lives as long as it does."""
    held: mmap.mmap | None = getattr(_thread, "memory", None)
    if held is None or len(held) < size:
        held = _thread.memory = mmap.mmap(-1, size)
    return memoryview(held)[:size]


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the buffers behind their first `count` bytes."""
    left = []
    for each in buffers:
        if count < len(each):
            left.append(each[count:])
        count = max(0, count - len(each))
    return left
