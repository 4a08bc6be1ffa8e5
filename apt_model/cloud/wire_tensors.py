"""Tensors in a message's JSON: described or standing there as numbers, looked at before memory is taken for them."""

import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from apt_model.core.errors import WireError

SIZES = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8,
}  # fmt: skip
"""Bytes of an element, by the protocol's name of its type. BYTES, of no fixed size, is not one of ours."""
# How struct writes one; bf16 it does not know, and the protocol wants it in bytes.
_LETTERS = {
    "BOOL": "?", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b", "INT16": "h", "INT32": "i",
    "INT64": "q", "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
_FLOATS = ("FP16", "FP32", "FP64")
Buffer = bytes | bytearray | memoryview


class Limits(NamedTuple):
    """What a message may be; what is beyond is refused before memory is taken for it."""

    body_bytes: int = 64 << 20
    json_bytes: int = 1 << 20
    tensors: int = 16
    rank: int = 8
    elements: int = 1 << 28
    name_bytes: int = 256


class WireTensor(NamedTuple):
    """A tensor as it travels."""

    name: str
    datatype: str
    """One of `SIZES`."""
    shape: tuple[int, ...]
    data: Buffer
    """Little endian, rows first."""


def numbers_of(tensor: WireTensor) -> list[Any]:
    """The elements as a flat list, for an answer in JSON. `WireError` for bf16, which only travels as bytes."""
    letter = _LETTERS.get(tensor.datatype)
    if letter is None:
        raise WireError(
            f"{tensor.name}: {tensor.datatype} cannot stand in JSON", remedy="ask for binary_data_output: true"
        )
    found = list(struct.unpack(f"<{math.prod(tensor.shape)}{letter}", tensor.data))
    if tensor.datatype in _FLOATS and not all(map(math.isfinite, found)):
        raise WireError(f"{tensor.name} has a number that is not finite, which JSON has not")
    return found


def described(tensor: WireTensor) -> dict[str, Any]:
    """What JSON says of a tensor whose bytes follow."""
    return {
        "name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape),
        "parameters": {"binary_data_size": memoryview(tensor.data).nbytes},
    }  # fmt: skip


def in_json(tensor: WireTensor) -> dict[str, Any]:
    """A tensor in JSON alone."""
    return {
        "name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape), "data": numbers_of(tensor)
    }  # fmt: skip


def tensors_of(head: Mapping[str, Any], key: str, rest: memoryview, limits: Limits) -> tuple[WireTensor, ...]:
    """A head's tensors, views of the bytes after it, which must be theirs and no more."""
    found = list(_each_tensor(array_of(head.get(key), key, limits), rest, limits))
    taken = sum(memoryview(each.data).nbytes for each, binary in found if binary)
    if taken != rest.nbytes:
        raise WireError(f"expected {taken} bytes after the JSON, as its tensors say, got {rest.nbytes}")
    names = [each.name for each, _ in found]
    if len(set(names)) < len(names):
        raise WireError(f"expected every tensor's name once, got {names!r}"[:300])
    return tuple(each for each, _ in found)


def _each_tensor(entries: Iterable[Any], rest: memoryview, limits: Limits) -> Iterator[tuple[WireTensor, bool]]:
    """Each, and whether it came as bytes."""
    place = 0
    for entry in entries:
        about = object_of(entry, "a tensor")
        name, datatype = name_of(about, limits), about.get("datatype")
        if not isinstance(datatype, str) or datatype not in SIZES:
            raise WireError(f"{name}: expected a datatype of {', '.join(SIZES)}, got {datatype!r}"[:300])
        shape = _shape(about.get("shape"), name, limits)
        nbytes = math.prod(shape) * SIZES[datatype]
        size = parameters_of(about).get("binary_data_size")
        if size is None:
            yield WireTensor(name, datatype, shape, _from_numbers(about.get("data"), name, datatype, shape)), False
            continue
        if not _whole(size) or size != nbytes:
            raise WireError(
                f"{name}: expected binary_data_size {nbytes} of {datatype} {list(shape)}, got {size!r}"[:300]
            )
        if place + nbytes > rest.nbytes:
            raise WireError(f"{name}: expected {nbytes} bytes at {place} after the JSON, got {rest.nbytes} in all")
        yield WireTensor(name, datatype, shape, rest[place : place + nbytes]), True
        place += nbytes


def _from_numbers(data: Any, name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    """The bytes of a tensor that stands in the JSON, flat or nested."""
    if not isinstance(data, list) or datatype not in _LETTERS:
        raise WireError(
            f"{name}: expected binary_data_size, or data of numbers, got {type(data).__name__} of {datatype}"
        )
    count = math.prod(shape)
    flat: list[Any] = []
    waiting = [iter(data)]
    while waiting:
        for each in waiting[-1]:
            if isinstance(each, list):
                waiting.append(iter(each))
                if len(waiting) > len(shape) + 1:
                    raise WireError(f"{name}: expected data of at most {len(shape)} levels, got more")
                break
            flat.append(each)
            if len(flat) > count:
                raise WireError(f"{name}: expected {count} elements for {list(shape)}, got more")
        else:
            waiting.pop()
    if len(flat) != count:
        raise WireError(f"{name}: expected {count} elements for {list(shape)}, got {len(flat)}")
    wanted = bool if datatype == "BOOL" else (int, float) if datatype in _FLOATS else int
    if not all(isinstance(each, wanted) and (datatype == "BOOL" or not isinstance(each, bool)) for each in flat):
        raise WireError(f"{name}: expected elements of {datatype}, got something else")
    try:
        return struct.pack(f"<{count}{_LETTERS[datatype]}", *flat)
    except (struct.error, OverflowError) as error:
        raise WireError(f"{name}: expected elements of {datatype}: {error}") from None


def _shape(value: Any, name: str, limits: Limits) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > limits.rank or not all(_whole(each) for each in value):
        raise WireError(f"{name}: expected a shape of at most {limits.rank} whole numbers, got {value!r}"[:300])
    elements = 1
    for size in value:  # Python's own numbers: no overflow
        elements *= size
        if elements > limits.elements:
            raise WireError(f"{name}: expected at most {limits.elements} elements, got {value!r}"[:300])
    return tuple(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def name_of(about: Mapping[str, Any], limits: Limits) -> str:
    """Its name, within bounds."""
    name = about.get("name")
    if not isinstance(name, str) or not 0 < len(name.encode("utf-8", "surrogatepass")) <= limits.name_bytes:
        raise WireError(f"expected a name of 1 to {limits.name_bytes} bytes, got {name!r}"[:300])
    return name


def object_of(value: Any, what: str) -> dict[str, Any]:
    """The same, where it is an object."""
    if not isinstance(value, dict):
        raise WireError(f"expected {what} to be a JSON object, got {type(value).__name__}")
    return value


def parameters_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """Its parameters; none where they are null."""
    found = about.get("parameters")
    return {} if found is None else object_of(found, "parameters")  # KServe's server says null where there are none


def array_of(value: Any, what: str, limits: Limits) -> list[Any]:
    """The same, where it is a short list."""
    if not isinstance(value, list) or len(value) > limits.tensors:
        got = f"{len(value)}" if isinstance(value, list) else type(value).__name__
        raise WireError(f"expected {what} to be a list of at most {limits.tensors}, got {got}")
    return value


def text_of(head: Mapping[str, Any], key: str) -> str | None:
    """A text, or None."""
    value = head.get(key)
    if value is not None and not isinstance(value, str):
        raise WireError(f"expected {key} to be a text, got {type(value).__name__}")
    return value
