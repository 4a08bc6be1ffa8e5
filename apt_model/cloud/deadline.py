"""A moment by which something must be done, shared by everything that is tried for it."""

import time
from collections.abc import Callable

from apt_model.core.errors import DeadlineError

Clock = Callable[[], float]


class Deadline:
    """Counts down from when it is made.

    Args:
        seconds: how long.
        clock: monotonic seconds.
    """

    __slots__ = ("_clock", "_end", "seconds")

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds until then, 0 when it has passed."""
        return max(self._end - self._clock(), 0.0)

    def check(self, what: str) -> float:
        """Seconds until then; `DeadlineError` that names `what` when it has passed."""
        left = self.left()
        if left <= 0:
            raise DeadlineError(
                f"{what}: no answer within {self.seconds:g} s, all attempts included",
                remedy="raise deadline_s, or compute locally (fallback_local=True)",
            )
        return left
