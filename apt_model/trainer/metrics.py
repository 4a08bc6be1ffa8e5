"""What a run measures, written as it goes: metrics.jsonl always, TensorBoard events when asked.

A line of metrics.jsonl holds `step` and either training figures (loss in nats a token, learning rate, norm of the
gradient before treatment, tokens and seconds since the row before, bytes in use) or held-out figures (bits_per_byte).
"""

import contextlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any, Literal, Protocol

from apt_model.core.errors import MissingExtraError
from apt_model.core.files import write_text

METRICS_FILE = "metrics.jsonl"


class Sink(Protocol):
    """Takes one row of figures."""

    def write(self, row: dict[str, Any]) -> None:
        """Record `row`, which holds "step" and numbers."""

    def close(self) -> None:
        """Flush and let go of files."""


class JsonlSink:
    """One JSON object a line, flushed at once. Opening it drops rows later than `from_step`: they will come again."""

    def __init__(self, root: Path, *, from_step: int) -> None:
        path = root / METRICS_FILE
        kept = [row for row in read_metrics(root) if row["step"] <= from_step] if from_step else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append `row`; what is not finite becomes null, as JSON has no other word for it."""
        self._file.write(json.dumps({name: _finite(value) for name, value in row.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink:
    """Every number of a row as a scalar at its step, in `root`/tensorboard."""

    def __init__(self, root: Path, *, from_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional and slow to import
        except ImportError as error:
            raise MissingExtraError("--tensorboard on", "tensorboard", "tensorboard") from error
        # Rows up to `from_step` stay, those after it will come again.
        self._writer = SummaryWriter(str(root / "tensorboard"), purge_step=from_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Add one scalar for every number but the step."""
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def can_write_events() -> bool:
    """Whether TensorBoard is installed."""
    return importlib.util.find_spec("tensorboard") is not None


def open_sinks(root: Path, tensorboard: Literal["auto", "on", "off"], *, from_step: int) -> list[Sink]:
    """The sinks a run writes to; 'on' raises `MissingExtraError` without the package."""
    sinks: list[Sink] = [JsonlSink(root, from_step=from_step)]
    if tensorboard == "on" or (tensorboard == "auto" and can_write_events()):
        sinks.append(TensorBoardSink(root, from_step=from_step))
    return sinks


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(root: Path) -> list[dict[str, Any]]:
    """All whole rows of a run so far; a line that a kill cut short is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in (root / METRICS_FILE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows
