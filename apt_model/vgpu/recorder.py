"""What happened when, on lanes whose slices follow each other or lie one in another. Pure."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from apt_model.vgpu.traffic import Watch


class Slice(NamedTuple):
    """Something that took a time, in ns of the host's clock."""

    begin_ns: int
    end_ns: int
    name: str
    said: dict[str, int]


class Edge(NamedTuple):
    """A slice begins, or without a name the innermost one ends."""

    at_ns: int
    name: str | None
    said: dict[str, int]


class Recorder:
    """Slices by lane, and counts over time, from the host's `begin_ns` on; any thread may tell."""

    def __init__(self, begin_ns: int) -> None:
        self.begin_ns = begin_ns
        self._arrivals: dict[str, list[Slice]] = {}
        self._by_thread: defaultdict[str, dict[int, list[Slice]]] = defaultdict(dict)
        self.counts: dict[str, list[tuple[int, int]]] = {}
        self._order: list[str] = []
        self._lock = threading.Lock()

    def arrivals(self, lane: str) -> Watch:
        """What to tell of bytes that came; of those that came side by side each is shown from when it was first."""
        self._order.append(lane)
        slices = self._arrivals[lane] = []

        def came(name: str, nbytes: int, begin_ns: int, end_ns: int) -> None:
            slices.append(Slice(begin_ns, end_ns, name, {"bytes": nbytes}))

        return came

    def threads(self, lane: str) -> None:
        """Make room for a lane of each thread that shows something on `lane`."""
        self._order.append(lane)

    def show(self, lane: str, thread: int, name: str, begin_ns: int, end_ns: int) -> None:
        """Something of one thread's, before or after the others of it or within one of them."""
        with self._lock:
            slices = self._by_thread[lane].setdefault(thread, [])
        slices.append(Slice(begin_ns, end_ns, name, {}))

    def counter(self, name: str, now_ns: Callable[[], int]) -> Callable[[int], None]:
        """What to tell of a count that is another from now on."""
        values = self.counts[name] = []
        return partial(_told, values, now_ns)

    def lanes(self) -> Iterator[tuple[str, list[Edge]]]:
        """Each lane with its edges in order; where several threads have one, the second and later are numbered."""
        for lane in self._order:
            if lane in self._arrivals:
                yield lane, self._edges(in_turn(self._arrivals[lane]))
                continue
            for number, slices in enumerate(list(self._by_thread[lane].values()), 1):
                yield lane if number == 1 else f"{lane} (thread {number})", self._edges(slices)

    def _edges(self, slices: list[Slice]) -> list[Edge]:
        return list(edges([_from(each, self.begin_ns) for each in slices if each.end_ns >= self.begin_ns]))


def in_turn(slices: list[Slice]) -> list[Slice]:
    """Slices that overlap as a queue of one: each ends when it did, and begins when the one before has ended."""
    found, last = [], 0
    for each in sorted(slices, key=lambda each: each.end_ns):
        queued = max(0, last - each.begin_ns)
        said = {**each.said, "queued_ns": queued} if queued else each.said
        found.append(each._replace(begin_ns=max(each.begin_ns, last), said=said))
        last = each.end_ns
    return found


def edges(slices: list[Slice]) -> Iterator[Edge]:
    """Begins and ends, nested; of slices that cross, the inner one is cut where the outer one ends."""
    inside: list[int] = []
    for each in sorted(slices, key=lambda each: (each.begin_ns, -each.end_ns)):
        while inside and inside[-1] <= each.begin_ns:
            yield Edge(inside.pop(), None, {})
        yield Edge(each.begin_ns, each.name, each.said)
        inside.append(min([each.end_ns, *inside[-1:]]))
    while inside:
        yield Edge(inside.pop(), None, {})


def _from(each: Slice, begin_ns: int) -> Slice:
    """A slice without what was before the recording."""
    return each._replace(begin_ns=max(each.begin_ns, begin_ns))


def _told(values: list[tuple[int, int]], now_ns: Callable[[], int], value: int) -> None:
    values.append((now_ns(), value))
