"""A clock's run of passes, one after another: the decisions of `places.py` and `streaming.py`, with times. Pure.

Four things have a clock: the host, the device that computes, the lane that copies to it, and the disk. The host
launches ahead of the device, and waits for it when a pass ends; copies for the next pass go on meanwhile.
"""

import dataclasses
from collections.abc import Iterator, Sequence

# Passes before those that count, and how many count.
_BEFORE, _COUNTED = 3, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
    """What is to be run; seconds, bytes, and bytes a second."""

    needs: Sequence[Sequence[int]]
    """Of each block, the blobs that it needs and that are streamed."""
    device_s: Sequence[float]
    """Of each block."""
    host_s: Sequence[float]
    """Of each block: to launch it."""
    nbytes: Sequence[int]
    """Of each blob."""
    on_disk: Sequence[bool]
    slots: int
    stages: int
    """Places on the host between the disk and the link; 0: the disk is read into the slots."""
    link: float
    disk: float
    hook_s: float = 0.0
    serial: bool = False
    """Copies and products take turns, as on a CPU; reads of the disk go on."""


@dataclasses.dataclass(frozen=True)
class Steady:
    """Of one pass, in seconds."""

    pass_s: float
    link_s: float
    """In which the link is busy."""
    disk_s: float


@dataclasses.dataclass(eq=False)
class _Stage:
    blob: int = -1
    read: float = 0.0  # when what is read is there
    copied: float = 0.0


@dataclasses.dataclass(eq=False)
class _Place:
    blob: int = -1
    free: float = 0.0
    ready: float = 0.0
    pending: "_Stage | None" = None


def run(passes: Passes) -> Steady:
    """Run until passes are like each other, and give their mean."""
    clocks = _Clocks(passes)
    for _ in range(_BEFORE):
        clocks.one_pass()
    begin, link, disk = clocks.host, clocks.link_s, clocks.disk_s
    for _ in range(_COUNTED):
        clocks.one_pass()
    return Steady(
        (clocks.host - begin) / _COUNTED, (clocks.link_s - link) / _COUNTED, (clocks.disk_s - disk) / _COUNTED
    )


