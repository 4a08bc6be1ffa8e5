"""Bytes that move one way, and how fast: what `stats` tells of a level, and what a trace shows of it. Pure."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from typing_extensions import Self

Watch = Callable[[str, int, int, int], None]
"""Told of what is there: its name, its bytes, and when it set out and was there, in ns of the host's clock."""


class Span(NamedTuple):
    """A time that is over."""

    seconds: float
    begin_ns: int
    """By the host's clock, as `time.perf_counter_ns`; 0 of what a device did while nobody traced."""
    end_ns: int


class Traffic:
    """Bytes count from when they set out, and to the rate once they are there. Any thread may call."""

    def __init__(self) -> None:
        self.bytes = 0
        self.watch: Watch | None = None
        self._lock = threading.Lock()
        self._arrived = self._ns = 0  # bytes whose time is known, and that time
        self._under_way = self._since = 0

    @property
    def seconds(self) -> float:
        """In which bytes came, those under way included."""
        with self._lock:
            return self._busy_ns() / 1e9

    @property
    def gbps(self) -> float | None:
        """GB/s while bytes came; None before the first are there."""
        with self._lock:
            busy = self._busy_ns()
            return self._arrived / busy if self._arrived and busy else None  # bytes a ns are GB a s

    def count(self, nbytes: int) -> None:
        """These set out; `took` may tell when they are there."""
        with self._lock:
            self.bytes += nbytes

    def took(self, name: str, nbytes: int, span: Span) -> None:
        """Bytes that were counted are there, and took this time, in which no others came."""
        with self._lock:
            self._arrived += nbytes
            self._ns += round(span.seconds * 1e9)
        if (watch := self.watch) is not None:
            watch(name, nbytes, span.begin_ns, span.end_ns)

    def start(self, name: str, nbytes: int) -> "Arrival":
        """These set out now, perhaps beside others: what counts is the time in which any are under way."""
        return Arrival(self, name, nbytes, self._set_out(nbytes))

    def _set_out(self, nbytes: int) -> int:
        with self._lock:
            now = time.perf_counter_ns()
            self.bytes += nbytes
            self._since = self._since if self._under_way else now
            self._under_way += 1
            return now

    def _settled(self, arrival: "Arrival", *, there: bool) -> None:
        with self._lock:
            if arrival.over:
                return
            arrival.over, now = True, time.perf_counter_ns()
            self._under_way -= 1
            self._ns += 0 if self._under_way else now - self._since
            self._arrived += arrival.nbytes if there else 0
            self.bytes -= 0 if there else arrival.nbytes
        if there and (watch := self.watch) is not None:
            watch(arrival.name, arrival.nbytes, arrival.began_ns, now)

    def _busy_ns(self) -> int:
        return self._ns + (time.perf_counter_ns() - self._since if self._under_way else 0)


class Arrival:
    """Bytes under way, until `end`."""

    __slots__ = ("began_ns", "name", "nbytes", "over", "traffic")

    def __init__(self, traffic: Traffic, name: str, nbytes: int, began_ns: int) -> None:
        self.traffic, self.name, self.nbytes, self.began_ns, self.over = traffic, name, nbytes, began_ns, False

    def end(self, error: BaseException | None = None) -> None:
        """They are there; after an error they never came. A second call does nothing."""
        self.traffic._settled(self, there=error is None)  # noqa: SLF001 - half of one class

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)
