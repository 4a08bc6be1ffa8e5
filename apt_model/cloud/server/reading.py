"""Bodies on their way: how many there may be, and which is cut when it is slow."""

import asyncio
import math
import time

from apt_model.cloud.server.config import ServerConfig
from apt_model.cloud.server.refusal import busy

_MAKES_ROOM = 0.5  # seconds of silence


class Reading:
    """A body on its way: who may be cut, and since when it has been silent."""

    def __init__(self, now: float, deadline: float, silent: float, nbytes: int) -> None:
        self.last = now
        self.nbytes = nbytes
        self.cut_by: str | None = None
        self._deadline, self._silent = deadline, silent
        self._task = asyncio.current_task()

    @property
    def due(self) -> float:
        """When it is cut if nothing comes until then; never where it is over."""
        is_over = self._task is None or self.cut_by is not None
        return math.inf if is_over else min(self.last + self._silent, self._deadline)

    def heard(self) -> None:
        """Some of it came."""
        self.last = time.monotonic()

    def extend(self, seconds: float) -> None:
        """It is long, and has more time."""
        self._deadline += seconds

    def cut(self, why: str) -> None:
        """End it: the client is told `why`."""
        if self.cut_by is None and self._task is not None:
            self.cut_by = why
            self._task.cancel()

    def end(self) -> bool:
        """No more time is kept. Whether it was cut; the task goes on."""
        task, self._task = self._task, None
        if task is not None and self.cut_by is not None and hasattr(task, "uncancel"):
            task.uncancel()  # Python 3.11 counts
        return self.cut_by is not None


class Readings:
    """All bodies on their way, within a number of them and of their bytes."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._open: set[Reading] = set()
        self.nbytes = 0
        # One timer for all, which outlasts a short body: setting one for each takes longer than reading it.
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._when = math.inf

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, nbytes: int) -> Reading:
        """Give a body its place. `Refusal` where there is none, not even that of one which is silent."""
        config = self._config
        full = len(self._open) >= config.max_reading or (
            self._open and self.nbytes + nbytes > config.max_inflight * config.max_body
        )
        if full:
            slowest = min((each for each in self._open if each.cut_by is None), key=lambda r: r.last, default=None)
            if slowest is None or time.monotonic() - slowest.last < _MAKES_ROOM:
                raise busy("too many bodies arrive at once")
            slowest.cut("the body came too slowly, and others wait")
            self.end(slowest)
        now, allowed = time.monotonic(), config.body_seconds + nbytes / config.pace
        reading = Reading(now, now + allowed, config.silent_seconds, nbytes)
        self._open.add(reading)
        self.nbytes += nbytes
        self._look_at(reading.due, now)
        return reading

    def end(self, reading: Reading) -> None:
        """Its place is free."""
        if reading in self._open:
            self._open.remove(reading)
            self.nbytes -= reading.nbytes

    def _look_at(self, when: float, now: float) -> None:
        """See to it that there is a look at that moment or before."""
        loop = asyncio.get_running_loop()
        if loop is self._loop and self._when <= when:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._loop, self._when = loop, when
        self._timer = loop.call_later(when - now, self._look)

    def _look(self) -> None:
        """Cut what is due, and come back when the next is."""
        now, self._when = time.monotonic(), math.inf
        for each in self._open:
            if each.due <= now:
                each.cut("the body came too slowly")
        following = min((each.due for each in self._open), default=math.inf)
        if following < math.inf:
            self._look_at(following, now)
