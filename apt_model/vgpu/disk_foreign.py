"""Bytes that lie in files of others, such as a model's safetensors: read where they are, and never written."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from apt_model.core.errors import StorageError
from apt_model.vgpu.disk_files import DirectFile, ShortReadError


class Piece(NamedTuple):
    """Bytes of a file that stand at `offset` of a blob."""

    offset: int
    path: Path
    start: int  # in the file
    size: int


class _State(NamedTuple):
    """What tells that a file is still the one that it was."""

    device: int
    inode: int
    size: int
    mtime_ns: int


class Foreign:
    """A blob made of pieces of files; what lies between them is nobody's.

    Raises `StorageError` where a file is not there, or is too short for its pieces.
    """

    def __init__(self, key: str, pieces: Sequence[Piece], chunk: int) -> None:
        self.nbytes = max((piece.offset + piece.size for piece in pieces), default=0)
        self._key = key
        self._chunks = [
            Piece(piece.offset + at, piece.path, piece.start + at, min(chunk, piece.size - at))
            for piece in pieces
            for at in range(0, piece.size, chunk)
        ]
        self._states = {path: self._state(path) for path in dict.fromkeys(piece.path for piece in pieces)}
        for piece in pieces:
            if piece.start + piece.size > self._states[piece.path].size:
                raise StorageError(
                    f"{piece.path} ends before byte {piece.start + piece.size}, up to which {key!r} lies"
                )

    def open(self) -> "OpenForeign":
        """For a read; `StorageError` where a file was changed since."""
        return OpenForeign(self)

    def chunks(self) -> list[Piece]:
        """In the order in which they are read."""
        return self._chunks

    def place_of(self, offset: int) -> tuple[Path, int]:
        """The file in which byte `offset` of the blob lies, and where there."""
        piece = next(each for each in self._chunks if 0 <= offset - each.offset < each.size)
        return piece.path, piece.start + offset - piece.offset

    def paths(self) -> list[Path]:
        """Its files."""
        return list(self._states)

    def check(self, path: Path, descriptor: int) -> None:
        """Raise where this is not the file that was found at first."""
        if _state_of(os.fstat(descriptor)) != self._states[path]:
            raise StorageError(
                f"{path} was changed since {self._key!r} was found in it",
                remedy="attach the model anew, and leave its files alone meanwhile",
            )

    def _state(self, path: Path) -> _State:
        try:
            return _state_of(path.stat())
        except OSError as error:
            raise StorageError(f"{path}, in which {self._key!r} lies, cannot be read: {error}") from error


class OpenForeign:
    """Its files, open."""

    def __init__(self, blob: Foreign) -> None:
        self._blob, self._files = blob, {}  # type: Foreign, dict[Path, DirectFile]
        try:
            for path in blob.paths():
                try:
                    self._files[path] = DirectFile(path, os.O_RDONLY)
                except OSError as error:
                    raise StorageError(f"{path} cannot be read any more: {error}") from error
                blob.check(path, self._files[path].descriptor)
        except BaseException:
            self.close()
            raise

    def read(self, number: int, view: memoryview) -> None:
        """Put chunk `number` where it belongs in `view`, which begins where the blob does."""
        piece = self._blob.chunks()[number]
        try:
            self._files[piece.path].read_anywhere(view[piece.offset : piece.offset + piece.size], piece.start)
        except ShortReadError as error:
            raise StorageError(f"{piece.path} was cut while it was read: {error.strerror}") from error
        except OSError as error:
            raise StorageError(f"{piece.path}, byte {piece.start}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close them."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()


def _state_of(found: os.stat_result) -> _State:
    return _State(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