class _Clocks:
    """The state between two steps of the host."""

    def __init__(self, passes: Passes) -> None:
        self._of = passes
        self.host = self.device = self._lane = self._disk = 0.0
        self.link_s = self.disk_s = 0.0
        self._places = [_Place() for _ in range(passes.slots)]
        self._stages = [_Stage() for _ in range(passes.stages)]
        self._where: dict[int, _Place] = {}
        self._held: set[int] = set()
        self._bring(self._ahead(-1))

    def one_pass(self) -> None:
        """All blocks, and a wait for the last."""
        for block, need in enumerate(self._of.needs):
            self._enter(block, need)
            self._compute(block, need)
            if need:
                for blob in need:
                    self._where[blob].free = self.device
                self._held.clear()
                self._bring(self._ahead(block))
        self.host = max(self.host, self.device)

    def _enter(self, block: int, need: Sequence[int]) -> None:
        if not need:
            return
        self.host += self._of.hook_s
        ahead = list(self._ahead(block))
        for blob in need:
            if blob not in self._where:
                self._start(blob, self._victim(ahead))
            self._arrive(self._where[blob])
            self._held.add(blob)
        self._bring(ahead)

    def _compute(self, block: int, need: Sequence[int]) -> None:
        ready = max((self._where[blob].ready for blob in need), default=0.0)
        device_s, host_s = self._of.device_s[block], self._of.host_s[block]
        if self._of.serial:
            self.host = self.device = max(self.host, ready) + device_s + host_s
            return
        begin = max(self.device, self.host, ready)
        self.host += host_s
        self.device = max(begin + device_s, self.host)

    def _ahead(self, block: int) -> Iterator[int]:
        """Blobs after a block, each once."""
        count, seen = len(self._of.needs), set[int]()
        for step in range(1, count + 1):
            for blob in self._of.needs[(block + step) % count]:
                if blob not in seen:
                    seen.add(blob)
                    yield blob

    def _idle(self) -> list[_Place]:
        return [place for place in self._places if place.blob not in self._held]

    def _victim(self, ahead: list[int]) -> _Place:
        return min(self._idle(), key=lambda place: (place.blob >= 0, place.blob in ahead))

    def _bring(self, ahead: Iterator[int] | list[int]) -> None:
        """Begin what comes next, as far as there is room."""
        self._pump()
        idle = self._idle()
        wanted = [blob for blob in ahead if blob not in self._held][: len(idle) + len(self._stages)]
        soon = wanted[: len(idle)]
        victims = sorted((place for place in idle if place.blob not in soon), key=lambda place: place.blob >= 0)
        if self._stages:
            self._read_ahead([blob for blob in wanted if self._of.on_disk[blob]])
        for blob in soon:
            if blob not in self._where and not (self._staged(blob) and self._stage_for(blob) is None):
                self._start(blob, victims.pop(0))

    def _staged(self, blob: int) -> bool:
        return bool(self._stages) and self._of.on_disk[blob]

    def _start(self, blob: int, place: _Place) -> None:
        """Begin to bring a blob to a place."""
        if place.blob >= 0:
            del self._where[place.blob]
        place.blob, place.pending = blob, None
        self._where[blob] = place
        if self._staged(blob):
            stage = self._stage_for(blob) or self._free_stage(place)
            place.pending = stage if stage.blob == blob else self._read(blob, stage)
            self._pump()
        elif self._of.on_disk[blob]:
            place.ready = self._take_disk(blob)
        else:
            self._copy(place)

    def _copy(self, place: _Place) -> None:
        taken = self._of.nbytes[place.blob] / self._of.link
        self.link_s += taken
        if self._of.serial:
            self.host += taken
            place.ready = self.host
        else:
            self._lane = place.ready = max(self._lane, place.free, self.host) + taken

    def _take_disk(self, blob: int) -> float:
        taken = self._of.nbytes[blob] / self._of.disk
        self.disk_s += taken
        self._disk = max(self._disk, self.host) + taken
        return self._disk

    def _arrive(self, place: _Place) -> None:
        """The host waits for the disk, not for the link."""
        if place.pending is not None:
            self.host = max(self.host, place.pending.read)
            self._land(place)

    def _land(self, place: _Place) -> None:
        stage, place.pending = place.pending, None
        assert stage is not None
        self._copy(place)
        stage.copied = place.ready

    def _pump(self) -> None:
        for place in self._places:
            if place.pending is not None and place.pending.read <= self.host:
                self._land(place)

    def _stage_for(self, blob: int) -> _Stage | None:
        waiting = {id(place.pending) for place in self._places}
        free = [stage for stage in self._stages if stage.blob == blob or id(stage) not in waiting]
        return min(free, key=lambda stage: stage.blob != blob, default=None)

    def _free_stage(self, new: _Place) -> _Stage:
        """What waits for a stage is brought to its place first."""
        place = next(place for place in self._places if place.pending is not None and place is not new)
        stage = place.pending
        assert stage is not None
        self._arrive(place)
        return stage

    def _read_ahead(self, blobs: list[int]) -> None:
        soon = [blob for blob in blobs if blob not in self._where or self._where[blob].pending is not None]
        soon = soon[: len(self._stages)]
        waiting = {id(place.pending) for place in self._places}
        idle = [
            stage for stage in self._stages
            if id(stage) not in waiting and stage.blob not in soon and stage.copied <= self.host
        ]  # fmt: skip
        staged = {stage.blob for stage in self._stages}
        for blob in soon:
            if blob not in staged and idle:
                self._read(blob, idle.pop())

    def _read(self, blob: int, stage: _Stage) -> _Stage:
        self.host = max(self.host, stage.copied)
        stage.blob, stage.read = blob, self._take_disk(blob)
        return stage
