"""Messages of the Open Inference Protocol: round trips, what is refused, and that nothing else is ever raised."""

import json
import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_model.cloud import wire
from apt_model.cloud.wire import SIZES, Limits, Message, WireTensor
from apt_model.core.errors import WireError

LIMITS = Limits(body_bytes=1 << 16, json_bytes=1 << 12, tensors=4, rank=4, elements=1 << 12)


def body_of(parts):
    return b"".join(bytes(part) for part in parts)


@st.composite
def tensors(draw):
    found = []
    for number in range(draw(st.integers(0, 3))):
        datatype = draw(st.sampled_from(sorted(SIZES)))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        size = math.prod(shape) * SIZES[datatype]
        found.append(WireTensor(f"t{number}", datatype, shape, draw(st.binary(min_size=size, max_size=size))))
    return tuple(found)


def same(one, other):
    assert [each[:3] for each in one] == [each[:3] for each in other]
    assert [bytes(each.data) for each in one] == [bytes(each.data) for each in other]
    return True


@settings(deadline=None)
@given(tensors(), st.none() | st.text(max_size=8), st.lists(st.sampled_from(["a", "b"]), max_size=2, unique=True))
def test_a_request_comes_back(found, name, wanted):
    sent = Message(tensors=found, id=name, wanted=tuple(wanted), parameters={"sequence_id": 3})
    parts, length = wire.encode_request(sent)
    got = wire.decode_request(body_of(parts), length, LIMITS)
    assert same(got.tensors, found)
    assert (got.id, got.wanted, got.parameters, got.binary) == (name, tuple(wanted), {"sequence_id": 3}, True)


@settings(deadline=None)
@given(tensors())
def test_an_answer_comes_back(found):
    parts, length = wire.encode_response(Message(tensors=found, model="m", version="v"))
    got = wire.decode_response(body_of(parts), length, LIMITS)
    assert same(got.tensors, found)
    assert (got.model, got.version) == ("m", "v")


def test_an_answer_in_json_comes_back():
    data = struct.pack("<4f", 0.5, -1, 2, 3)
    parts, length = wire.encode_response(
        Message(tensors=(WireTensor("y", "FP32", (2, 2), data),), model="m", binary=False)
    )
    assert json.loads(parts[0])["outputs"][0]["data"] == [0.5, -1.0, 2.0, 3.0]
    assert same(wire.decode_response(parts[0], None, LIMITS).tensors, (WireTensor("y", "FP32", (2, 2), data),))
    assert length == len(parts[0])
    bad = WireTensor("y", "FP32", (1,), struct.pack("<f", math.inf))
    with pytest.raises(WireError, match="not finite"):
        wire.encode_response(Message(tensors=(bad,), model="m", binary=False))
    with pytest.raises(WireError, match="BF16 cannot stand in JSON"):
        wire.encode_response(Message(tensors=(WireTensor("y", "BF16", (1,), b"ab"),), model="m", binary=False))


def test_how_an_answer_is_wanted():
    for outputs, parameters, binary in (
        ([], {}, False),
        ([], {"binary_data_output": True}, True),
        ([{"name": "y"}], {"binary_data_output": True}, True),
        ([{"name": "y", "parameters": {"binary_data": True}}], {}, True),
        ([{"name": "y", "parameters": {"binary_data": False}}], {"binary_data_output": True}, False),
        ([{"name": "y", "parameters": {"binary_data": 1}}], {}, False),
    ):
        text = json.dumps({"inputs": [], "outputs": outputs, "parameters": parameters}).encode()
        assert wire.decode_request(text, len(text), LIMITS).binary is binary, outputs
    text = json.dumps({"inputs": [], "outputs": [{"name": "y", "parameters": []}]}).encode()
    with pytest.raises(WireError, match="parameters to be a JSON object"):
        wire.decode_request(text, len(text), LIMITS)


def test_null_is_nothing_where_something_is_optional():
    about = {"name": "y", "datatype": "FP32", "shape": [1], "parameters": None, "data": [1.0]}
    text = json.dumps({"outputs": [about], "parameters": None, "id": None, "model_version": None}).encode()
    got = wire.decode_response(text, None, LIMITS)
    assert (len(got.tensors), got.parameters, got.id, got.version) == (1, {}, None, None)
    text = json.dumps({"inputs": [about], "parameters": None, "outputs": None}).encode()
    assert wire.decode_request(text, None, LIMITS).wanted == ()
    for strange in ({}, 0, False, ""):
        text = json.dumps({"inputs": [about], "outputs": strange}).encode()
        with pytest.raises(WireError, match="outputs to be a list"):
            wire.decode_request(text, None, LIMITS)


def test_a_request_without_the_extension_has_no_word_of_it():
    data = struct.pack("<2f", 0.5, -1)
    parts, length = wire.encode_request(
        Message(tensors=(WireTensor("x", "FP32", (1, 2), data),), id="7", wanted=("y",)), plain=True
    )
    x = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [0.5, -1.0]}
    assert json.loads(parts[0]) == {"inputs": [x], "id": "7", "outputs": [{"name": "y"}]}
    assert (len(parts), length) == (1, len(parts[0]))


