"""A circuit breaker an endpoint: after failures in a row it is left alone for a while, then tried with one request."""

import threading
import time
from typing import Literal

from apt_model.cloud.deadline import Clock

State = Literal["closed", "open", "half-open"]


class Breaker:
    """Closed, open for 15 s (doubled at every failed probe, up to 60 s), half-open with a single probe.

    What the endpoint refuses (4xx) is an answer: it closes the breaker and never trips it.

    Args:
        threshold: failures in a row that open it; a severe one opens it at once.
        first: seconds it stays open at first.
        longest: and at most.
        clock: monotonic seconds.
    """

    def __init__(
        self, *, threshold: int = 3, first: float = 15.0, longest: float = 60.0, clock: Clock = time.monotonic
    ) -> None:
        self.threshold, self.first, self.longest = threshold, first, longest
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._wait = first
        self._until: float | None = None
        self._probing = False

    @property
    def state(self) -> State:
        """What it does with a request now."""
        with self._lock:
            return self._state()

    def closed_in(self) -> float:
        """Seconds until a request is let through again; 0 where one is now."""
        with self._lock:
            return 0.0 if self._until is None else max(self._until - self._clock(), 0.0)

    def allow(self) -> bool:
        """Whether a request may be sent; where true, one of `success`, `failure` and `give_up` must follow."""
        with self._lock:
            state = self._state()
            if state == "half-open" and not self._probing:
                self._probing = True
                return True
            return state == "closed"

    def success(self) -> None:
        """The endpoint answered."""
        with self._lock:
            self._failures, self._wait, self._until, self._probing = 0, self.first, None, False

    def failure(self, *, severe: bool = False) -> None:
        """It did not, or not in its right mind; `severe` where waiting for it took all the time there was."""
        with self._lock:
            self._failures += 1
            if self._until is not None:  # a probe, or what was on its way when it opened
                if self._probing:
                    self._wait = min(2 * self._wait, self.longest)
                    self._until = self._clock() + self._wait
                self._probing = False
            elif severe or self._failures >= self.threshold:
                self._until = self._clock() + self._wait

    def give_up(self) -> None:
        """What was let through was not sent, or says nothing about the endpoint."""
        with self._lock:
            self._probing = False

    def renew(self) -> None:
        """In a forked child: a lock that another thread held at that moment is free."""
        self._lock = threading.Lock()
        self._probing = False

    def _state(self) -> State:
        if self._until is None:
            return "closed"
        return "half-open" if self._clock() >= self._until else "open"
