"""Which weights these are: a version that follows from kind, configuration, names, types, shapes and bytes. Pure.

Client and server compute it alike, so a server that holds other weights does not know the version: 404, and never the
numbers of something else.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

VERSION_DIGITS = 16
Buffer = bytes | bytearray | memoryview
Described = tuple[str, Iterable[int], Buffer | Iterable[Buffer]]
"""A tensor's type by safetensors' name for it, its shape, and its bytes in one piece or in several."""


def described(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `digest_of` takes for a configuration: the kind of block beside its options."""
    return {"kind": kind, "config": dict(config)}


def digest_of(config: Mapping[str, Any], tensors: Mapping[str, Described]) -> str:
    """The version: the first 16 hexadecimal digits of a SHA-256.

    It is taken over `config` as JSON (sorted, without spaces), then, by name, over each tensor's name, type and shape
    as JSON and its bytes: little endian, rows first.

    Args:
        config: `described(kind, config)`.
        tensors: by name; the bytes are read once, a piece at a time, in the order of the names.
    """
    hashed = hashlib.sha256(_canonical(config))
    for name in sorted(tensors):
        dtype, shape, data = tensors[name]
        hashed.update(_canonical([name, dtype, list(shape)]))
        for piece in (data,) if isinstance(data, Buffer) else data:
            hashed.update(piece)
    return hashed.hexdigest()[:VERSION_DIGITS]


def _canonical(value: Any) -> bytes:
    # The line's end cannot stand inside, so no two lists of tensors give the same bytes.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"
