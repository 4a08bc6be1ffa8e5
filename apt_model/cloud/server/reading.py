"""Bodies on their way: how many there may be, and which is cut when it is slow."""

import asyncio
import time

from apt_model.cloud.server.config import ServerConfig
from apt_model.cloud.server.refusal import busy

_MAKES_ROOM = 0.5  # seconds of silence


class Reading:
    """A body on its way: who may be cut, and since when it has been silent."""

    def __init__(self, deadline: float, silent: float, nbytes: int) -> None:
        self.last = time.monotonic()
        self.nbytes = nbytes
        self.cut_by: str | None = None
        self._deadline, self._silent = deadline, silent
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._timer = self._loop.call_later(min(silent, deadline - self.last), self._look)

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
        self._timer.cancel()
        task, self._task = self._task, None
        if task is not None and self.cut_by is not None and hasattr(task, "uncancel"):
            task.uncancel()  # Python 3.11 counts
        return self.cut_by is not None

    def _look(self) -> None:
        now = time.monotonic()
        due = min(self.last + self._silent, self._deadline)
        if now >= due:
            self.cut("the body came too slowly")
        else:
            self._timer = self._loop.call_later(due - now, self._look)


class Readings:
    """All bodies on their way, within a number of them and of their bytes."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._open: set[Reading] = set()
        self.nbytes = 0

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
        allowed = config.body_seconds + nbytes / config.pace
        reading = Reading(time.monotonic() + allowed, config.silent_seconds, nbytes)
        self._open.add(reading)
        self.nbytes += nbytes
        return reading

    def end(self, reading: Reading) -> None:
        """Its place is free."""
        if reading in self._open:
            self._open.remove(reading)
            self.nbytes -= reading.nbytes
