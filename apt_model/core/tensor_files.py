"""safetensors files in pieces: headers that are checked before data is read, and files that are filled in any order.

The library maps or takes a whole file at once; here only the piece in hand is in memory. Imports no torch.

The format: 8 bytes with the header's length, a JSON header of names, types, shapes and offsets, then the data, gapless.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from typing_extensions import Self

from apt_model.core.errors import CheckpointError

# Bits of an element, by the format's names for types.
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
# Types of numbers that a product takes as they are, and that FP4 is made from.
FLOATS = ("F16", "BF16", "F32", "F64")
_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # what the library takes
_METADATA = "__metadata__"
_AGAIN = "download the file again, or save the model again"


class Entry(NamedTuple):
    """A tensor's place in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    size: int  # bytes

    def __str__(self) -> str:
        return describe(self.dtype, self.shape)


class Header(NamedTuple):
    """What a file holds."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]


def describe(dtype: str, shape: Iterable[int]) -> str:
    """A type and a shape, as errors name them: 'BF16 [8, 4]'."""
    return f"{dtype} {list(shape)}"


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return -(-math.prod(shape) * BITS[dtype] // 8)


def read_header(path: Path) -> Header:
    """Read and check a file's header.

    Raises `CheckpointError` when the file is missing, truncated or no safetensors file, or when a tensor's type, shape
    and offsets contradict each other.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES + length or length > _LARGEST_HEADER:
                raise _refused(path, f"it has {size} bytes, and its header alone would take {_LENGTH_BYTES + length}")
            raw = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(path, f"its header cannot be read ({error})") from error
    if not isinstance(raw, dict):
        raise _refused(path, "its header is no JSON object")
    metadata = raw.pop(_METADATA, None) or {}
    begin = _LENGTH_BYTES + length
    header = Header(path, {name: _entry(path, name, value, begin) for name, value in raw.items()}, metadata)
    _check_gapless(header, begin, size)
    return header


def read_piece(path: Path, entry: Entry, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` (bytes) with the tensor's bytes from `offset` on."""
    read_bytes(path, entry.start + offset, buffer)


def read_bytes(path: Path, start: int, buffer: memoryview) -> None:
    """Fill `buffer` with the file's bytes from `start` on; `CheckpointError` where it ends before."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        filled = 0
        while filled < len(buffer):
            count = file.readinto(buffer[filled:])
            if not count:
                raise CheckpointError(f"{path} was cut while it was read: {len(buffer) - filled} bytes are not there")
            filled += count


class TensorWriter:
    """A file whose tensors are known by type and shape, and whose bytes come in any order; `with` closes it.

    Largest elements come first, so that every tensor is aligned to its own.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path, self._missing = path, {}
        header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
        starts, position = {}, 0
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-BITS[item[1][0]], item[0])):
            size = tensor_bytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
            starts[name], self._missing[name] = position, size
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = _LENGTH_BYTES + len(text)
        self._starts = {name: begin + start for name, start in starts.items()}
        self.size = begin + position
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        self._file.truncate(self.size)

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Put bytes into a tensor, from `offset` on; every byte of the file is given exactly once."""
        self._file.seek(self._starts[name] + offset)
        self._file.write(data)
        self._missing[name] -= len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            left = [name for name, missing in self._missing.items() if missing]
            assert not left, f"{self.path}: not all bytes of {left[:3]} were given"


def _entry(path: Path, name: str, value: Any, begin: int) -> Entry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = all(isinstance(number, int) and number >= 0 for number in (*shape, start, end))
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(path, f"the header's entry of {name} cannot be read ({error!r})") from error
    if not whole or dtype not in BITS:
        raise _refused(path, f"the header's entry of {name} is {dtype!r} {list(shape)} at {start} to {end}")
    if end - start != tensor_bytes(dtype, shape):
        raise _refused(
            path,
            f"{name} is {describe(dtype, shape)}, which takes {tensor_bytes(dtype, shape)} bytes, "
            f"and has {end - start}",
        )
    return Entry(dtype, shape, begin + start, end - start)


def _check_gapless(header: Header, begin: int, size: int) -> None:
    position = begin
    for name, entry in sorted(header.entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != position:
            raise _refused(header.path, f"{name} starts at byte {entry.start}, and the one before ends at {position}")
        position += entry.size
    if position != size:
        how = "truncated" if size < position else "longer than its header says"
        raise _refused(header.path, f"it is {how}: expected {position} bytes, and it has {size}")


def _refused(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is refused: {reason}", state="none of its data was read", remedy=_AGAIN)
