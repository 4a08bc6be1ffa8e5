"""Requests that survive what can go wrong on the way: one deadline for all attempts, replicas, breakers, waits.

A forward changes nothing on a server, so that asking again is always right; the same id travels with every attempt.
"""

import concurrent.futures
import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from apt_model.cloud.breaker import Breaker
from apt_model.cloud.deadline import Clock, Deadline
from apt_model.cloud.endpoint import FEW, LATE, MANY, Endpoint, Kind, kind_of
from apt_model.cloud.refusals import BUSY, NEVER, named_wait, refusal_of
from apt_model.cloud.transport import Request, Response, Transport
from apt_model.core.errors import CloudError, DeadlineError, LateError, RefusedError

DEADLINE_HEADER = "X-Apt-Deadline-Ms"


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often, and how long in between: twice as long each time, less up to a quarter by chance."""

    attempts: int = 3
    first: float = 0.05
    longest: float = 2.0


class Tally:
    """What one forward cost; attempts in several threads add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sent = self.received = self.retries = 0
        self.aside = 0.0
        """Seconds that do not come again: of weights that were pushed."""

    def add(self, *, sent: int = 0, received: int = 0, retries: int = 0) -> None:
        """Add to each."""
        with self._lock:
            self.sent += sent
            self.received += received
            self.retries += retries


