"""Takes out of a report what says who and where: folders, user and host."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt_model.cli.diagnosis.disk import temporary
from apt_model.cli.diagnosis.system import System

_COMMON = frozenset({"root", "localhost"})
"""Names that say nothing, and are words of their own."""
_PATH = re.compile(r"(?<![\w/.$~*-])/(?!(?:usr|lib|lib64|proc|dev|sys|etc|run)/)[\w.+*-]+(?:/[\w.+*-]+)*/([\w.+*-]+)")
"""An absolute path that is not of the system's own folders."""


def redacted(values: Any, system: System, folder: Path) -> Any:
    """The same with names in place of the user's folders, and without the names of user and host.

    Of any other path, outside the system's own folders, the last part is left.
    """
    folders = dict.fromkeys(system.paths, "$SITE")
    folders |= {str(temporary()): "$TMPDIR", str(Path(__file__).parents[3]): "$APT", sys.prefix: "$PREFIX"}
    folders |= {str(Path.cwd()): "$PWD", str(folder): "$FOLDER", str(system.home): "~"}
    folders |= {str(Path(path).resolve()): name for path, name in folders.items()}
    places = sorted((path for path in folders if len(path) > 1), key=len, reverse=True)
    words = sorted({*system.private, system.home.name} - _COMMON - {""}, key=len, reverse=True)
    known = [rf"{re.escape(path)}(?![\w.-])" for path in places]
    known += [rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])" for word in words]
    return _walk(values, re.compile("|".join(known), flags=re.IGNORECASE), folders)


def _walk(value: Any, pattern: "re.Pattern[str]", folders: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _PATH.sub(r"$ELSEWHERE/\1", pattern.sub(lambda match: folders.get(match[0], "***"), value))
    if isinstance(value, Mapping):
        return {name: _walk(inner, pattern, folders) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(inner, pattern, folders) for inner in value]
    return value
