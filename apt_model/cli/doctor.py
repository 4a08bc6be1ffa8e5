"""`apt-model doctor`: what is broken on this machine, by trying it in other processes; loads no torch in its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from apt_model import __version__
from apt_model.cli import doctor_text, output
from apt_model.cli.diagnosis import disk
from apt_model.cli.diagnosis.diagnose import Diagnosis, diagnose
from apt_model.cli.diagnosis.redact import redacted
from apt_model.cli.diagnosis.system import System, here
from apt_model.cli.options import GlobalOptions, parse


@dataclass(frozen=True, kw_only=True)
class Options(GlobalOptions):
    """Find what is broken: packages, driver, GPU, limits of memory, disk, settings. Exit code 1 if anything is.

    Nothing is changed. Probes run in processes of their own, each with a limit of time: import torch, compute, lock and
    pin memory, write a file of a few megabytes and remove it. With --format json the report names no user, host or
    folder of yours, and no value of a key.
    """

    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Start no process: only look at files and variables."""
    folder: str | None = None
    """The folder that is meant as the disk level, to be tried instead of that of temporary files."""


def run(args: Sequence[str]) -> int:
    """Diagnose this machine and tell; 1 if something is broken."""
    options = parse(Options, args, "doctor")
    return tell(here(), options)


def tell(system: System, options: Options) -> int:
    """Diagnose `system` and tell."""
    made = diagnose(system, options.folder, quick=options.quick)
    if options.format == "json":
        place = disk.folder(system, options.folder)
        output.write_json(redacted(_as_object(made, quick=options.quick), system, place))
    else:
        doctor_text.tell(made, quick=options.quick, hints=not options.quiet)
    return 1 if made.count("broken") else 0


def _as_object(made: Diagnosis, *, quick: bool) -> dict[str, object]:
    verdict = "broken" if made.count("broken") else "warnings" if made.count("warning") else "sound"
    return {
        "version": __version__,
        "verdict": verdict,
        "seconds": round(made.seconds, 3),
        "probed": not quick,
        "findings": [finding._asdict() for finding in made.findings],
        "facts": made.facts,
        "probes": made.probes,
    }
