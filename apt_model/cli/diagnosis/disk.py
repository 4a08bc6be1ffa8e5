"""Checks of the folder that files go to: what it lies on, and how much room there is. Writing to it is a probe."""

import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

from apt_model.cli.diagnosis.finding import Finding, Severity
from apt_model.cli.diagnosis.system import System
from apt_model.cli.output import size

_IN_MEMORY = ("tmpfs", "ramfs")
_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "9p", "drvfs", "fuse.sshfs", "virtiofs", "lustre", "ceph", "glusterfs")
_LITTLE = 2**30
"""Less free room than this is a warning."""
BLOCK = 2**20
"""The least that is written to try a folder."""


def folder(system: System, given: str | None) -> Path:
    """The folder that is meant: the one given, else that of temporary files."""
    if given is not None:
        return Path(given).expanduser()
    named = next((place for name in ("TMPDIR", "TEMP", "TMP") if (place := system.get(name))), None)
    return Path(named) if named else temporary()


def temporary() -> Path:
    """The folder of this process's temporary files, also where none can be written."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return Path("/tmp")  # noqa: S108 - named, not used


def kind(system: System, path: Path) -> tuple[str, bool]:
    """The type of the file system that `path` is on, and whether it is mounted read-only; "" where it is not told."""
    place = Path(os.path.realpath(path))
    best: tuple[int, str, bool] = (-1, "", False)
    for line in system.read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, source = left.split(), right.split()
        if len(fields) < 6 or not source:
            continue
        point = Path(fields[4].encode().decode("unicode_escape"))
        if place.is_relative_to(point) and len(point.parts) >= best[0]:
            read_only = "ro" in fields[5].split(",") or "ro" in source[-1].split(",")
            best = (len(point.parts), source[0], read_only)
    return best[1], best[2]


def checks(system: System, path: Path, *, given: bool) -> Iterator[Finding]:
    """What can be said of the folder without writing to it."""
    shown = shlex.quote(str(path))
    elsewhere = _elsewhere(given=given)
    if not path.is_dir():
        yield Finding("APT-D40", "broken", f"{path} is not a folder", "", f"mkdir -p {shown}  # or {elsewhere}")
        return
    what, read_only = kind(system, path)
    if read_only:
        yield Finding(
            "APT-D40", "broken", f"{path} is on a file system that is mounted read-only", what or "",
            f"findmnt --target {shown}  # see why; then {elsewhere}",
        )  # fmt: skip
        return
    total, free = system.room(path)
    if free < _LITTLE:
        severity: Severity = "broken" if free < BLOCK else "warning"
        yield Finding(
            "APT-D41", severity, f"the disk of {path} is {'full' if severity == 'broken' else 'nearly full'}",
            f"{size(free)} free of {size(total)}", f"du -xsh {shown}/* | sort -h | tail  # or {elsewhere}",
        )  # fmt: skip
    severity = "warning" if given else "note"
    if what in _IN_MEMORY:
        yield Finding(
            "APT-D42", severity, f"{path} lies in memory ({what}): what is written there takes host memory",
            f"{size(free)} free of {size(total)}", f"df -hT  # choose a local disk: {elsewhere}",
        )  # fmt: skip
    elif what in _REMOTE:
        yield Finding(
            "APT-D42", severity, f"{path} is reached through {what}: a level of weights there is as slow as that",
            f"{size(free)} free of {size(total)}", f"df -hT  # choose a local disk: {elsewhere}",
        )  # fmt: skip


def refused(path: Path, words: str, *, given: bool) -> Finding:
    """That writing failed."""
    full = "No space left" in words
    remedy = f"df -h {shlex.quote(str(path))}" if full else f"ls -ld {shlex.quote(str(path))}"
    return Finding(
        "APT-D41" if full else "APT-D40", "broken", f"{path} {'is full' if full else 'cannot be written'}", words,
        f"{remedy}  # or {_elsewhere(given=given)}",
    )  # fmt: skip


def _elsewhere(*, given: bool) -> str:
    return "apt-model doctor --folder DIR" if given else "export TMPDIR=DIR"
