"""`apt-model bench`: how fast this machine is, each figure beside the ceiling of what bounds it."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from apt_model.cli import output
from apt_model.cli.options import GlobalOptions, parse
from apt_model.core.errors import ConfigError
from apt_model.core.files import write_text

if TYPE_CHECKING:
    from apt_model.optimization.bench.run import Report

JSON_FILE, PNG_FILE = "bench.json", "bench.png"
_INTERVAL = 2.0


@dataclass(frozen=True, kw_only=True)
class Options(GlobalOptions):
    """Measure this machine: linear layers in 4 bits against 16 and 32, attention, the link and a disk.

    Each figure stands beside the ceiling of the resource that bounds it, measured in the same run, and is shown only
    after its numbers were checked; a wrong one ends in exit code 1. Files written to measure the disk are removed.
    """

    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N."""
    folder: str | None = None
    """A folder on the disk that is measured; none: the temporary one, which TMPDIR names."""
    out: str | None = None
    """A folder for bench.json and bench.png, which are replaced; none: nothing is written."""
    small: tyro.conf.FlagCreatePairsOff[bool] = False
    """Measure very little, in a second, to see that everything works: such figures say nothing of the machine."""


def run(args: Sequence[str]) -> None:
    """Measure, and print and write what was found."""
    options = parse(Options, args, "bench")
    folder, out = _folder(options.folder), _out(options.out)
    # After the options, which need no torch.
    from apt_model.core.system import get_device_manager  # noqa: PLC0415
    from apt_model.optimization.bench.run import bench  # noqa: PLC0415

    device = get_device_manager(options.device)
    with _progress(quiet=options.quiet) as told:
        report = bench(device, folder=folder, small=options.small, told=told)
    values = dataclasses.asdict(report)
    written, missing = _write(out, values, report) if out is not None else ([], None)
    if options.format == "json":
        output.write_json({**values, "written": [str(path) for path in written], "not_written": missing})
    else:
        from apt_model.cli import bench_text  # noqa: PLC0415 - beside what it words

        bench_text.tell(report)
        if written:
            output.write("\n")
            facts = [("written", ", ".join(map(str, written))), ("not written", missing or "")]
            output.write_facts([fact for fact in facts if fact[1]])
    if report.wrong:
        raise SystemExit(1)


def _folder(asked: str | None) -> Path | None:
    if asked is None:
        return None
    path = Path(asked).expanduser()
    if not path.is_dir():
        raise ConfigError(f"--folder: expected a folder that exists, got {asked!r}", remedy="make it, or name another")
    return path


def _out(asked: str | None) -> Path | None:
    """The folder, made before anything is measured."""
    if asked is None:
        return None
    path = Path(asked).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: expected a folder, or a place for one, got {asked!r}: {error.strerror}", remedy="name another"
        ) from error
    return path


def _write(out: Path, values: dict[str, Any], report: "Report") -> tuple[list[Path], str | None]:
    """What was written, and what was not and why."""
    from apt_model.cli import bench_plot  # noqa: PLC0415 - only where it is asked for
    from apt_model.core.errors import MissingExtraError  # noqa: PLC0415

    write_text(out / JSON_FILE, output.as_json(values, indent=1))
    try:
        bench_plot.draw(report, out / PNG_FILE)
    except MissingExtraError as error:
        return [out / JSON_FILE], f"{PNG_FILE}: {error.message}; {error.remedy}"
    return [out / JSON_FILE, out / PNG_FILE], None


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Shows what is in hand on the standard error: on a terminal in one line, else a line every two seconds."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        from rich.console import Console  # noqa: PLC0415 - only where there is a terminal

        with Console(stderr=True).status("") as status:
            yield status.update
    else:
        yield _Lines().tell


class _Lines:
    def __init__(self) -> None:
        self._last = -_INTERVAL

    def tell(self, text: str) -> None:
        """Print the text when the last one is old enough."""
        now = time.monotonic()
        if now - self._last >= _INTERVAL:
            self._last = now
            output.write(f"{text}\n", sys.stderr)
            sys.stderr.flush()
