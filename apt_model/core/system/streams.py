"""What stands for a stream or an event on a device that has none: there a call is done when it returns."""

from typing import Any, final


@final
class Nothing:
    """A stream or an event on a device that has none."""

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        """Nothing: it has happened."""

    def record(self, stream: object = None) -> None:
        """Nothing: it is past."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Whether it is over: always."""
        return True


NOTHING: Any = Nothing()
