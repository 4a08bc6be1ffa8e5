"""What became of a layer's forwards: each is counted once, by where the value that it returned was computed."""

import collections
import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

from typing_extensions import Self

from apt_model.cloud.client import Tally
from apt_model.core.errors import AptError

_SAMPLES = 1024
_WEIGHT = 0.2  # of the newest in the running mean


class Count:
    """One forward, while it runs."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.where = "raised"


class Stats:
    """Counters that stay exact under threads: cloud_calls + local_calls + raised = forwards."""

    def __init__(self) -> None:
        self.renew()
        self._sums: collections.Counter[str] = collections.Counter()
        self._errors: collections.Counter[str] = collections.Counter()
        self._reasons: collections.Counter[str] = collections.Counter()
        self._remote: collections.deque[float] = collections.deque(maxlen=_SAMPLES)
        self._means: dict[str, float] = {}
        self._said: set[str] = set()

    def renew(self) -> None:
        """A lock of this process."""
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def forward(self) -> Iterator[Count]:
        """Around one forward: what it set `where` to is counted, or that it raised."""
        count = Count()
        try:
            yield count
        except BaseException:
            count.where = "raised"
            raise
        finally:
            tally = count.tally
            with self._lock:
                self._sums.update(
                    {
                        "forwards": 1,
                        count.where: 1,
                        "bytes_sent": tally.sent,
                        "bytes_received": tally.received,
                        "retries": tally.retries,
                    }
                )

    def add(self, name: str, value: int = 1) -> None:
        """Add to a counter beside those of forwards."""
        with self._lock:
            self._sums[name] += value

    def failed(self, error: AptError) -> None:
        """An attempt elsewhere ended so, after all its retries."""
        with self._lock:
            self._errors[type(error).__name__] += 1

    def because(self, reason: str) -> None:
        """Why a forward was local without an attempt elsewhere."""
        with self._lock:
            self._reasons[reason] += 1

    def took(self, where: str, seconds: float, rows: int) -> None:
        """A forward's time: of the whole for the percentiles, of a row for the comparison."""
        with self._lock:
            if where == "cloud":
                self._remote.append(seconds)
            each = seconds / max(rows, 1)
            self._means[where] = each + (self._means.get(where, each) - each) * (1 - _WEIGHT)

    def mean(self, where: str) -> float | None:
        """The running mean of a row's seconds."""
        return self._means.get(where)

    def first(self, what: str) -> bool:
        """Whether this is said for the first time."""
        with self._lock:
            is_new = what not in self._said
            self._said.add(what)
            return is_new

    def read(self) -> dict[str, Any]:
        """All of it at one moment."""
        with self._lock:
            sums, waits = collections.Counter(self._sums), sorted(self._remote)
            errors, reasons, means = dict(self._errors), dict(self._reasons), dict(self._means)
        done = sums["cloud"] + sums["local"]
        return {
            "forwards": sums["forwards"], "cloud_calls": sums["cloud"], "local_calls": sums["local"],
            "raised": sums["raised"], "cloud_errors": sum(errors.values()),
            "cloud_ratio": sums["cloud"] / done if done else 0.0,
            "bytes_sent": sums["bytes_sent"], "bytes_received": sums["bytes_received"],
            "bytes_pushed": sums["bytes_pushed"], "retries": sums["retries"], "errors": errors,
            "local_reasons": reasons, "backward_cloud": sums["backward_cloud"],
            "backward_local": sums["backward_local"], "spot_checks": sums["spot_checks"],
            "latency_p50": _percentile(waits, 0.5), "latency_p99": _percentile(waits, 0.99),
            "seconds_a_row": means,
        }  # fmt: skip

    def __deepcopy__(self, memo: object) -> Self:
        return type(self)()  # a copy of a layer counts its own

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def _percentile(ordered: list[float], part: float) -> float | None:
    return ordered[math.ceil(part * len(ordered)) - 1] if ordered else None
