"""When things begin and end on the device that computes, found out without waiting for it."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from apt_model.vgpu.lanes import Lanes
from apt_model.vgpu.traffic import Span

# Spans that wait to be looked at; with more, whoever marks looks.
_MOST = 512


DEVICE_WAITS, HOST_WAITS = "blocks wait", "the host waits"


class Waits(Protocol):
    """Told of a wait that is over."""

    def __call__(self, lane: str, thread: int, name: str, begin_ns: int, end_ns: int) -> None:
        """`lane` is DEVICE_WAITS or HOST_WAITS, in the order of `thread`, for what, and when by the host's clock."""


class _Timed(NamedTuple):
    begin: Any
    end: Any
    then: Callable[[Span], None]


class Clock:
    """Marks in streams: events, used again, on a device; where there are no streams, the time.

    `between` says what is done with the time between two marks. On a device that is when `poll` finds both past, in
    the order in which `between` was called. Any thread may call. `waits` is None unless somebody traces.
    """

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self.waits: Waits | None = None
        self._pending: deque[_Timed] = deque()
        self._spare: deque[Any] = deque()
        self._lock = threading.Lock()
        self._reference: tuple[Any, int] | None = None  # an event, and when it was by the host's clock

    def mark(self, stream: Any) -> Any:
        """What `stream` has come to when everything before this call is done."""
        if not self._lanes.streams:
            return time.perf_counter_ns()
        try:
            event = self._spare.pop()
        except IndexError:
            event = self._lanes.event(timed=True)
        event.record(stream)
        return event

    def between(self, begin: Any, end: Any, then: Callable[[Span], None]) -> None:
        """Have `then` told the time between two marks, which are used up."""
        if not self._lanes.streams:
            then(Span((end - begin) / 1e9, begin, end))
            return
        self._pending.append(_Timed(begin, end, then))
        if len(self._pending) >= _MOST:
            self.poll()

    def poll(self) -> None:
        """Look at what is past, as far as the device has come."""
        with self._lock:
            while self._pending and self._pending[0].end.query():
                begin, end, then = self._pending.popleft()
                then(Span(begin.elapsed_time(end) / 1e3, self._at(begin), self._at(end)))
                self._spare += (begin, end)

    def settle(self) -> None:
        """Wait for the device: what was marked is then past, and told."""
        self._lanes.synchronize()
        self.poll()

    def refer(self) -> None:
        """Wait for the device, and from here on know when marks were by the host's clock, until `forget`."""
        self.settle()
        if self._lanes.streams:
            event = self._lanes.event(timed=True)
            event.record(self._lanes.compute())
            event.synchronize()
            self._reference = event, time.perf_counter_ns()

    def forget(self) -> None:
        """Undo `refer`."""
        self._reference = None

    def _at(self, event: Any) -> int:
        """When an event was. As floats of 32 bits, times are right to 2 us after 16 s, and in order."""
        if self._reference is None:
            return 0
        first, ns = self._reference
        return ns + round(first.elapsed_time(event) * 1e6)
