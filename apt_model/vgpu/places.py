"""Places on level 1 that blobs pass through, and how they get there from the levels below."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor

from apt_model.core.errors import CapacityError, StorageError
from apt_model.vgpu.clock import DEVICE_WAITS, HOST_WAITS
from apt_model.vgpu.disk_files import ReadHandle
from apt_model.vgpu.lanes import Lanes
from apt_model.vgpu.level import Level
from apt_model.vgpu.memory import Memory
from apt_model.vgpu.policy import CYCLIC, Usage
from apt_model.vgpu.traffic import Span

# Seconds below which the device is not said to have waited: two events and a wait that has nothing to wait for.
_NO_WAIT = 20e-6
_NO_TIME = Span(0.0, 0, 0)


class Place:
    """Memory for one blob at a time."""

    __slots__ = ("blob", "free", "memory", "pending", "pins", "ready")

    def __init__(self, memory: Tensor, lanes: Lanes) -> None:
        self.memory, self.blob, self.pins = memory, -1, 0
        self.free, self.ready = lanes.event(), lanes.event()
        self.pending: Any = None  # a read of the disk into it, or the staging place whose read it waits for


class Source:
    """Where a blob that is streamed lives."""

    __slots__ = ("host", "key", "name", "nbytes")

    def __init__(self, name: str, nbytes: int, host: Tensor | None, key: str | None) -> None:
        self.name, self.nbytes, self.host, self.key = name, nbytes, host, key


class Stage:
    """Memory on the host between the disk and an accelerator."""

    __slots__ = ("blob", "copied", "memory", "read")

    def __init__(self, memory: Tensor, lanes: Lanes) -> None:
        self.memory, self.blob, self.copied = memory, -1, lanes.event()
        self.read: Any = None


class Places:
    """Brings blobs to level 1 ahead of their use; never waits for the device, and only for the disk when it has to.

    Not for several threads at once: the caller holds a lock.
    """

    def __init__(
        self, slots: list[Tensor], stages: list[Tensor], sources: dict[int, Source], memory: Memory,
        policy: str = CYCLIC,
    ) -> None:  # fmt: skip
        lanes = self.lanes = memory.lanes
        self._sources, self._level, self._store = sources, memory.first, memory.store
        self._below, self._clock = memory.host, memory.clock
        self.all = [Place(each, lanes) for each in slots]
        self._stages = [Stage(each, lanes) for each in stages]
        self.where: dict[int, Place] = {}
        self._usage = None if policy == CYCLIC else Usage(policy)
        self.overwritten: Callable[[Place], None] = lambda _: None  # told before a place's content goes

    def hold(self, blob: int, ahead: Iterable[int]) -> Place:
        """A blob's place, from which it does not go until `let`; whoever computes next waits for it on the device."""
        self.lanes.refuse_capture()
        if self._usage is not None:
            self._usage.used(blob)
        place = self.where.get(blob)
        there = place is not None
        # Where the host may have to wait, the device's wait begins before that; else the host's own work is none.
        late = place is None or place.pending is not None
        asked = self._clock.mark(self.lanes.compute()) if late else None
        if place is None:
            place = self._victim(set(ahead))
            if self._staging(blob):
                self._free_stage(blob)
            self._start(blob, place)
        place.pins += 1
        try:
            waited = self._arrive(place)
        except BaseException:
            place.pins -= 1
            self._forget(place)
            raise
        if self.lanes.streams:
            self._wait(place, asked, there)
        else:
            self._waited(self._sources[blob].name, there, threading.get_ident(), waited)
        return place

    @property
    def foresees(self) -> bool:
        """Whether blobs are brought ahead of their use."""
        return self._usage is None

    def let(self, place: Place) -> None:
        """End a `hold`; what computes up to here may still read it."""
        place.pins -= 1
        if place.pins == 0:
            place.free.record(self.lanes.compute())

    def bring(self, ahead: Iterable[int]) -> None:
        """Begin to bring what comes next, as far as there is room; `ahead` are different blobs in order."""
        self._pump()
        if not self.foresees:
            return
        idle = [place for place in self.all if place.pins == 0]
        wanted: list[int] = []
        deeper = len(idle) + len(self._stages)
        for blob in ahead:
            if blob in self.where and self.where[blob].pins:
                continue
            wanted.append(blob)
            if len(wanted) >= deeper:
                break
        soon = wanted[: len(idle)]
        keep = set(soon)
        victims = [place for place in idle if place.blob not in keep]
        victims.sort(key=lambda place: place.blob >= 0)
        if self._stages:
            self._read_ahead([blob for blob in wanted if self._sources[blob].host is None])
        for blob in soon:
            if blob not in self.where and not (self._staging(blob) and self._stage_for(blob) is None):
                self._start(blob, victims.pop(0))

    def changed(self, blob: int) -> None:
        """What a blob's home holds has changed: forget what was read of it before."""
        for stage in self._stages:
            if stage.blob == blob:
                self._settle(stage)
                stage.blob = -1

    def void(self, place: Place) -> None:
        """A place's content is not what its blob is: whoever needs that next has it brought again."""
        if place.blob >= 0:
            self.overwritten(place)
            self._forget(place)

    def moved(self, blob: int, host: Tensor) -> None:
        """A blob lives in host memory from here on."""
        self._sources[blob].host = host

    def drain(self) -> None:
        """Wait for everything that is under way, and forget what is where."""
        for place in self.all:
            self._settle(place.pending)
        for stage in self._stages:
            self._settle(stage.read)
            stage.copied.synchronize()
        for place in self.all:
            place.ready.synchronize()
            place.pins = 0
            self._forget(place)

    def _wait(self, place: Place, asked: Any, there: bool) -> None:
        """Let the computing stream wait for the copy, and take the time of it, since `asked` or now."""
        stream = self.lanes.compute()
        asked = self._clock.mark(stream) if asked is None else asked
        stream.wait_event(place.ready)
        told = partial(self._waited, self._sources[place.blob].name, there, threading.get_ident())
        self._clock.between(asked, self._clock.mark(stream), told)

    def _waited(self, name: str, there: bool, thread: int, span: Span) -> None:
        """Count how a block was found, after a wait of this length."""
        waited = span.seconds >= _NO_WAIT
        self._level.found(there and not waited, span.seconds)
        if waited and (waits := self._clock.waits) is not None:
            waits(DEVICE_WAITS, thread, name, span.begin_ns, span.end_ns)

    def _victim(self, ahead: set[int]) -> Place:
        idle = [place for place in self.all if place.pins == 0]
        if not idle:
            raise CapacityError(
                f"all {len(self.all)} slots of level 1 are in use by blocks that run now, and one more block is needed",
                remedy="give level 1 more, or the stack more slots",
            )
        usage = self._usage
        if usage is not None:
            return min(idle, key=lambda place: (place.blob >= 0, usage.worth(place.blob)))
        return min(idle, key=lambda place: (place.blob >= 0, place.blob in ahead))

    def _start(self, blob: int, place: Place) -> None:
        """Begin to bring a blob to a place, whose own goes."""
        if place.blob >= 0:
            self._settle(place.pending)
            self.overwritten(place)
            self._level.evicted()
            del self.where[place.blob]
        place.blob, place.pending = blob, None
        self.where[blob] = place
        source = self._sources[blob]
        if source.host is not None:
            self._copy(source.host, place, source)
        elif self._stages:
            place.pending = self._staged(blob)
            self._pump()
        else:
            place.pending = self._read_to(self._level, source, place.memory)

    def _copy(self, memory: Tensor, place: Place, source: Source) -> None:
        lane, nbytes, came = self.lanes.copy, source.nbytes, self._level.came
        lane.wait_event(place.free)
        begin = self._clock.mark(lane)
        with self.lanes.copying():
            place.memory[:nbytes].copy_(memory[:nbytes], non_blocking=self.lanes.streams)
        end = self._clock.mark(lane)
        place.ready.record(lane)
        came.count(nbytes)
        if self._below is not None:
            self._below.went.count(nbytes)
        self._clock.between(begin, end, partial(came.took, source.name, nbytes))

    def _arrive(self, place: Place) -> Span:
        """Until the copy is at least under way; how long the host had to wait for the disk."""
        pending = place.pending
        if pending is None:
            return _NO_TIME
        read = pending.read if isinstance(pending, Stage) else pending
        waited = self._until(read.done, read.result, f"disk: {self._sources[place.blob].name}")
        self._land(place)
        return waited

    def _land(self, place: Place) -> None:
        """The disk's read for a place is done: from a stage its copy begins."""
        pending, place.pending = place.pending, None
        if isinstance(pending, Stage):
            self._copy(pending.memory, place, self._sources[place.blob])
            pending.copied.record(self.lanes.copy)

    def _pump(self) -> None:
        """Begin copies whose reads are done."""
        for place in self.all:
            pending = place.pending
            if isinstance(pending, Stage) and pending.read.done():
                with contextlib.suppress(StorageError):  # which whoever needs the blob is told
                    pending.read.result()
                    self._land(place)

    def _staging(self, blob: int) -> bool:
        """Whether a blob comes from the disk by way of the host."""
        return bool(self._stages) and self._sources[blob].host is None

    def _stage_for(self, blob: int) -> Stage | None:
        """The stage that has a blob, or one that nobody waits for."""
        waiting = {id(place.pending) for place in self.all}
        free = [stage for stage in self._stages if stage.blob == blob or id(stage) not in waiting]
        return min(free, key=lambda stage: stage.blob != blob, default=None)

    def _free_stage(self, blob: int) -> None:
        """See that there is a stage for a blob that is needed now: what waits for one is brought to its place first."""
        while self._stage_for(blob) is None:
            place = next(place for place in self.all if isinstance(place.pending, Stage))
            try:
                self._arrive(place)
            except StorageError:  # which whoever needs that one is told
                self._forget(place)

    def _staged(self, blob: int) -> Stage:
        stage = self._stage_for(blob)
        assert stage is not None
        return stage if stage.blob == blob else self._read(blob, stage)

    def _read_ahead(self, blobs: list[int]) -> None:
        """Begin reads of the first of `blobs`, into stages of which nobody needs the content."""
        soon = [blob for blob in blobs if blob not in self.where or self.where[blob].pending is not None]
        soon = soon[: len(self._stages)]
        waiting = {id(place.pending) for place in self.all}
        idle = [
            stage for stage in self._stages
            if id(stage) not in waiting and stage.blob not in soon and stage.copied.query()
        ]  # fmt: skip
        staged = {stage.blob for stage in self._stages}
        for blob in soon:
            if blob not in staged and idle:
                self._read(blob, idle.pop())

    def _read(self, blob: int, stage: Stage) -> Stage:
        if stage.read is not None:
            self._settle(stage.read)
        self._until(stage.copied.query, stage.copied.synchronize, "device: a copy from a stage")
        assert self._below is not None
        stage.blob, stage.read = blob, self._read_to(self._below, self._sources[blob], stage.memory)
        return stage

    def _read_to(self, level: Level, source: Source, memory: Tensor) -> ReadHandle:
        """Begin a read of the disk into a level's memory."""
        assert self._store is not None
        assert source.key is not None
        arrival = level.came.start(source.name, source.nbytes)
        try:
            return self._store.read_async(source.key, memory, told=arrival.end)
        except BaseException as error:
            arrival.end(error)
            raise

    def _until(self, over: Callable[[], bool], wait: Callable[[], None], what: str) -> Span:
        """Have the host wait, and raise what `wait` raises; how long, none where it was over before."""
        if over():
            wait()
            return _NO_TIME
        begin = time.perf_counter_ns()
        try:
            wait()
        finally:
            end = time.perf_counter_ns()
            if (waits := self._clock.waits) is not None:
                waits(HOST_WAITS, threading.get_ident(), what, begin, end)
        return Span((end - begin) / 1e9, begin, end)

    def _settle(self, pending: Any) -> None:
        """Until nothing writes to the memory of a read any more, whatever became of it."""
        read = pending.read if isinstance(pending, Stage) else pending
        if read is not None:
            with contextlib.suppress(StorageError):
                self._until(read.done, read.result, "disk: a read that nobody needs any more")

    def _forget(self, place: Place) -> None:
        if place.blob >= 0:
            self._settle(place.pending)
            if isinstance(place.pending, Stage):
                place.pending.blob = -1
            del self.where[place.blob]
            place.blob, place.pending = -1, None
