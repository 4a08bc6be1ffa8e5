"""The host's memory as a level: one mapping with a hard cap, whose pages are there and pinned before they are used.

torch's own pinned memory comes in powers of two, and its pages one after another. Here threads bring huge pages, and
the driver gets them as few ranges: benchmarks/vgpu/arena.py has the rates.
"""

import bisect
import dataclasses
import logging
import mmap
import os
import threading
import weakref
from typing import Protocol, final

import torch

from apt_model.core.errors import CapacityError, DeviceError, InputError
from apt_model.core.system.device import Device
from apt_model.vgpu import host_pages
from apt_model.vgpu.units import PAGE, padded, shown

LOG = logging.getLogger(__name__)
_SEGMENT, _PREPARED = 2**28, 2**33  # least of a segment, and most of one that is made ahead of its use


class Pin(Protocol):
    """What keeps host memory in place, so that a device copies it by itself."""

    def register(self, address: int, nbytes: int) -> bool:
        """Pin the range; False or `DeviceError` where that is refused."""

    def unregister(self, address: int) -> None:
        """Let go of the range that begins there."""


@dataclasses.dataclass(frozen=True)
class DevicePin:
    """A device's driver as a `Pin`."""

    device: Device

    def register(self, address: int, nbytes: int) -> bool:
        """As `Device.register_host`."""
        return self.device.register_host(address, nbytes)

    def unregister(self, address: int) -> None:
        """As `Device.unregister_host`."""
        self.device.unregister_host(address)


class _Segment:
    """A part of the mapping that is pinned as one range, as a copy across two fails; its free places, in order."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size, self.used, self.pinned = start, size, 0, False
        self.free = [(start, size)]

    def take(self, size: int) -> int | None:
        """Where the first free place of `size` bytes begins, now taken."""
        for i, (start, length) in enumerate(self.free):
            if length >= size:
                self.free[i : i + 1] = [(start + size, length - size)] if length > size else []
                self.used += size
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Free the place, as one with the free ones at either end."""
        self.used -= size
        i, end = bisect.bisect(self.free, (start, 0)), start + size
        if i < len(self.free) and self.free[i][0] == end:
            end += self.free.pop(i)[1]
        if i and sum(self.free[i - 1]) == start:
            i -= 1
            start = self.free.pop(i)[0]
        self.free.insert(i, (start, end - start))


@final
class Region:
    """Bytes of an arena, until they are given back."""

    def __init__(self, arena: "HostArena", segment: _Segment, start: int, tensor: torch.Tensor) -> None:
        self.tensor, self.nbytes, self.address = tensor, tensor.nbytes, tensor.data_ptr()
        self.segment, self.start = segment, start
        self.arena: weakref.ref[HostArena] | None = weakref.ref(arena)  # None: given back

    @property
    def pinned(self) -> bool:
        """Whether a device copies these bytes by itself."""
        return self.segment.pinned


