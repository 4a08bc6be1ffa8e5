"""Files that hold text: the standard library, a folder, one file, or records in JSON lines. Names and text, no more."""

import json
import logging
import os
import shlex
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from apt_model.core.errors import DataError
from apt_model.core.options import require

LOG = logging.getLogger(__name__)
# pydoc_data is one generated file of prose, half as large as all held-out code together.
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "pydoc_data"})
_TEST_SUITES = frozenset({"test", "tests", "idle_test"})


class TextFile(NamedTuple):
    """A file's name, relative to its source with forward slashes, and what it holds."""

    name: str
    text: str


class Record(NamedTuple):
    """A line of a .jsonl file: where it stands ('name:line'), and the values of the keys that were asked for."""

    name: str
    values: tuple[str, ...]


def read_text(path: Path) -> str:
    """The file as UTF-8, line ends as they are. Raises `DataError` when it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file or folder", remedy="check the path given as --data.source") from error
    except UnicodeDecodeError as error:
        old, new = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
        raise DataError(
            f"{path}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x} at offset {error.start}",
            remedy=f"iconv -f latin1 -t utf-8 {old} > {new} && mv {new} {old}  # latin1, or whatever its encoding is",
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", remedy="check its permissions") from error


def read_stdlib(*, include_tests: bool) -> list[TextFile]:
    """The running Python's standard library: its .py files, sorted by name, without what is installed beside it.

    A few files of its test suites are deliberately not UTF-8; they are left out and counted in the log.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = _NOT_LIBRARY if include_tests else _NOT_LIBRARY | _TEST_SUITES
    paths = _walk(root, (".py",), left_out.__contains__)
    texts = [_read_if_utf8(path) for path in paths]
    files = [TextFile(_name(path, root), text) for path, text in zip(paths, texts, strict=True) if text is not None]
    refused = len(paths) - len(files)
    if refused:
        LOG.info("%d of %d files of the standard library are not UTF-8 and were left out", refused, len(paths))
    if not files:
        raise DataError(
            f"{root}: expected the .py files of Python's standard library, found none",
            remedy="give --data.source a path",
        )
    return files


def read_folder(root: Path, suffixes: str) -> list[TextFile]:
    """The files below `root` whose names end in one of `suffixes`, sorted by name, without hidden files and folders."""
    endings = tuple("." + part.strip().lstrip(".").lower() for part in suffixes.split(",") if part.strip(" ."))
    require(bool(endings), "DataConfig.suffixes", "endings separated by commas, such as '.py,.md'", suffixes)
    paths = _walk(root, endings, lambda name: name.startswith(".") or name == "__pycache__")
    files = [TextFile(_name(path, root), read_text(path)) for path in paths]
    if not any(file.text.strip() for file in files):
        raise DataError(
            f"{root}: no text in this folder ({len(files)} files end in {', '.join(endings)})",
            remedy="name the endings of your text files: --data.suffixes .txt,.tex",
        )
    return files


def read_records(path: Path, keys: tuple[str, ...]) -> list[Record]:
    """The lines of a .jsonl file: each an object whose `keys` are strings. Raises `DataError` that names the line."""
    # Not splitlines: JSON strings may hold U+2028 and its kin as they are.
    lines = read_text(path).removeprefix("\ufeff").split("\n")
    records = [
        _record(f"{path}:{number}", f"{path.name}:{number}", line, keys)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not records:
        raise DataError(f"{path}: empty", remedy=f"write one object a line, with the keys {_spell(keys)}")
    return records


def _read_if_utf8(path: Path) -> str | None:
    try:
        return read_text(path)
    except DataError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            return None
        raise


def _record(where: str, name: str, line: str, keys: tuple[str, ...]) -> Record:
    remedy = f"each line is an object such as {json.dumps(dict.fromkeys(keys, '...'))}"
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected JSON, got {line[:40]!r} ({error})", remedy=remedy) from error
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected an object, got {type(values).__name__}", remedy=remedy)
    for key in keys:
        if not isinstance(values.get(key), str):
            got = type(values[key]).__name__ if key in values else _spell(values)
            raise DataError(f"{where}: expected text under the key {key!r}, got {got}", remedy=remedy)
        if any("\ud800" <= letter <= "\udfff" for letter in values[key]):
            raise DataError(f"{where}: {key!r} holds half of a surrogate pair, which no UTF-8 can hold", remedy=remedy)
    return Record(name, tuple(values[key] for key in keys))


def _spell(keys: Iterable[str]) -> str:
    return ", ".join(map(repr, keys)) or "no keys"


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _walk(root: Path, endings: tuple[str, ...], leave_out: Callable[[str], bool]) -> list[Path]:
    found = [path for path in _below(root, leave_out) if path.name.lower().endswith(endings)]
    return sorted(found, key=lambda path: _name(path, root))


def _below(root: Path, leave_out: Callable[[str], bool]) -> Iterator[Path]:
    for folder, inner, names in os.walk(root, onerror=_refuse):
        inner[:] = [name for name in inner if not leave_out(name)]
        yield from (Path(folder, name) for name in names if not leave_out(name))


def _refuse(error: OSError) -> NoReturn:
    # os.walk passes over folders that it may not read, unless told otherwise.
    raise DataError(f"{error.filename}: cannot be read ({error.strerror})", remedy="check its permissions") from error
