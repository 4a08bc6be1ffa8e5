"""The SSD as a level of memory: blobs under keys in files of one folder, read straight into the caller's memory."""

import logging
import os
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

from torch import Tensor
from typing_extensions import Self

from apt_model.core.errors import CapacityError, ConfigError, InputError, StorageError
from apt_model.vgpu.disk_files import (
    DirectFile,
    ReadHandle,
    Threads,
    allocate,
    bytes_of,
    fault,
    lock_folder,
    release_folder,
    remove,
    sync,
)
from apt_model.vgpu.disk_foreign import Foreign, OpenForeign, Piece
from apt_model.vgpu.disk_index import FILE_NAME, Blob, changed, compare, read_index, write_index
from apt_model.vgpu.traffic import Arrival, Traffic
from apt_model.vgpu.units import PAGE, padded

LOG = logging.getLogger(__name__)
Told = Callable[[StorageError | None], None]


class DiskStore:
    """Bytes under keys, in at most `capacity` bytes of files.

    Without a folder the files are in a temporary one (TMPDIR says where), which goes with the store or the process. A
    folder that is given belongs to one store at a time, and can be opened again with what it held at its last `flush`
    or `close`; after a kill, blobs written since are gone, and where one of those that the index names was replaced or
    deleted since, opening it is refused.

    A write is served by up to `threads` threads, and reads by as many others, `chunk` bytes at a time in the order in
    which they were asked for: the first read has the whole bandwidth. Memory that starts at a multiple of 4096 is read
    and written in place, any other through a buffer of `chunk` bytes a thread. All methods may be called from any
    thread.
    """

    def __init__(self, folder: Path | None, capacity: int, *, threads: int = 8, chunk: int = 8 << 20) -> None:
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, and is {threads}")
        if chunk < PAGE or chunk % PAGE:
            raise ConfigError(f"chunk must be a multiple of {PAGE}, and is {chunk}")
        if capacity < 0:
            raise ConfigError(f"capacity must not be negative, and is {capacity}")
        self.capacity, self.chunk, self._threads = capacity, chunk, threads
        self.peak = 0
        self.reads, self.writes = Traffic(), Traffic()
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._no_writes = threading.Condition(self._lock)
        self._writes = self._used = 0
        self._closed = False
        self._kept = folder is not None
        try:
            if folder is None:
                folder = Path(tempfile.mkdtemp(prefix="apt-disk-"))
            else:
                folder.mkdir(parents=True, exist_ok=True)
            self.folder = folder.absolute()
            held = lock_folder(self.folder)
        except OSError as error:
            raise StorageError(f"{folder or tempfile.gettempdir()} cannot hold a store: {error}") from error
        # Not bound to the store, which it would keep alive.
        self._release = weakref.finalize(self, release_folder, held, None if self._kept else self.folder, os.getpid())
        try:
            self._blobs = self._open()
            self._foreign: dict[str, Foreign] = {}
        except BaseException:
            self._release()
            raise
        self._indexed = bool(self._blobs)
        self._next = 1 + max((int(each.file.partition(".")[0]) for each in self._blobs.values()), default=0)
        self._threads = threads
        self._readers, self._writers = self._pool("read"), self._pool("write")

    def write(self, key: str, data: Tensor) -> None:
        """Put `data` (torch.uint8, one dimension, CPU) under `key`.

        The blob that had the key stays until the new one is whole, and counts to the capacity so long.
        """
        view = bytes_of(data, "data")
        room = padded(len(view))
        with self._lock:
            self._check_open()
            if self._used + room > self.capacity:
                raise CapacityError(
                    f"blob {key!r} takes {room} bytes on disk, and of the {self.capacity} in {self.folder} "
                    f"{self._used} are in use",
                    state="nothing was written" + (", the key keeps its blob" if key in self._blobs else ""),
                    remedy=f"a capacity of {self._used + room} bytes would do",
                )
            self._writers = self._pool("write", self._writers)
            self._used += room
            self.peak = max(self.peak, self._used)
            self._writes += 1
            path = self.folder / f"{self._next:08d}.blob"
            self._next += 1
        stale: Blob | None = None
        try:
            with self.writes.start(key, len(view)):
                blob = self._write_file(key, path, view)
            with self._lock:
                self._check_open()
                stale = self._blobs.get(key)
                self._blobs[key] = blob
                self._foreign.pop(key, None)
                self._indexed = False
        except BaseException:
            remove(path)
            with self._lock:
                self._used -= room
            raise
        finally:
            if stale is not None:
                remove(self.folder / stale.file)
            with self._lock:
                self._used -= padded(stale.nbytes) if stale else 0
                self._writes -= 1
                self._no_writes.notify_all()

    def adopt(self, key: str, pieces: Sequence[Piece], chunk: int) -> None:
        """Let `key` stand for bytes in files of others, which takes no room; a write to it leaves those as they are.

        The folder does not remember such a key. Reads go through a buffer of `chunk` bytes a thread (`spare_for`), have
        no checksums and are refused once a file has another size, time of change or inode.

        Raises:
            StorageError: a file is missing or too short.
        """
        blob = Foreign(key, pieces, chunk)
        with self._lock:
            self._check_open()
            if key in self._blobs:
                raise InputError(f"blob {key!r} is there already", remedy="delete it first")
            self._foreign[key] = blob

    def is_foreign(self, key: str) -> bool:
        """Whether the key stands for bytes in files of others."""
        with self._lock:
            return key in self._foreign

    def spare_for(self, chunk: int) -> int:
        """Of host memory that reads of foreign bytes take, `chunk` at a time."""
        return self._threads * padded(chunk + PAGE)

    def chunk_within(self, spare: int, largest: int) -> int:
        """What to read foreign pieces of at most `largest` bytes by, so that it takes about `spare` bytes of memory."""
        return max(PAGE, min(self.chunk, padded(largest), spare // self._threads // PAGE * PAGE))

    def read(self, key: str, out: Tensor, *, verify: bool = True) -> None:
        """Fill the beginning of `out` with the blob; bytes of `out` behind it stay as they are."""
        self.read_async(key, out, verify=verify).finish()

    def read_async(self, key: str, out: Tensor, *, verify: bool = True, told: Told | None = None) -> ReadHandle:
        """Begin to fill `out`, which is not to be touched until the handle's `wait`, where faults are raised.

        A blob that is replaced or deleted meanwhile is still read as it was. `told` is called once, by some thread,
        when the read is over, with what went wrong or None; not where this call raises.
        """
        view = bytes_of(out, "out")
        foreign = self._foreign.get(key)
        if foreign is not None:
            return self._begin_foreign(foreign, key, view, told)
        return self._begin_read(key, view, verify=verify, told=told)

    def delete(self, key: str) -> None:
        """Remove the blob and its file."""
        with self._lock:
            self._check_open()
            if self._foreign.pop(key, None) is not None:
                return
            blob = self._find(key)
            del self._blobs[key]
            self._indexed = False
        remove(self.folder / blob.file)
        with self._lock:
            self._used -= padded(blob.nbytes)

    def verify(self) -> None:
        """Read every blob and compare its checksums; the first fault is raised."""
        for key in self:
            if not self.is_foreign(key):
                self._begin_read(key, None, verify=True).finish()

    def flush(self) -> None:
        """Bring all blobs and then an index of them to the disk, so that the folder can be opened again."""
        with self._lock:
            self._check_open()
        self._flush()

    def close(self) -> None:
        """End reads and writes under way with an error, flush a folder that was given, remove a temporary one."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._readers.shutdown(cancel_futures=True)
        self._writers.shutdown(cancel_futures=True)
        with self._no_writes:
            self._no_writes.wait_for(lambda: not self._writes)
        try:
            if self._kept and not self._indexed:
                self._flush()
        finally:
            self._release()

    def nbytes(self, key: str) -> int:
        """Bytes of the blob."""
        with self._lock:
            foreign = self._foreign.get(key)
            return self._find(key).nbytes if foreign is None else foreign.nbytes

    def place_of(self, key: str, offset: int = 0) -> tuple[Path, int]:
        """The file that has byte `offset` of the blob, and where; it is gone once the key is written again."""
        with self._lock:
            foreign = self._foreign.get(key)
            return (self.folder / self._find(key).file, offset) if foreign is None else foreign.place_of(offset)

    @property
    def used(self) -> int:
        """Bytes on disk, with those of writes under way."""
        return self._used

    @property
    def seconds_reading(self) -> float:
        """Time in which at least one read was under way."""
        return self.reads.seconds

    @property
    def bytes_read(self) -> int:
        """Bytes of reads, those under way included."""
        return self.reads.bytes

    @property
    def bytes_written(self) -> int:
        """Bytes of writes, those under way included."""
        return self.writes.bytes

    def __contains__(self, key: object) -> bool:
        with self._lock:
            return key in self._blobs or key in self._foreign

    def __len__(self) -> int:
        return len(self._blobs) + len(self._foreign)

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter([*self._blobs, *self._foreign])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StorageError as failure:
            if error is None:
                raise
            LOG.warning("closing the store in %s after %r: %s", self.folder, error, failure)

    def _pool(self, purpose: str, now: Threads | None = None) -> Threads:
        """This one, or in place of one of which a thread has died, another."""
        if now is not None and not now.died():
            return now
        if now is not None:
            now.retire()
            LOG.warning("%s: a thread that was to %s has died, and others are started", self.folder, purpose)
        return Threads(self._threads, f"apt-disk-{purpose}")

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError(f"the store in {self.folder} is closed")

    def _find(self, key: str) -> Blob:
        if key not in self._blobs:
            raise StorageError(f"{self.folder} holds no blob {key!r}")
        return self._blobs[key]

    def _write_file(self, key: str, path: Path, view: memoryview) -> Blob:
        blob = Blob(path.name, len(view), 0, self.chunk, [0] * -(-len(view) // self.chunk))
        try:
            allocate(path, padded(len(view)))
            file = DirectFile(path, os.O_RDWR)
        except OSError as error:
            raise fault(key, path, 0, error) from error

        def serve(offset: int) -> None:
            piece = view[offset : offset + self.chunk]
            blob.sums[offset // self.chunk] = zlib.crc32(piece)
            file.write(piece, offset)

        def ended(_error: StorageError | None) -> None:
            try:
                blob.mtime_ns = os.fstat(file.descriptor).st_mtime_ns
            finally:
                file.close()

        handle = ReadHandle(key, path, ended)
        handle.start(self._writers, serve, blob.offsets)
        handle.finish()
        return blob

    def _begin_read(
        self, key: str, view: memoryview | None, *, verify: bool, told: Told | None = None
    ) -> ReadHandle:  # fmt: skip
        """Read into `view`, or only compare checksums."""
        file: DirectFile | None = None
        failure: BaseException | None = None
        with self._lock:
            self._check_open()
            self._readers = self._pool("read", self._readers)
            blob = self._find(key)
            path = self.folder / blob.file
            if view is not None and len(view) < blob.nbytes:
                raise InputError(f"blob {key!r} has {blob.nbytes} bytes, and out has room for {len(view)}")
            try:  # under the lock, or a write to the same key could remove the file first
                file = DirectFile(path, os.O_RDONLY)
                size = os.fstat(file.descriptor).st_size
                if size != padded(blob.nbytes):
                    offset = min(size, blob.nbytes)
                    failure = changed(key, path, offset, f"{size} bytes", f"{padded(blob.nbytes)} bytes")
            except OSError as error:
                failure = error
            arrival = self.reads.start(key, blob.nbytes)

        def serve(offset: int) -> None:
            assert file is not None
            size = min(blob.chunk, blob.nbytes - offset)
            judge = partial(compare, blob.sums[offset // blob.chunk], key, path, offset)
            if view is None:
                file.check(size, offset, judge)
                return
            piece = view[offset : offset + size]
            file.read(piece, offset)
            if verify:
                judge(piece)

        handle = ReadHandle(key, path, partial(_read_ended, file, arrival, told))
        if failure is not None:
            handle.fail(failure)
        handle.start(self._readers, serve, blob.offsets if failure is None else range(0))
        return handle

    def _begin_foreign(self, blob: Foreign, key: str, view: memoryview, told: Told | None) -> ReadHandle:
        if len(view) < blob.nbytes:
            raise InputError(f"blob {key!r} has {blob.nbytes} bytes, and out has room for {len(view)}")
        with self._lock:
            self._check_open()
            self._readers = self._pool("read", self._readers)
            arrival = self.reads.start(key, blob.nbytes)
        try:
            file = blob.open()
        except StorageError as error:
            handle = ReadHandle(key, self.folder, partial(_read_ended, None, arrival, told))
            handle.fail(error)
            handle.start(self._readers, lambda _: None, range(0))
            return handle
        handle = ReadHandle(key, self.folder, partial(_read_ended, file, arrival, told))
        handle.start(self._readers, lambda number: file.read(number, view), range(len(blob.chunks())))
        return handle

    def _flush(self) -> None:
        with self._flushing:
            with self._lock:
                fresh = list(self._blobs.items())
            for key, blob in fresh:
                self._sync(key, blob)
            with self._lock:  # so that no file goes before the index names those there are
                for key, blob in self._blobs.items():
                    self._sync(key, blob)
                try:
                    write_index(self.folder, self._blobs)
                except OSError as error:
                    raise StorageError(
                        f"the index of {self.folder} was not written: {error}", state="the one before is still there"
                    ) from error
                self._indexed = True

    def _sync(self, key: str, blob: Blob) -> None:
        if blob.synced:
            return
        path = self.folder / blob.file
        try:
            sync(path)
        except OSError as error:
            if self._blobs.get(key) is blob:  # else it was replaced or deleted meanwhile
                raise fault(key, path, 0, error) from error
        blob.synced = True

    def _open(self) -> dict[str, Blob]:
        """What the folder held at its last flush; files of later writes are removed, as no key leads to them."""
        blobs = read_index(self.folder)
        self._used = self.peak = sum(padded(each.nbytes) for each in blobs.values())
        if self._used > self.capacity:
            raise CapacityError(f"{self.folder} holds {self._used} bytes, and the capacity is {self.capacity}")
        files = {each.file for each in blobs.values()}
        for found in self.folder.iterdir():
            if FILE_NAME.fullmatch(found.name) and found.name not in files:
                remove(found)
        return blobs


def _read_ended(
    file: DirectFile | OpenForeign | None, arrival: Arrival, told: Told | None, error: StorageError | None
) -> None:
    arrival.end(error)
    if told is not None:
        told(error)
    if file is not None:
        file.close()