def test_bytes_are_not_copied():
    data = bytearray(64)
    parts, length = wire.encode_request(Message(tensors=(WireTensor("x", "UINT8", (64,), data),)))
    assert parts[1] is data
    body = body_of(parts)
    got = wire.decode_request(body, length, LIMITS)
    assert got.tensors[0].data.obj is body


def head(**changes):
    about = {"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}
    return {"inputs": [{**about, **changes}]}


@pytest.mark.parametrize(
    ("message", "rest", "said"),
    [
        (head(shape=[2**40, 2**40]), b"1234", "at most 4096 elements"),
        (head(shape=[-1]), b"12345678", "shape of at most"),
        (head(shape=[True, 2]), b"12345678", "shape of at most"),
        (head(shape=[1, 1, 1, 1, 2]), b"12345678", "at most 4 whole"),
        (head(shape=2), b"12345678", "shape of at most"),
        (head(datatype="BYTES"), b"12345678", "expected a datatype"),
        (head(datatype=["FP32"]), b"12345678", "expected a datatype"),
        (head(name=""), b"12345678", "expected a name"),
        (head(name="x" * 999), b"12345678", "expected a name"),
        (head(parameters={"binary_data_size": 7}), b"1234567", "expected binary_data_size 8"),
        (head(parameters={"binary_data_size": 8.0}), b"12345678", "expected binary_data_size 8"),
        (head(parameters={"binary_data_size": True}), b"12345678", "expected binary_data_size 8"),
        (head(parameters=[]), b"12345678", "parameters to be a JSON object"),
        (head(), b"1234567", "expected 8 bytes at 0"),
        (head(), b"123456789", "expected 8 bytes after the JSON"),
        (head(parameters={}), b"", "expected binary_data_size, or data"),
        (head(parameters={}, data=[1, 2, 3]), b"", "expected 2 elements"),
        (head(parameters={}, data=[1]), b"", "expected 2 elements"),
        (head(parameters={}, data=[[[1], 2]]), b"", "at most 1 levels"),
        (head(parameters={}, data=[1, "2"]), b"", "expected elements of FP32"),
        (head(parameters={}, data=[1, True]), b"", "expected elements of FP32"),
        (head(parameters={}, data=[1e300, 1]), b"", "expected elements of FP32"),
        (head(parameters={}, datatype="UINT8", data=[256, 1]), b"", "expected elements of UINT8"),
        (head(parameters={}, datatype="UINT8", data=[0.5, 1]), b"", "expected elements of UINT8"),
        (head(parameters={}, datatype="BF16", data=[0.5, 1]), b"", "of BF16"),
        ({"inputs": head()["inputs"] * 2}, b"12345678" * 2, "every tensor's name once"),
        ({"inputs": head()["inputs"] * 5}, b"", "a list of at most 4"),
        ({}, b"", "inputs to be a list"),
        ({"inputs": [3]}, b"", "a tensor to be a JSON object"),
        ([], b"", "the message to be a JSON object"),
        ({"inputs": [], "id": 3}, b"", "id to be a text"),
        ({"inputs": [], "outputs": [{}]}, b"", "expected a name"),
    ],
)
def test_what_is_refused(message, rest, said):
    text = json.dumps(message).encode()
    with pytest.raises(WireError, match=said):
        wire.decode_request(text + rest, len(text), LIMITS)


@pytest.mark.parametrize("length", [-1, 0, 10**9])
def test_a_wrong_length_is_refused(length):
    with pytest.raises(WireError, match="expected JSON of"):
        wire.decode_request(b"{}", length, LIMITS)
    with pytest.raises(WireError, match="body of at most"):
        wire.decode_request(bytes(LIMITS.body_bytes + 1), 2, LIMITS)


@pytest.mark.parametrize(
    "text", [b"[" * 3000, b"{" * 9, b"\xff", b"NaN", b'{"inputs":Infinity}', b"1" * 4000, b'{"a":' * 700]
)
def test_what_is_no_json_is_refused(text):
    with pytest.raises(WireError):
        wire.decode_request(text, len(text), LIMITS)


SOUND = body_of(wire.encode_request(Message(tensors=(WireTensor("x", "FP16", (2, 3), bytes(12)),), id="7"))[0])


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_no_bytes_raise_anything_else(data):
    """Sound messages with bytes changed, left out and put in, and any bytes at all."""
    body = bytearray(SOUND)
    for _ in range(data.draw(st.integers(0, 6))):
        place = data.draw(st.integers(0, len(body)))
        body[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    for decode in (wire.decode_request, wire.decode_response):
        for each in (bytes(body), data.draw(st.binary(max_size=64))):
            for length in (None, len(SOUND) - 12, data.draw(st.integers(-5, 200))):
                try:
                    found = decode(each, length, LIMITS)
                except WireError:
                    continue
                assert all(memoryview(t.data).nbytes == math.prod(t.shape) * SIZES[t.datatype] for t in found.tensors)
