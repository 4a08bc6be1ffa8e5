"""One server: how it is reached, its breaker, and how long it took lately for what was asked."""

from collections import deque

from apt_model.cloud.breaker import Breaker
from apt_model.cloud.transport import Request, Transport

LATE = 1.5
_SAMPLES = 99  # of so many, the slowest is the 99th percentile
FEW, MANY = 8, 32
"""Times that must be known to ask a replica, and to do without: one in n + 1 is slower than n before."""
_KINDS = 1024
Kind = tuple[str, int]


class Endpoint:
    """A server, and its times by the kind of request.

    There is no lock here, so that none can be held while the process forks: what changes a dict or a deque is one step
    of the interpreter.
    """

    def __init__(self, transport: Transport, breaker: Breaker | None = None) -> None:
        self.transport = transport
        self.breaker = breaker or Breaker()
        self._times: dict[Kind, _Times] = {}

    def took(self, kind: Kind, seconds: float) -> None:
        """Remember a successful exchange."""
        times = self._times.get(kind)
        if times is None:
            while len(self._times) >= _KINDS:
                self._times.pop(next(iter(list(self._times)), kind), None)
            times = self._times.setdefault(kind, _Times())
        times.seconds.append(seconds)
        times.least = 0.0

    def missed(self, kind: Kind, seconds: float) -> None:
        """No answer came within `seconds`: until one does, each has twice as long.

        So a server that became slower is found out, whose times would never be known if each was given up too soon.
        """
        times = self._times.get(kind)
        if times is not None:
            times.least = max(times.least, 2 * seconds)

    def late_after(self, kind: Kind, factor: float, enough: int = FEW) -> float | None:
        """Seconds after which an answer is late: `factor` times the slowest of 99; None where few are known."""
        times = self._times.get(kind)
        if times is None or len(times.seconds) < enough:
            return None
        return max(factor * max(times.seconds), times.least)


class _Times:
    """Of one kind of request."""

    __slots__ = ("least", "seconds")

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=_SAMPLES)
        self.least = 0.0


def kind_of(request: Request) -> Kind:
    """What takes about as long: the same path, which names a block and its direction, and as many bytes within two."""
    return request.path, request.length.bit_length()
