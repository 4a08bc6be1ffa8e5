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


def redacted(values: Any, system: System, folder: Path) -> Any:
    """The same with names in place of the user's folders, and without the names of user and host."""
    folders = {str(folder): "$FOLDER", str(Path.cwd()): "$PWD", sys.prefix: "$PREFIX", str(system.home): "~"}
    folders |= {str(temporary()): "$TMPDIR", str(Path(__file__).parents[3]): "$APT"}
    folders = dict.fromkeys(system.paths, "$SITE") | folders
    folders |= {str(Path(path).resolve()): name for path, name in folders.items()}
    places = sorted((path for path in folders if len(path) > 1), key=len, reverse=True)
    words = [*{*system.private, system.home.name} - _COMMON - {""}]
    pattern = re.compile(
        "|".join([*map(_path, places), *(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])" for word in words)])
    )
    return _walk(values, pattern, folders)


def _path(path: str) -> str:
    return rf"{re.escape(path)}(?![\w.-])"


def _walk(value: Any, pattern: "re.Pattern[str]", folders: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda match: folders.get(match[0], "***"), value)
    if isinstance(value, Mapping):
        return {name: _walk(inner, pattern, folders) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(inner, pattern, folders) for inner in value]
    return value
