"""What a stack does, shown while it does it: a table that a thread keeps fresh, or plain lines."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.errors import LiveError
from rich.live import Live
from rich.table import Table
from typing_extensions import Self

from apt_model.core.errors import InputError

LOG = logging.getLogger(__name__)
_COLUMNS = ("level", "capacity MB", "used MB", "peak MB", "hit rate", "GB/s in", "stall ms")
_ON_TERMINAL, _IN_LINES = 0.25, 10.0  # seconds between two looks
_GONE = OSError, ValueError  # what writing to a closed or broken file raises


class Top:
    """Shows `stats` every so many seconds, and once more at the end.

    Args:
        stats: asked by a thread of its own.
        every: seconds between two looks; None: 0.25 on a terminal, else 10.
        console: where to; None: the standard output. One that is no terminal gets a line a level at each look.
    """

    def __init__(self, stats: Callable[[], dict[str, Any]], every: float | None, console: Console | None) -> None:
        self._stats, self._console = stats, console or Console()
        self._every = every or (_ON_TERMINAL if self._console.is_terminal else _IN_LINES)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="apt-vgpu-top", daemon=True)
        self._before: list[int] = []
        self._looked, self._gone = 0.0, False

    def __enter__(self) -> Self:
        if self._live is not None:
            try:
                self._live.start()
            except LiveError as error:
                raise InputError(
                    f"VGPUStack.top: the console shows something else: {error}",
                    remedy="end that first, or give a console",
                ) from error
        try:
            self._shown()
            self._thread.start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        try:
            self._shown()
        finally:
            self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            with contextlib.suppress(*_GONE):
                self._live.stop()

    def _run(self) -> None:
        while not self._over.wait(self._every) and self._shown():
            pass

    def _shown(self) -> bool:
        """Look, and whether there was something to show it on: a console that is gone is no reason to end a run."""
        if self._gone:
            return False
        try:
            self._look()
        except _GONE as error:
            self._gone = True
            LOG.warning("VGPUStack.top shows no more: %s", error)
        return not self._gone

    def _look(self) -> None:
        stats, now = self._stats(), time.perf_counter()
        came = [level["bytes_in"] for level in stats["levels"]]
        seconds = now - self._looked
        rates = [(here - before) / seconds / 1e9 for here, before in zip(came, self._before or came, strict=True)]
        self._before, self._looked = came, now
        rows = [
            row(number, level, rate, stats["stall_ms"] if number == 1 else None)
            for number, (level, rate) in enumerate(zip(stats["levels"], rates, strict=True), 1)
        ]
        if self._live is None:
            for each in rows:
                self._console.print(line(each), highlight=False, soft_wrap=True)
        else:
            self._live.update(table(rows), refresh=True)


def row(number: int, level: dict[str, Any], gbps: float, stall_ms: float | None) -> list[str]:
    """A level as words, in the order of the columns."""
    hit_rate = "-" if level["hit_rate"] is None else f"{level['hit_rate']:.3f}"
    sizes = [f"{level[name]:,.1f}" for name in ("capacity_mb", "used_mb", "peak_mb")]
    return [
        f"{number} {level['device']}",
        *sizes,
        hit_rate,
        f"{gbps:.2f}",
        "" if stall_ms is None else f"{stall_ms:,.0f}",
    ]


def table(rows: list[list[str]]) -> Table:
    """All levels for a terminal."""
    made = Table(*_COLUMNS)
    for column in made.columns[1:]:
        column.justify = "right"
    for each in rows:
        made.add_row(*each)
    return made


def line(cells: list[str]) -> str:
    """A level for a file."""
    return ", ".join(f"{name} {cell}" for name, cell in zip(_COLUMNS, cells, strict=True) if cell)
