"""How long work takes on a device: by the host's clock where it is done, or by the device's own where it has one."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from apt_model.core.system.device import Device

Work = Callable[[], object]
_ROUNDS = 5
# Of calls that one replay of a graph holds: long enough that the replay's own start does not count.
_GRAPH_S, _GRAPH_CALLS = 2e-3, 200


@dataclass(frozen=True)
class Stopwatch:
    """Times work on one device.

    Args:
        device: where.
        seconds: how long each figure is measured by the host's clock.
        clock: the host's clock, in seconds.
    """

    device: Device
    seconds: float
    clock: Callable[[], float] = time.perf_counter

    def wall(self, work: Work) -> float:
        """Seconds of one call among many, until the device has done them."""
        work()
        self.device.synchronize()
        once = self._once([work])
        count = max(1, int(self.seconds / _ROUNDS / once))
        times = []
        for _ in range(_ROUNDS if once < self.seconds else 2):
            begin = self.clock()
            for _ in range(count):
                work()
            self.device.synchronize()
            times.append((self.clock() - begin) / count)
        # What else runs on a CPU makes single rounds longer; a GPU's first ones are faster than what lasts.
        return min(times) if self.device.kind == "cpu" else statistics.median(times)

    def gpu(self, works: Sequence[Work]) -> float:
        """Seconds of one call, of several that take turns: GPU time where the device tells it, else as `wall`."""
        if not self.device.supports("seconds"):
            return self._turns(works)
        for work in works:
            work()
        self.device.synchronize()
        turns = max(1, min(int(_GRAPH_S / self._once(works)), _GRAPH_CALLS // len(works)))
        calls = list(works) * turns
        taken = self.device.seconds(lambda: [work() for work in calls])
        return self._turns(works) if taken is None else taken / len(calls)

    def _turns(self, works: Sequence[Work]) -> float:
        """As `wall`, of calls that take turns."""
        following = itertools.cycle(works)
        return self.wall(lambda: next(following)())  # noqa: PLW0108 - another one each time

    def _once(self, works: Sequence[Work]) -> float:
        """Seconds of each work once, after they have run before."""
        begin = self.clock()
        for work in works:
            work()
        self.device.synchronize()
        return max(self.clock() - begin, 1e-7)
