"""Which block makes room on level 1, where the order in which blocks come cannot be foreseen. Pure."""

from collections import Counter

CYCLIC, LRU, FREQUENCY = "cyclic", "lru", "frequency"
POLICIES = (CYCLIC, LRU, FREQUENCY)
# A count that is reached so is halved, and all others with it: what was used long ago is forgotten in time.
_MOST = 64


class Usage:
    """When blobs were used last, and with `FREQUENCY` how often before that."""

    def __init__(self, policy: str) -> None:
        self._by_count = policy == FREQUENCY
        self._counts: Counter[int] = Counter()
        self._last: dict[int, int] = {}
        self._now = 0

    def used(self, blob: int) -> None:
        """Take notice of a use."""
        self._now += 1
        self._last[blob] = self._now
        self._counts[blob] += 1
        if self._counts[blob] >= _MOST:
            for each in self._counts:
                self._counts[each] //= 2

    def worth(self, blob: int) -> tuple[int, int]:
        """The blob with the least of these goes first."""
        return self._counts[blob] if self._by_count else 0, self._last.get(blob, 0)
