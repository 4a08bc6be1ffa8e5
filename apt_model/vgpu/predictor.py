"""Which block comes next: what followed the same two blocks last time. Pure."""

from collections.abc import Iterable, Iterator


class Predictor:
    """Learns the order in which numbers come; begins with a guess.

    What came before the last one is looked at too, so that a block used twice in a pass has both its successors.
    """

    def __init__(self, guess: Iterable[int]) -> None:
        order = list(guess)
        self._after: dict[tuple[int, int], int] = {}
        self._next: dict[int, int] = {}
        for here, there in zip(order, order[1:] + order[:1], strict=True):
            self._next[here] = there
        self._before, self._last = -1, order[-1] if order else -1
        self.surprises = 0

    def saw(self, number: int) -> bool:
        """Take notice of what came; whether it was expected."""
        expected = next(self.ahead(), None) == number
        self.surprises += not expected
        self._after[self._before, self._last] = number
        self._next[self._last] = number
        self._before, self._last = self._last, number
        return expected

    def ahead(self) -> Iterator[int]:
        """What is expected to come, without end unless nothing is known."""
        before, last = self._before, self._last
        while True:
            following = self._after.get((before, last), self._next.get(last))
            if following is None:
                return
            yield following
            before, last = last, following
