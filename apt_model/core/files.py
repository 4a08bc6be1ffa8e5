"""Files that are either whole or absent: written beside their place, flushed to the disk, then renamed into it."""

import contextlib
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL_PREFIX = ".partial-"
# Files get what the umask leaves of this: some writers (safetensors 0.8) make files that only their owner can read.
_FILE_MODE = 0o666


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial_name(path: Path) -> Path:
    return path.with_name(f"{PARTIAL_PREFIX}{path.name}-{os.getpid()}")


def _set_mode(path: Path, mode: int) -> None:
    if path.stat().st_mode & 0o777 != mode:
        with contextlib.suppress(PermissionError):  # a file system without modes
            path.chmod(mode)


def clear_partials(folder: Path, name: str = "") -> None:
    """Remove what killed processes left half-written in `folder`, of the file or folder `name` or of all."""
    for partial in folder.glob(f"{PARTIAL_PREFIX}{glob.escape(name)}{'-' if name else ''}*"):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; on leaving without an error the file takes the place of `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_name(path)
    try:
        partial.touch()
        mode = partial.stat().st_mode & _FILE_MODE
        yield partial
        _set_mode(partial, mode)
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill; on leaving without an error it is renamed to `path`, which must not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_name(path)
    # In a container a restarted process often has the number of the one that was killed.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        mode = partial.stat().st_mode & _FILE_MODE
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                _set_mode(file, mode)
            _flush(file)
        _flush(partial)
        partial.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
