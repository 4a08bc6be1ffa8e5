"""The index of a folder of blobs: which file holds which key, and what tells that the file is still what it was."""

import dataclasses
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt_model.core.errors import StorageError
from apt_model.core.files import clear_partials, write_text
from apt_model.vgpu.disk_files import fault
from apt_model.vgpu.units import PAGE, padded

INDEX = "index.json"
FILE_NAME = re.compile(r"(\d{8,})\.blob")
AGAIN = "remove the folder and write its blobs again; copies must keep times, as cp -a does"
_VERSION = 1


@dataclasses.dataclass(slots=True)
class Blob:
    """A blob's file and what it holds."""

    file: str
    nbytes: int
    mtime_ns: int
    chunk: int  # bytes that one checksum stands for: a store of another chunk may have written it
    sums: list[int]
    synced: bool = False  # the disk has it for good; set by a flush

    @property
    def offsets(self) -> range:
        """Where its chunks begin."""
        return range(0, self.nbytes, self.chunk)


def write_index(folder: Path, blobs: Mapping[str, Blob]) -> None:
    """Write the index of blobs that are on the disk."""
    fields = {key: dataclasses.asdict(blob) for key, blob in blobs.items()}
    write_text(folder / INDEX, json.dumps({"version": _VERSION, "blobs": fields}))


def read_index(folder: Path) -> dict[str, Blob]:
    """What the folder's index names, each file checked to be unchanged; nothing where there is no index."""
    path = folder / INDEX
    clear_partials(folder, INDEX)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] != _VERSION:
            raise StorageError(f"{path} is of version {raw['version']!r}, and this is {_VERSION}", remedy=AGAIN)
        blobs = {key: _read_entry(fields) for key, fields in raw["blobs"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read: {error!r}", remedy=AGAIN) from error
    for key, blob in blobs.items():
        check_unchanged(key, folder / blob.file, blob)
    return blobs


def check_unchanged(key: str, path: Path, blob: Blob) -> None:
    """Raise where the file is not what was written, as far as that shows without reading it."""
    try:
        found = path.stat()
    except OSError as error:
        gone = fault(key, path, 0, error)
        gone.remedy = AGAIN
        raise gone from error
    if found.st_size != padded(blob.nbytes):
        offset = min(found.st_size, blob.nbytes)
        raise changed(key, path, offset, f"{found.st_size} bytes", f"{padded(blob.nbytes)} bytes")
    if found.st_mtime_ns != blob.mtime_ns:
        raise changed(key, path, 0, f"modification time {found.st_mtime_ns} ns", f"{blob.mtime_ns} ns")


def changed(key: str, path: Path, offset: int, has: str, had: str) -> StorageError:
    """The error for a file that somebody else wrote to."""
    return StorageError(
        f"blob {key!r} in {path}, offset {offset}: the file was changed since it was written: it has {has}, "
        f"and had {had}",
        remedy=AGAIN,
    )


def _read_entry(fields: dict[str, Any]) -> Blob:
    blob = Blob(**fields)
    numbers = (blob.nbytes, blob.mtime_ns, blob.chunk, *blob.sums)
    right = FILE_NAME.fullmatch(blob.file) and all(type(each) is int and each >= 0 for each in numbers)
    if not right or blob.chunk % PAGE or not blob.chunk or len(blob.offsets) != len(blob.sums):
        raise ValueError(f"the entry of {blob.file!r} contradicts itself")
    return blob


def compare(expected: int, key: str, path: Path, offset: int, piece: memoryview) -> None:
    """Raise where a chunk is not what was written."""
    found = zlib.crc32(piece)
    if found != expected:
        raise StorageError(
            f"blob {key!r} in {path}: the {len(piece)} bytes from offset {offset} on are altered: checksum "
            f"{found:08x}, and {expected:08x} was written",
            remedy=AGAIN,
        )
