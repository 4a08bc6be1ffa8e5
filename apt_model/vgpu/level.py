"""What a level holds and has done: its hard capacity, and the counts that `stats` tells."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from apt_model.core.errors import CapacityError
from apt_model.vgpu.config import LevelConfig
from apt_model.vgpu.traffic import Traffic
from apt_model.vgpu.units import MB, shown


class Level:
    """Bytes that are taken and given back, never more than the capacity at once. Any thread may call."""

    def __init__(self, config: LevelConfig) -> None:
        self.config, self.capacity = config, config.capacity
        self.used = self.peak = 0
        self.hits = self.misses = self.evictions = 0
        self.stalled_s = 0.0  # in which whoever computes waited for what was not there
        self.came, self.went = Traffic(), Traffic()
        self.watch: Callable[[int], None] | None = None  # told `used`, whenever it is another
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """Bytes that can still be taken."""
        return self.capacity - self.used

    def take(self, count: int, what: str) -> None:
        """Count `count` bytes as held, or raise `CapacityError` and count nothing."""
        with self._lock:
            if count > self.free:
                raise CapacityError(
                    f"{self.config.device}: {what} takes {shown(count)}, and {shown(self.free)} of "
                    f"{shown(self.capacity)} are free",
                    remedy=f"give this level at least {(self.used + count) / MB:,.1f} MB (capacity_mb)",
                )
            self.used += count
            self.peak = max(self.peak, self.used)
            if self.watch is not None:
                self.watch(self.used)

    def give(self, count: int) -> None:
        """Count `count` bytes as gone."""
        with self._lock:
            self.used -= count
            assert self.used >= 0, self.used
            if self.watch is not None:
                self.watch(self.used)

    def found(self, hit: bool, waited_s: float = 0.0) -> None:
        """Count an access: whether it found what it wanted here and did not wait, and how long it did."""
        with self._lock:
            self.hits += hit
            self.misses += not hit
            self.stalled_s += waited_s

    def evicted(self) -> None:
        """Count something that had to make room."""
        with self._lock:
            self.evictions += 1

    @contextlib.contextmanager
    def taken(self, count: int, what: str) -> Iterator[None]:
        """`take`, and `give` where what is done within fails."""
        self.take(count, what)
        try:
            yield
        except BaseException:
            self.give(count)
            raise

    def stats(self) -> dict[str, Any]:
        """For people: MB, counts, and GB/s of what came in."""
        accesses = self.hits + self.misses
        return {
            "device": self.config.device,
            "capacity_mb": self.capacity / MB,
            "used_mb": self.used / MB,
            "peak_mb": self.peak / MB,
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hits / accesses if accesses else None,
            "evictions": self.evictions,
            "bytes_in": self.came.bytes,
            "bytes_out": self.went.bytes,
            "gbps": self.came.gbps,
        }
