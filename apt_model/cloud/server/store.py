"""Weights that clients bring: files named after what they hold, whole or absent, within a number of bytes."""

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from apt_model.cloud.identity import digest_of
from apt_model.cloud.server.models import NAME, VERSION, pieces, read_about
from apt_model.cloud.server.refusal import Refusal
from apt_model.core.errors import CheckpointError, InputError
from apt_model.core.files import PARTIAL_PREFIX, clear_partials

_SUFFIX = ".safetensors"
_LARGEST_HEADER = 8 << 20
_WRITTEN = 1 << 20  # at a time


class Store:
    """A folder of `<model>/<version>.safetensors`.

    Args:
        folder: made where it is not there; what an upload left unfinished in it is removed.
        most: bytes that may be in it.
    """

    def __init__(self, folder: Path, most: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self.most = folder, most
        for each in (folder, *folder.iterdir()):
            if each.is_dir():
                clear_partials(each)
        self._coming: dict[tuple[str, str], int] = {}
        self._numbers = itertools.count()

    def files(self) -> Iterator[tuple[str, str, Path]]:
        """Name, version and file of all that is there."""
        for path in sorted(self._folder.glob(f"*/*{_SUFFIX}"), key=lambda each: each.stat().st_mtime):
            name, version = path.parent.name, path.name.removesuffix(_SUFFIX)
            if NAME.fullmatch(name) and VERSION.fullmatch(version):
                yield name, version, path

    def path(self, name: str, version: str) -> Path:
        """Where it is, or would be; both were looked at before."""
        return self._folder / name / f"{version}{_SUFFIX}"

    @property
    def used(self) -> int:
        """Bytes that are there or on their way."""
        return sum(path.stat().st_size for _, _, path in self.files()) + sum(self._coming.values())

    @contextlib.contextmanager
    def receive(self, name: str, version: str, nbytes: int) -> Iterator["Upload"]:
        """A place for a file of this size, empty again afterwards unless it was kept."""
        if (name, version) in self._coming:
            raise Refusal(409, "these weights are being uploaded already")
        if self.used + nbytes > self.most:
            raise Refusal(413, f"expected at most {self.most} bytes in the store, {self.used} are used: DELETE some")
        path = self.path(name, version)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{PARTIAL_PREFIX}{path.name}-{next(self._numbers)}")
        self._coming[name, version] = nbytes
        upload = Upload(partial)
        try:
            yield upload
        finally:
            upload.close()
            partial.unlink(missing_ok=True)
            del self._coming[name, version]

    def keep(self, upload: "Upload", name: str, version: str) -> Path:
        """Look whether it is what it is called, and give it its name. Blocks.

        Raises:
            CheckpointError, InputError: it is no such file, or other weights.
        """
        upload.close()
        found = version_of(upload.path)
        if found != version:
            raise InputError(f"expected weights of version {version}, got those of {found}")
        path = self.path(name, version)
        upload.path.replace(path)
        return path

    def remove(self, name: str, version: str) -> None:
        """Forget a file."""
        self.path(name, version).unlink(missing_ok=True)


class Upload:
    """A file that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._waiting = bytearray()

    async def take(self, piece: bytes) -> None:
        """Write it, soon."""
        self._waiting += piece
        if len(self._waiting) >= _WRITTEN:
            full, self._waiting = self._waiting, bytearray()
            await asyncio.get_running_loop().run_in_executor(None, self._file.write, full)

    def close(self) -> None:
        """Write what waits."""
        if not self._file.closed:
            self._file.write(self._waiting)
            self._file.close()


def version_of(path: Path) -> str:
    """The version of what a file holds. Raises `CheckpointError`, `InputError` where it holds no block."""
    _check_header(path)
    about, entries = read_about(path)
    return digest_of(about, pieces(path, entries))


def _check_header(path: Path) -> None:
    """Raise `CheckpointError` where a file's header is larger than any block's is."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _LARGEST_HEADER:
        raise CheckpointError(f"expected a safetensors header of at most {_LARGEST_HEADER} bytes, got {length}")
