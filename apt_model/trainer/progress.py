"""What a person sees while a run works: a bar on a terminal, plain lines elsewhere, nothing when asked for quiet."""

import sys
import time
from typing import Any, Protocol


class Progress(Protocol):
    """Hears what a run does."""

    def phase(self, text: str) -> None:
        """A new phase begins."""

    def start(self, total: int, done: int) -> None:
        """Training begins: `done` of `total` steps are behind us."""

    def step(self, step: int, row: dict[str, Any] | None) -> None:
        """A step is done; `row` holds its figures when they were measured."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def close(self) -> None:
        """The run ends."""


class Silent:
    """Shows nothing."""

    def phase(self, text: str) -> None:
        """Show nothing."""

    def start(self, total: int, done: int) -> None:
        """Show nothing."""

    def step(self, step: int, row: dict[str, Any] | None) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Show nothing."""


def describe(row: dict[str, Any]) -> str:
    """A row of training figures in one line."""
    parts = [f"loss {row['loss']:.3f}", f"{row['tokens_per_s']:,.0f} tok/s", f"{row['memory_bytes'] / 2**20:,.0f} MiB"]
    return "  ".join(parts)


class PlainLines:
    """One line a phase and one every `interval` seconds of training, for logs and pipes."""

    def __init__(self, interval: float = 10.0) -> None:
        self._interval, self._last, self._total, self._begin, self._done = interval, 0.0, 0, 0.0, 0

    def phase(self, text: str) -> None:
        """Print the phase."""
        self.note(f"{text} ...")

    def start(self, total: int, done: int) -> None:
        """Remember where and when training began."""
        self._total, self._done, self._begin = total, done, time.monotonic()

    def step(self, step: int, row: dict[str, Any] | None) -> None:
        """Print the figures when the last line is old enough, or this is the last step."""
        now = time.monotonic()
        if row is None or (now - self._last < self._interval and step < self._total):
            return
        self._last = now
        left = (now - self._begin) / max(step - self._done, 1) * (self._total - step)
        self.note(f"step {step}/{self._total}  {describe(row)}  {left:.0f} s left")

    def note(self, text: str) -> None:
        """Print the line to the standard error."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to give back."""


class Bar:
    """A bar with loss, tokens a second, memory and the time left, redrawn ten times a second."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415 - only where there is a terminal
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._total = 0
        self._task = self._progress.add_task("starting", total=None, figures="", count="")
        self._progress.start()

    def phase(self, text: str) -> None:
        """Show the phase beside a spinner."""
        self._progress.update(self._task, description=text)

    def start(self, total: int, done: int) -> None:
        """Begin to count steps."""
        self._progress.reset(self._task, total=total, completed=done, description="training", figures="")
        self._total = total

    def step(self, step: int, row: dict[str, Any] | None) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step, description="training", count=f"{step}/{self._total}")
        if row is not None:
            self._progress.update(self._task, figures=describe(row))

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


def make_progress(*, quiet: bool = False) -> Progress:
    """The bar on a terminal, lines elsewhere, silence when `quiet`."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else PlainLines()
