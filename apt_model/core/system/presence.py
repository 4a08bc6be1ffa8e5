"""The ladder by which a vendor says what is there, and calls that are given up when they do not answer. No torch."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

# The rungs above "absent", in order, each with the words for a ladder that ends below it.
RUNGS = {
    "installed": "not installed",
    "loads": "installed, but it does not load",
    "available": "loads, but is not available",
    "count": "available, but with no device",
}


@dataclass(frozen=True, kw_only=True)
class Presence:
    """What was found of a vendor, rung by rung; the first rung that fails is the reason that it cannot be used."""

    installed: bool
    """The vendor's package is there, or this torch was built for the vendor."""
    loads: bool = False
    """It can be imported, and is what it says."""
    available: bool = False
    """The vendor's runtime answers."""
    count: int = 0
    """How many of its devices there are."""
    why: str = ""
    """What torch, the package or the driver said, when a rung failed."""
    remedy: str | None = None
    """What the user can do about it."""

    @property
    def usable(self) -> bool:
        """Whether there is at least one device to compute on."""
        return self.failed is None

    @property
    def failed(self) -> str | None:
        """The first rung that fails, by its name in `RUNGS`; None where all hold."""
        return next((rung for rung in RUNGS if not getattr(self, rung)), None)

    @property
    def reason(self) -> str:
        """The first rung that fails, in words, with why; empty where all hold."""
        if self.failed is None:
            return ""
        words = RUNGS[self.failed]
        return f"{words}: {self.why}" if self.why else words


class NoAnswerError(Exception):
    """A call did not come back in its time."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; `NoAnswerError` where it takes longer, and then it is left to its thread."""
    answer: list[tuple[bool, Any]] = []

    def work() -> None:
        try:
            answer.append((True, call()))
        except BaseException as error:  # noqa: BLE001 - raised again where it was asked
            answer.append((False, error))

    # A daemon, so that a driver that hangs does not keep the process from ending.
    thread = threading.Thread(target=work, name="apt-device-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise NoAnswerError(f"it did not answer in {seconds:g} s")
    worked, value = answer[0]
    if worked:
        result: T = value
        return result
    if isinstance(value, Exception):
        raise value
    raise RuntimeError(f"it ended its thread: {type(value).__name__}: {value}") from value
