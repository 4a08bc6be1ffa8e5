"""Tensors on the wire: the Open Inference Protocol v2 and its binary tensor extension. Pure, without torch and numpy.

A message is JSON, followed by the bytes of its tensors in their order, little endian, rows first, without padding; the
header `Inference-Header-Content-Length` says how long the JSON is. A tensor may stand in the JSON as numbers instead.
Nothing is allocated by what a message claims: sizes are bounded and compared with the bytes that are there, first.

Sources: the protocol, kserve/open-inference-protocol (2025-05); the extension, triton-inference-server, "Binary tensor
data extension" (2026-08).
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from apt_model.cloud.wire_heads import LONGEST, Known, Texts
from apt_model.core.errors import WireError

HEADER_LENGTH = "Inference-Header-Content-Length"
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
_ALIGNED = 8  # bytes of the largest element
_FLOATS = ("FP16", "FP32", "FP64")
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, kw_only=True)
class Limits:
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


@dataclass(frozen=True, kw_only=True)
class Message:
    """A request or an answer of `infer`."""

    tensors: tuple[WireTensor, ...]
    """Inputs of a request, outputs of an answer."""
    id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    """Of a request: the outputs asked for; none are all."""
    binary: bool = True
    """Of a request: whether the answer's tensors are to come as bytes."""
    model: str | None = None
    """Of an answer."""
    version: str | None = None
    """Of an answer."""


def encode_request(message: Message, *, plain: bool = False) -> tuple[list[Buffer], int]:
    """The parts of a request's body, JSON first, and the length of that. Tensors' bytes are not copied.

    Args:
        message: what is asked.
        plain: all in JSON, without a word of the extension: for servers that do not have it.
    """
    said = None if plain or message.parameters else ("request", *_said(message), message.wanted)
    if said and (text := _TEXTS.find(said, message.id)) is not None:
        return _joined(text, message.tensors)
    parameters = {**message.parameters} if plain else {**message.parameters, "binary_data_output": message.binary}
    head: dict[str, Any] = {"inputs": [(_in_json if plain else _described)(each) for each in message.tensors]}
    if parameters:
        head["parameters"] = parameters
    if message.id is not None:
        head["id"] = message.id
    if message.wanted:
        head["outputs"] = [{"name": name} for name in message.wanted]
    return _parts(head, () if plain else message.tensors, said, message.id)


def encode_response(message: Message) -> tuple[list[Buffer], int]:
    """The parts of an answer's body, JSON first, and the length of that; with `binary` false all is JSON."""
    said = None
    if message.binary and not message.parameters:
        said = ("answer", *_said(message), message.model, message.version)
        if (text := _TEXTS.find(said, message.id)) is not None:
            return _joined(text, message.tensors)
    head: dict[str, Any] = {"model_name": message.model, "outputs": []}
    if message.version is not None:
        head["model_version"] = message.version
    if message.id is not None:
        head["id"] = message.id
    if message.parameters:
        head["parameters"] = dict(message.parameters)
    if message.binary:
        head["outputs"] = [_described(each) for each in message.tensors]
        return _parts(head, message.tensors, said, message.id)
    head["outputs"] = [_in_json(each) for each in message.tensors]
    return _parts(head, ())


def decode_request(body: Buffer, json_length: int | None, limits: Limits) -> Message:
    """A request's message; its tensors are views of `body`.

    Args:
        body: all of it.
        json_length: what `Inference-Header-Content-Length` says; None where there is no such header: all is JSON.
        limits: what is refused.

    Raises:
        WireError: what was expected, and what came.
    """
    return _decoded(body, json_length, limits, "inputs")


def decode_response(body: Buffer, json_length: int | None, limits: Limits) -> Message:
    """An answer's message; as `decode_request`."""
    return _decoded(body, json_length, limits, "outputs")


def _decoded(body: Buffer, json_length: int | None, limits: Limits, key: str) -> Message:
    """A message whose tensors are `key`; one that came before with another id is not read again."""
    text, rest = _split(body, json_length, limits)
    line = bytes(text) if json_length is not None and json_length <= LONGEST else b""
    more = (key, limits.tensors, limits.rank, limits.elements, limits.name_bytes)
    known, identity = _KNOWN.find(line, more)
    if known is not None and known.nbytes == rest.nbytes:
        return known.message(identity, rest)
    head = _loaded(text)
    message = _request(head, rest, limits) if key == "inputs" else _answer(head, rest, limits)
    layout = _Layout(message)
    if layout.nbytes == rest.nbytes:  # no numbers in the JSON
        _KNOWN.keep(line, more, message.id, layout)
    return message


class _Layout:
    """A message without its id and its tensors' bytes, which lie one after another."""

    def __init__(self, message: Message) -> None:
        self.nbytes, self._tensors = 0, []
        for each in message.tensors:
            end = self.nbytes + memoryview(each.data).nbytes
            self._tensors.append((each.name, each.datatype, each.shape, slice(self.nbytes, end)))
            self.nbytes = end
        self._parameters, self._wanted, self._binary = message.parameters, message.wanted, message.binary
        self._model, self._version = message.model, message.version

    def message(self, identity: str | None, rest: memoryview) -> Message:
        """The same with others."""
        tensors = tuple(WireTensor(name, kind, shape, rest[place]) for name, kind, shape, place in self._tensors)
        return Message(
            tensors=tensors, id=identity, parameters=self._parameters, wanted=self._wanted, binary=self._binary,
            model=self._model, version=self._version,
        )  # fmt: skip


