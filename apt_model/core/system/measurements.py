"""What was measured on a device and is worth keeping: one JSON file a device, in the user's cache folder.

A file says what it is true for. One that cannot be read, or is true for something else, is named in the log once and
counts as absent. What is written takes in what other processes wrote meanwhile, and replaces the file in one step.
"""

import functools
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from apt_model.core import env
from apt_model.core.files import write_text

LOG = logging.getLogger(__name__)
# Of the file's form and of what its entries mean.
VERSION = 1
# What was measured -> plain values.
Entries = dict[str, dict[str, Any]]


class Machine(NamedTuple):
    """What a measurement is true for."""

    device: str
    capability: str
    triton: str


def folder() -> Path:
    """Where the files are: APT_FP4_CACHE, or apt_model/fp4 in the user's cache folder."""
    asked = env.FP4_CACHE.get()
    return caches() / "fp4" if asked is None else Path(asked).expanduser()


def caches() -> Path:
    """This package's part of the user's cache folder."""
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The standard has relative paths ignored.
    return (asked if asked.is_absolute() else Path.home() / ".cache") / "apt_model"


def file_of(machine: Machine) -> Path:
    """The file for `machine`; other versions of this package and of Triton have files of their own."""
    name = f"{machine.device} {machine.capability} triton {machine.triton} v{VERSION}"
    return folder() / (re.sub(r"[^a-z0-9.]+", "-", name.lower()) + ".json")


def load(machine: Machine) -> Entries:
    """What is kept for `machine`; nothing where there is no file or it cannot be trusted."""
    path: Path | None = None
    try:
        path = file_of(machine)
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home folder, or brackets in brackets
        say_once(f"{path or 'measured launches'}: cannot be read, ignored: {error}")
        return {}
    expected = _head(machine)
    found = {name: held.get(name) for name in expected} if isinstance(held, dict) else None
    if found != expected:
        say_once(f"{path}: expected measurements for {expected}, got {found or type(held).__name__}; it is ignored")
        return {}
    entries = held.get("entries")
    if not isinstance(entries, dict) or not all(isinstance(each, dict) for each in entries.values()):
        say_once(f"{path}: expected entries by name, got something else; it is ignored")
        return {}
    return entries


def keep(machine: Machine, entries: Entries) -> Entries:
    """Add `entries` to what is kept for `machine`, and return all of it; where both have one, the new one counts."""
    every = {**load(machine), **entries}
    try:
        path = file_of(machine)
        write_text(path, json.dumps({**_head(machine), "entries": every}, indent=1) + "\n")
    except (OSError, RuntimeError) as error:
        LOG.warning("what was measured on %s lasts for this process only: %s", machine.device, error)
    else:
        LOG.info("kept in %s", path)
    return every


@functools.cache
def say_once(text: str) -> None:
    """Warn, the first time."""
    LOG.warning(text)


def _head(machine: Machine) -> dict[str, Any]:
    return {"version": VERSION, **machine._asdict()}
