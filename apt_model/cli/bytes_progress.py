"""How far a long reading of files is: a bar on a terminal, plain lines elsewhere, nothing when asked for quiet."""

import sys
import time
from types import TracebackType
from typing import Protocol

from typing_extensions import Self

from apt_model.cli import output


class BytesProgress(Protocol):
    """Hears of bytes as they are done; `with` ends it."""

    def __call__(self, count: int, name: str) -> None:
        """`count` more bytes are done, and `name` is in hand."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""


class Silent:
    """Shows nothing."""

    def __call__(self, count: int, name: str) -> None:
        """Show nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class PlainLines(Silent):
    """A line every `interval` seconds, for logs and pipes."""

    def __init__(self, total: int, interval: float = 2.0) -> None:
        self._total, self._interval, self._done = total, interval, 0
        self._begin = self._last = time.monotonic()

    def __call__(self, count: int, name: str) -> None:
        """Print a line when the last one is old enough."""
        self._done += count
        now = time.monotonic()
        if now - self._last < self._interval:
            return
        self._last = now
        left = (now - self._begin) * (self._total / self._done - 1) if self._done else None
        time_left = "" if left is None else f"  {left:,.0f} s left"
        done = f"{self._done / self._total:4.0%}  {output.size(self._done)} of {output.size(self._total)}"
        print(f"{done}{time_left}  {name}", file=sys.stderr, flush=True)


class Bar(Silent):
    """A bar with bytes and the time left, redrawn ten times a second."""

    def __init__(self, total: int) -> None:
        from rich.console import Console  # noqa: PLC0415 - only where there is a terminal
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (BarColumn(bar_width=24), DownloadColumn(binary_units=True), TransferSpeedColumn())
        self._progress = Progress(
            *columns,
            TimeRemainingColumn(),
            TextColumn("{task.fields[name]}", markup=False),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=total, name="")

    def __call__(self, count: int, name: str) -> None:
        """Move the bar."""
        self._progress.update(self._task, advance=count, name=name)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def bytes_progress(total: int, *, quiet: bool) -> BytesProgress:
    """What fits where the standard error goes."""
    if quiet:
        return Silent()
    return Bar(total) if sys.stderr.isatty() else PlainLines(total)