def _request(head: dict[str, Any], rest: memoryview, limits: Limits) -> Message:
    parameters = _parameters(head)
    asked = head.get("outputs")
    outputs = [_object(each, "an output") for each in _array([] if asked is None else asked, "outputs", limits)]
    wanted = tuple(_name(each, limits) for each in outputs)
    binary = parameters.get("binary_data_output", False)
    # An output's own wish comes first; an answer is all bytes or all JSON.
    wishes = [_parameters(each).get("binary_data", binary) for each in outputs]
    return Message(
        tensors=_tensors(head, "inputs", rest, limits), id=_text(head, "id"), wanted=wanted,
        binary=all(wish is True for wish in wishes or [binary]),
        parameters={name: value for name, value in parameters.items() if name != "binary_data_output"},
    )  # fmt: skip


def _answer(head: dict[str, Any], rest: memoryview, limits: Limits) -> Message:
    return Message(
        tensors=_tensors(head, "outputs", rest, limits), id=_text(head, "id"), model=_text(head, "model_name"),
        version=_text(head, "model_version"), parameters=_parameters(head),
    )  # fmt: skip


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


def _described(tensor: WireTensor) -> dict[str, Any]:
    return {
        "name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape),
        "parameters": {"binary_data_size": memoryview(tensor.data).nbytes},
    }  # fmt: skip


def _in_json(tensor: WireTensor) -> dict[str, Any]:
    return {
        "name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape), "data": numbers_of(tensor)
    }  # fmt: skip


def _said(message: Message) -> tuple[object, ...]:
    """What a head says of tensors and wishes, beside the id."""
    return (message.binary, *((each.name, each.datatype, each.shape) for each in message.tensors))


def _parts(
    head: dict[str, Any], tensors: Sequence[WireTensor], said: object = None, identity: str | None = None
) -> tuple[list[Buffer], int]:
    text = _ENCODER.encode(head).encode()
    if said is not None:
        _TEXTS.keep(said, identity, text)
    return _joined(text, tensors)


def _joined(text: bytes, tensors: Sequence[WireTensor]) -> tuple[list[Buffer], int]:
    """JSON, and tensors behind it that begin where memory may be used as it is."""
    if tensors:
        text += b" " * (-len(text) % _ALIGNED)
    return [text, *(each.data for each in tensors)], len(text)


def _split(body: Buffer, json_length: int | None, limits: Limits) -> tuple[memoryview, memoryview]:
    """The JSON's text, and the bytes after it."""
    view = memoryview(body)
    if view.nbytes > limits.body_bytes:
        raise WireError(f"expected a body of at most {limits.body_bytes} bytes, got {view.nbytes}")
    length = view.nbytes if json_length is None else json_length
    most = limits.body_bytes if json_length is None else limits.json_bytes
    if not 0 < length <= min(most, view.nbytes):
        raise WireError(f"expected JSON of 1 to {min(most, view.nbytes)} bytes, got {length} of {view.nbytes}")
    return view[:length], view[length:]


def _loaded(text: memoryview) -> dict[str, Any]:
    try:
        head = _DECODER.decode(str(text, "utf-8"))
    except RecursionError:
        raise WireError("expected JSON of a few levels, got one nested beyond all bounds") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of thousands of digits
        raise WireError(f"expected JSON, got {type(error).__name__}: {str(error)[:100]}") from None
    return _object(head, "the message")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


# Made once: a message is small, and making these takes longer than their work.
_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_KNOWN: Known["_Layout"] = Known()
_TEXTS = Texts()
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def _tensors(head: Mapping[str, Any], key: str, rest: memoryview, limits: Limits) -> tuple[WireTensor, ...]:
    found = list(_each_tensor(_array(head.get(key), key, limits), rest, limits))
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
        about = _object(entry, "a tensor")
        name, datatype = _name(about, limits), about.get("datatype")
        if not isinstance(datatype, str) or datatype not in SIZES:
            raise WireError(f"{name}: expected a datatype of {', '.join(SIZES)}, got {datatype!r}"[:300])
        shape = _shape(about.get("shape"), name, limits)
        nbytes = math.prod(shape) * SIZES[datatype]
        size = _parameters(about).get("binary_data_size")
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


def _name(about: Mapping[str, Any], limits: Limits) -> str:
    name = about.get("name")
    if not isinstance(name, str) or not 0 < len(name.encode("utf-8", "surrogatepass")) <= limits.name_bytes:
        raise WireError(f"expected a name of 1 to {limits.name_bytes} bytes, got {name!r}"[:300])
    return name


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WireError(f"expected {what} to be a JSON object, got {type(value).__name__}")
    return value


def _parameters(about: Mapping[str, Any]) -> dict[str, Any]:
    found = about.get("parameters")
    return {} if found is None else _object(found, "parameters")  # KServe's server says null where there are none


def _array(value: Any, what: str, limits: Limits) -> list[Any]:
    if not isinstance(value, list) or len(value) > limits.tensors:
        got = f"{len(value)}" if isinstance(value, list) else type(value).__name__
        raise WireError(f"expected {what} to be a list of at most {limits.tensors}, got {got}")
    return value


def _text(head: Mapping[str, Any], key: str) -> str | None:
    value = head.get(key)
    if value is not None and not isinstance(value, str):
        raise WireError(f"expected {key} to be a text, got {type(value).__name__}")
    return value
