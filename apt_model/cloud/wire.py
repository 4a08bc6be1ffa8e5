"""Tensors on the wire: the Open Inference Protocol v2 and its binary tensor extension. Pure, without torch and numpy.

A message is JSON, followed by the bytes of its tensors in their order, little endian, rows first, without padding; the
header `Inference-Header-Content-Length` says how long the JSON is. A tensor may stand in the JSON as numbers instead.
Nothing is allocated by what a message claims: sizes are bounded and compared with the bytes that are there, first.

Sources: the protocol, kserve/open-inference-protocol (2025-05); the extension, triton-inference-server, "Binary tensor
data extension" (2026-08).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from apt_model.cloud.wire_heads import LONGEST, Known, Texts
from apt_model.cloud.wire_tensors import (
    SIZES,
    Buffer,
    Limits,
    WireTensor,
    array_of,
    described,
    in_json,
    name_of,
    numbers_of,
    object_of,
    parameters_of,
    tensors_of,
    text_of,
)
from apt_model.core.errors import WireError

__all__ = [
    "HEADER_LENGTH", "SIZES", "Buffer", "Layout", "Limits", "Message", "WireTensor", "decode_request",
    "decode_response", "encode_request", "encode_response", "joined", "numbers_of", "recognised",
]  # fmt: skip

HEADER_LENGTH = "Inference-Header-Content-Length"
_ALIGNED = 8  # bytes of the largest element


_NONE: Mapping[str, Any] = MappingProxyType({})


class Message(NamedTuple):
    """A request or an answer of `infer`."""

    tensors: tuple[WireTensor, ...]
    """Inputs of a request, outputs of an answer."""
    id: str | None = None
    parameters: Mapping[str, Any] = _NONE
    wanted: tuple[str, ...] = ()
    """Of a request: the outputs asked for; none are all."""
    binary: bool = True
    """Of a request: whether the answer's tensors are to come as bytes."""
    model: str | None = None
    """Of an answer."""
    version: str | None = None
    """Of an answer."""
    layout: "Layout | None" = None
    """Of one that was read: the same for all messages that differ in their ids and their tensors' bytes alone."""


def encode_request(message: Message, *, plain: bool = False) -> tuple[list[Buffer], int]:
    """The parts of a request's body, JSON first, and the length of that. Tensors' bytes are not copied.

    Args:
        message: what is asked.
        plain: all in JSON, without a word of the extension: for servers that do not have it.
    """
    said = None if plain or message.parameters else ("request", *_said(message), message.wanted)
    if said and (text := _TEXTS.find(said, message.id)) is not None:
        return joined(text, [each.data for each in message.tensors])
    parameters = {**message.parameters} if plain else {**message.parameters, "binary_data_output": message.binary}
    head: dict[str, Any] = {"inputs": [(in_json if plain else described)(each) for each in message.tensors]}
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
            return joined(text, [each.data for each in message.tensors])
    head: dict[str, Any] = {"model_name": message.model, "outputs": []}
    if message.version is not None:
        head["model_version"] = message.version
    if message.id is not None:
        head["id"] = message.id
    if message.parameters:
        head["parameters"] = dict(message.parameters)
    if message.binary:
        head["outputs"] = [described(each) for each in message.tensors]
        return _parts(head, message.tensors, said, message.id)
    head["outputs"] = [in_json(each) for each in message.tensors]
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
    return _decoded(body, json_length, limits, _REQUESTS, _request)


def recognised(body: Buffer, json_length: int, limits: Limits) -> "tuple[Layout, str, memoryview] | None":
    """A request's layout, id and tensors' bytes, where one like it was decoded before, with these limits.

    Raises:
        WireError: as `decode_request`.
    """
    layout, identity, _, rest = _known(body, json_length, limits, _REQUESTS)
    return None if layout is None or identity is None else (layout, identity, rest)


def decode_response(body: Buffer, json_length: int | None, limits: Limits) -> Message:
    """An answer's message; as `decode_request`."""
    return _decoded(body, json_length, limits, _ANSWERS, _answer)