class Client:
    """Asks the first endpoint that may be asked.

    Args:
        transports: the endpoint and its replicas, the preferred one first.
        retry: how often.
        breaker: makes the breaker of an endpoint.
        late: an answer is late after so many times the slowest of the last 99; None waits for each to the deadline.
        clock: monotonic seconds.
        sleep: waits.
        chance: from 0 to 1, for the jitter.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        *,
        retry: Retry | None = None,
        breaker: Callable[[], Breaker] | None = None,
        late: float | None = LATE,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.endpoints = [Endpoint(each, breaker() if breaker else Breaker(clock=clock)) for each in transports]
        self._retry, self._late = retry or Retry(), late
        self._clock, self._sleep, self._chance = clock, sleep, chance
        self._pool: tuple[int, concurrent.futures.ThreadPoolExecutor] | None = None
        self._lock = threading.Lock()

    def ask(
        self, request: Request, deadline: Deadline, *, tally: Tally | None = None, patience: float = math.inf,
        meanwhile: float | None = None,
    ) -> Response:  # fmt: skip
        """The answer, of status 2xx or 404.

        Args:
            request: what is asked.
            deadline: of all attempts together.
            tally: what is added to.
            patience: of a caller who can do without: the longest wait that a server may ask for. Where it asks for
                none, only attempts that need no wait are made.
            meanwhile: of a caller who can do without, once an answer is late: the seconds that he waits at least.

        Raises:
            LateError: an answer is late, those of replicas too, after `meanwhile` seconds or more.
            CloudError: the last attempt's; `DeadlineError`, `RefusedError` and `WireError` are some.
        """
        tally = tally or Tally()
        last: CloudError | None = None
        tried: list[Endpoint] = []
        for attempt in range(self._retry.attempts):
            endpoint = self._allowed(tried)
            if endpoint is None:
                raise last or self._left_alone()
            if attempt:
                tally.add(retries=1)
            wait: float | None = None
            try:
                response = self._sent(endpoint, request, deadline, tally, meanwhile)
            except (RefusedError, DeadlineError, LateError):
                raise
            except CloudError as error:
                last = error
            else:
                if (response.status < 300 and response.status not in BUSY) or response.status == 404:
                    return response
                last = refusal_of(endpoint.transport, response)
                if isinstance(last, RefusedError):
                    raise last
                wait = named_wait(response)
            if attempt + 1 == self._retry.attempts:
                break
            tried.append(endpoint)
            if wait is None and patience < math.inf:
                self._pause(self._wait(attempt, tried, None), deadline, 0.0, last)
            else:
                self._pause(self._wait(attempt, tried, wait), deadline, patience, last)
        assert last is not None
        raise last

    def only(self, endpoint: Endpoint) -> "Client":
        """One that asks this endpoint alone, with the same breaker."""
        made = Client([], retry=self._retry, late=self._late, clock=self._clock, sleep=self._sleep, chance=self._chance)
        made.endpoints = [endpoint]
        return made

    def close(self) -> None:
        """Let go of connections and threads."""
        for endpoint in self.endpoints:
            endpoint.transport.close()
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and pool[0] == os.getpid():
            pool[1].shutdown(wait=True, cancel_futures=True)

    def _allowed(self, tried: Sequence[Endpoint]) -> Endpoint | None:
        """An endpoint whose breaker lets a request through, those not yet tried first."""
        fresh = [each for each in self.endpoints if each not in tried]
        return next((each for each in [*fresh, *tried] if each.breaker.allow()), None)

    def _left_alone(self) -> CloudError:
        seconds = min(each.breaker.closed_in() for each in self.endpoints)
        names = " and ".join(each.transport.name for each in self.endpoints)
        return CloudError(f"{names}: left alone after failures, for another {seconds:.0f} s")

    def _wait(self, attempt: int, tried: Sequence[Endpoint], named: float | None) -> float:
        """Seconds before the next attempt: none for the first and for a server not asked yet."""
        if len(tried) < len(self.endpoints):
            return 0.0
        if named is not None:
            return named
        if not attempt:
            return 0.0
        return min(self._retry.first * 2 ** (attempt - 1), self._retry.longest) * (1 - self._chance() / 4)

    def _pause(self, wait: float, deadline: Deadline, patience: float, last: CloudError) -> None:
        closed = min(each.breaker.closed_in() for each in self.endpoints)
        if wait > patience or wait >= deadline.left() or closed > wait:
            raise last
        if wait:
            self._sleep(wait)

    def _sent(
        self, endpoint: Endpoint, request: Request, deadline: Deadline, tally: Tally, meanwhile: float | None
    ) -> Response:
        kind, factor = kind_of(request), self._late
        beside = [each for each in self.endpoints if each is not endpoint and each.breaker.state != "open"]
        if factor is None or (meanwhile is None and not beside):
            return self._once(endpoint, request, kind, deadline, tally)
        late = endpoint.late_after(kind, factor, FEW if beside else MANY)
        if late is None or late >= deadline.left():
            return self._once(endpoint, request, kind, deadline, tally)
        if not beside:
            return self._once(endpoint, request, kind, deadline, tally, late=max(late, meanwhile or 0.0))
        # A replica is asked first; the caller is told when both are late, where that can be known of both.
        after = beside[0].late_after(kind, factor, MANY) if meanwhile is not None else None
        both = None if after is None else max(late + after, meanwhile or 0.0)
        pool = self._threads()
        first = pool.submit(self._once, endpoint, request, kind, deadline, tally, late=both)
        concurrent.futures.wait([first], late)
        other = None if first.done() else self._allowed_beside(endpoint)
        if other is None:
            return first.result()
        tally.add(retries=1)
        later = None if both is None else both - late
        second = pool.submit(self._once, other, request, kind, deadline, tally, late=later)
        done, pending = concurrent.futures.wait([first, second], return_when=concurrent.futures.FIRST_COMPLETED)
        for each in [*done, *pending]:
            if each.exception() is None and each.result().status < 300:
                for one in (first, second):
                    one.add_done_callback(_end)
                return each.result()
        open_ones = [error for each in (first, second) if isinstance(error := each.exception(), LateError)]
        if open_ones:
            raise LateError(open_ones[0].message, *(rest for error in open_ones for rest in error.rests))
        return first.result()

    def _allowed_beside(self, endpoint: Endpoint) -> Endpoint | None:
        return next((each for each in self.endpoints if each is not endpoint and each.breaker.allow()), None)

    def _once(
        self, endpoint: Endpoint, request: Request, kind: Kind, deadline: Deadline, tally: Tally, *,
        late: float | None = None, begun: tuple[float, Callable[[], Response]] | None = None,
    ) -> Response:  # fmt: skip
        """One exchange, or the rest of one that was late; the breaker that let it through is told how it went."""
        breaker, left, started = endpoint.breaker, 0.0, 0.0
        try:
            if begun is None:
                left = deadline.check(endpoint.transport.name)
                headers = {**request.headers, DEADLINE_HEADER: str(math.ceil(left * 1000))}
                started = self._clock()
                tally.add(sent=request.length)
                asked = request._replace(headers=headers)
                late = None if late is None or late >= left else late
                response = endpoint.transport.send(asked, timeout=left, late=late)
            else:
                response = begun[1]()
        except LateError as error:
            endpoint.missed(kind, late or 0.0)
            begun = started, error.rests[0]
            rest = partial(self._once, endpoint, request, kind, deadline, tally, late=late, begun=begun)
            raise LateError(error.message, rest) from error
        except RefusedError:
            breaker.give_up()
            raise
        except DeadlineError:
            # What little time earlier attempts left says nothing about this endpoint.
            if left >= deadline.seconds / 2:
                breaker.failure(severe=True)
            else:
                breaker.give_up()
            raise
        except CloudError:
            breaker.failure()
            raise
        except BaseException:
            breaker.give_up()
            raise
        tally.add(received=len(response.body))
        if response.status >= 500 and response.status not in (NEVER, 503):
            breaker.failure(severe=response.status in (504, 524))
        else:
            breaker.success()
            seconds = self._clock() - (begun[0] if begun else started)
            # When a late answer came is not known: while the caller did something else, which may take long.
            endpoint.took(kind, min(seconds, 2 * late) if begun and late else seconds)
        return response

    def _threads(self) -> concurrent.futures.ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._pool[0] != os.getpid():
                pool = concurrent.futures.ThreadPoolExecutor(8, thread_name_prefix="apt-cloud-hedge")
                self._pool = (os.getpid(), pool)
            return self._pool[1]

    def renew(self) -> None:
        """In a forked child: locks that another thread held at that moment are free."""
        self._lock = threading.Lock()
        for endpoint in self.endpoints:
            endpoint.breaker.renew()


def _end(future: "concurrent.futures.Future[Response]") -> None:
    """What is late beside an answer that was taken is open no longer."""
    error = None if future.cancelled() else future.exception()
    if isinstance(error, LateError):
        error.end()