@final
class HostArena:
    """Host memory that is taken and given back in regions, never more of it than `capacity` bytes.

    Memory is committed in segments, when it is first needed or by `prepare`, and stays until `close`. Where no place
    is large enough, free neighbours become one segment, which is pinned anew. Tensors of regions outlive the arena:
    closed, it is unpinned at once, and its memory goes with the last of them. Whoever gives a region back, or closes,
    has waited for copies from and to it. No object's finaliser may give: it could run inside a call of the arena.

    Args:
        capacity: bytes, less what is no whole page.
        pin: pins what is committed; None, or one that refuses: plain memory.
        threads: how many bring pages; None: one a core, up to 16.
    """

    def __init__(self, capacity: int, *, pin: Pin | None = None, threads: int | None = None) -> None:
        self.capacity = capacity // PAGE * PAGE
        if self.capacity < PAGE or (threads is not None and threads < 1):
            raise InputError(f"host arena: expected at least a page and a thread, got {capacity} bytes, {threads}")
        self.committed = self.used = self.peak = 0
        self._threads = threads or host_pages.default_threads()
        self._segments: list[_Segment] = []  # in order, from the mapping's begin to `committed`
        self._lock, self._warned = threading.Lock(), False
        self._pin, self._pinned = pin, dict[int, _Segment]()  # by address
        memory, self._skip, self._address = host_pages.reserve(self.capacity)
        self._memory: mmap.mmap | None = memory
        self._finalizer = weakref.finalize(self, _unpin_all, pin, self._pinned, os.getpid(), memory)

    @property
    def pinned_bytes(self) -> int:
        """Bytes that a device copies by itself."""
        return sum(segment.size for segment in self._segments if segment.pinned)

    def take(self, nbytes: int) -> Region:
        """A region at a whole page, whatever is in it; `CapacityError` where no place is large enough."""
        if nbytes < 1:
            raise InputError(f"host arena: expected bytes above 0, got {nbytes}")
        size = padded(nbytes)
        with self._lock:
            memory = self._opened()
            segment, start = self._place(size)
            self.used += size
            self.peak = max(self.peak, self.used)
            tensor = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=self._skip + start)
            return Region(self, segment, start, tensor)

    def give(self, region: Region) -> None:
        """Free a region's bytes; its tensor is not to be used again."""
        with self._lock:
            if region.arena is None or region.arena() is not self:
                state = "was given back before" if region.arena is None else "is another arena's"
                raise InputError(f"host arena: expected a region that was taken here, got one that {state}")
            region.arena, size = None, padded(region.nbytes)
            region.segment.give(region.start, size)
            self.used -= size

    def prepare(self, nbytes: int) -> None:
        """Commit now until `nbytes` are committed in all, so that nothing waits for pages later."""
        with self._lock:
            self._opened()
            if nbytes > self.capacity:
                raise CapacityError(f"host arena: {shown(nbytes)} asked at once, capacity {shown(self.capacity)}")
            host_pages.require_free(nbytes - self.committed)
            while self.committed < nbytes:
                self._build([], min(nbytes - self.committed, _PREPARED))

    def close(self) -> None:
        """Unpin everything; the memory goes when no tensor lies in it any more. Closing twice is fine."""
        with self._lock:
            self._finalizer()
            self._memory = None
            self._segments, self.committed = [], 0

    def _opened(self) -> mmap.mmap:
        if self._memory is None:
            raise InputError("host arena: it is closed")
        return self._memory

    def _place(self, size: int) -> tuple[_Segment, int]:
        """The first place of `size` bytes, in a new segment where there is none."""
        for segment in self._segments:
            if (start := segment.take(size)) is not None:
                return segment, start
        segment = self._make_room(size)
        start = segment.take(size)
        assert start is not None
        return segment, start

    def _make_room(self, size: int) -> _Segment:
        """A segment with `size` bytes in one place: of free neighbours, or with memory that was not committed yet."""
        first = idle = largest = 0  # neighbours in which nothing is taken: where they begin, and their bytes
        for i, segment in enumerate(self._segments):
            first, idle = (i + 1, 0) if segment.used else (first, idle + segment.size)
            if idle >= size:
                return self._build(self._segments[first : i + 1], 0)
            largest = max(largest, idle, *(length for _, length in segment.free), 0)
        last = idle + self.capacity - self.committed
        if last >= size:
            return self._build(self._segments[first:], size - idle)
        raise CapacityError(
            f"host arena: {shown(size)} asked, {shown(self.capacity - self.used)} free, the largest piece "
            f"{shown(max(largest, last))}, capacity {shown(self.capacity)}",
            remedy="give regions back first, or give the host's level more (capacity_mb)",
        )

    def _build(self, joined: list[_Segment], more: int) -> _Segment:
        """One segment of free neighbours, and of at least `more` bytes that are committed for it."""
        if more:
            room = self.capacity - self.committed
            more, ample = (min(padded(size), room) for size in (more, max(more, _SEGMENT)))
            host_pages.require_free(more)
            more = ample if host_pages.is_free(ample) else more
            host_pages.bring(self._address + self.committed, more, self._threads)
        for segment in joined:
            if segment.pinned:
                _unpin(self._pin, self._pinned, self._address + segment.start)
        whole = _Segment(joined[0].start if joined else self.committed, sum(part.size for part in joined) + more)
        first = self._segments.index(joined[0]) if joined else len(self._segments)
        self._segments[first : first + len(joined)] = [whole]
        self.committed += more
        self._register(whole)
        return whole

    def _register(self, segment: _Segment) -> None:
        """Have the segment pinned; refused, it stays as it is, which is said once."""
        if self._pin is None:
            return
        address, why = self._address + segment.start, "the device pins no memory"
        try:
            segment.pinned = self._pin.register(address, segment.size)
        except DeviceError as error:
            why = error.message
        if segment.pinned:
            self._pinned[address] = segment
            host_pages.keep_from_children(address, segment.size, keep=True)
        elif not self._warned:
            self._warned = True
            LOG.warning("host arena: %s stay pageable, and copies slower: %s", shown(segment.size), why)


def _unpin(pin: Pin | None, pinned: dict[int, _Segment], address: int) -> None:
    segment = pinned.pop(address)
    segment.pinned = False
    assert pin is not None
    try:
        pin.unregister(address)
    except DeviceError as error:
        LOG.warning("host arena: %s stay pinned: %s", shown(segment.size), error.message)
    host_pages.keep_from_children(address, segment.size, keep=False)


def _unpin_all(pin: Pin | None, pinned: dict[int, _Segment], process: int, _memory: mmap.mmap) -> None:
    """Let go of every range while the mapping is held; a forked process has the books, and not the registrations."""
    if process == os.getpid():
        for address in list(pinned):
            _unpin(pin, pinned, address)