def _decoded(
    body: Buffer, json_length: int | None, limits: Limits, known: "Known[Layout]",
    read: Callable[[dict[str, Any], memoryview, Limits], Message],
) -> Message:  # fmt: skip
    """A message; of one that came before with another id the JSON is not read again."""
    layout, identity, text, rest = _known(body, json_length, limits, known)
    if layout is not None:
        return layout.message(identity, rest)
    message = read(_loaded(text), rest, limits)
    layout = Layout(message, limits)
    if layout.nbytes != rest.nbytes:  # numbers in the JSON
        return message
    if json_length is not None:
        layout.is_known = known.keep(_line(text), message.id, layout)
    return layout.message(message.id, rest)


def _known(
    body: Buffer, json_length: int | None, limits: Limits, known: "Known[Layout]"
) -> "tuple[Layout | None, str | None, memoryview, memoryview]":
    """The layout of a message whose head came before, and its id; its JSON's text, and the bytes after it."""
    text, rest = _split(body, json_length, limits)
    layout, identity = known.find(_line(text)) if json_length is not None else (None, None)
    if layout is None or layout.nbytes != rest.nbytes or layout.limits != limits:
        return None, None, text, rest
    return layout, identity, text, rest


def _line(text: memoryview) -> bytes:
    """A head that may be kept."""
    return bytes(text) if text.nbytes <= LONGEST else b""


class Layout:
    """A message without its id and its tensors' bytes, which lie one after another."""

    checked: set[object]
    """What a message's readers have found right of it."""

    def __init__(self, message: Message, limits: Limits) -> None:
        self.nbytes, self.limits, self.checked, self._tensors = 0, limits, set(), []
        for each in message.tensors:
            end = self.nbytes + memoryview(each.data).nbytes
            self._tensors.append((each.name, each.datatype, each.shape, slice(self.nbytes, end)))
            self.nbytes = end
        self._rest = message[2:-1]
        self.is_plain = message.binary and not message.parameters
        """Of a request: whether its tensors are bytes and its answer's are to be."""
        self.is_known = False
        """Whether it is recognised when it comes again."""

    def message(self, identity: str | None, rest: memoryview) -> Message:
        """The same with others."""
        tensors = tuple([WireTensor(name, kind, shape, rest[place]) for name, kind, shape, place in self._tensors])
        return Message(tensors, identity, *self._rest, self)


def _request(head: dict[str, Any], rest: memoryview, limits: Limits) -> Message:
    parameters = parameters_of(head)
    asked = head.get("outputs")
    outputs = [object_of(each, "an output") for each in array_of([] if asked is None else asked, "outputs", limits)]
    wanted = tuple(name_of(each, limits) for each in outputs)
    binary = parameters.get("binary_data_output", False)
    # An output's own wish comes first; an answer is all bytes or all JSON.
    wishes = [parameters_of(each).get("binary_data", binary) for each in outputs]
    return Message(
        tensors=tensors_of(head, "inputs", rest, limits), id=text_of(head, "id"), wanted=wanted,
        binary=all(wish is True for wish in wishes or [binary]),
        parameters={name: value for name, value in parameters.items() if name != "binary_data_output"},
    )  # fmt: skip


def _answer(head: dict[str, Any], rest: memoryview, limits: Limits) -> Message:
    return Message(
        tensors=tensors_of(head, "outputs", rest, limits), id=text_of(head, "id"), model=text_of(head, "model_name"),
        version=text_of(head, "model_version"), parameters=parameters_of(head),
    )  # fmt: skip


def _said(message: Message) -> tuple[object, ...]:
    """What a head says of tensors and wishes, beside the id."""
    return (message.binary, *((each.name, each.datatype, each.shape) for each in message.tensors))


def _parts(
    head: dict[str, Any], tensors: Sequence[WireTensor], said: object = None, identity: str | None = None
) -> tuple[list[Buffer], int]:
    text = _ENCODER.encode(head).encode()
    if said is not None:
        _TEXTS.keep(said, identity, text)
    return joined(text, [each.data for each in tensors])


def joined(text: bytes, tensors: Sequence[Buffer]) -> tuple[list[Buffer], int]:
    """A body's parts and the length of its JSON: that, and tensors behind it where memory may be used as it is."""
    if tensors:
        text += b" " * (-len(text) % _ALIGNED)
    return [text, *tensors], len(text)


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
    return object_of(head, "the message")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


# Made once: a message is small, and making these takes longer than their work.
_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_REQUESTS: Known["Layout"] = Known()
_ANSWERS: Known["Layout"] = Known()
_TEXTS = Texts()
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
