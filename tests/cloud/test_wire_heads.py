"""Heads that come again with another id, and answers' heads that are read by hand."""

import json

import pytest

from apt_model.cloud import wire
from apt_model.cloud.http_answer import head_of
from apt_model.core.errors import WireError

DATA = bytes(range(8))
TENSOR = {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}


def read(text, data=DATA):
    return wire.decode_request(bytearray(text + data), len(text), wire.Limits())


def test_another_id_gives_the_same_with_that_id():
    for identity in ("a1", "b2", "a-much-longer-one.3"):
        text = json.dumps({"inputs": [TENSOR], "id": identity}, separators=(",", ":")).encode()
        for _ in range(2):
            found = read(text, bytes(reversed(DATA)) if identity == "b2" else DATA)
            assert found.id == identity
            assert found.tensors[0].shape == (1, 2)
            assert bytes(found.tensors[0].data) == (bytes(reversed(DATA)) if identity == "b2" else DATA)
    with pytest.raises(WireError, match="after the JSON"):
        read(text, DATA + b"1")


@pytest.mark.parametrize(
    "text",
    [
        '{"inputs":[%s],"parameters":{"id":"@"}}',  # another's id
        '{"inputs":[%s],"parameters":{"id":"@"},"id" : "@"}',  # twice
        '{"inputs":[%s],"parameters":{"id":"@"},"id":"\\u0061"}',  # the same in other letters
    ],
)
def test_an_id_that_is_not_the_messages_is_never_taken_for_it(text):
    for identity in ("a", "b", "a"):
        line = (text % json.dumps(TENSOR)).replace("@", identity).encode()
        found = read(line)
        assert found.id == json.loads(line).get("id")
        assert found.parameters == {"id": identity}


def test_heads_that_are_sent_again_are_what_a_whole_writing_gives():
    for identity in ("one", "another", 'a"b', "one"):
        tensor = wire.WireTensor("x", "FP32", (1, 2), DATA)
        message = wire.Message(tensors=(tensor,), id=identity, wanted=("y",))
        (text, data), length = wire.encode_request(message)
        assert len(text) == length
        assert length % 8 == 0
        assert data is DATA
        assert json.loads(text) == {
            "inputs": [TENSOR], "parameters": {"binary_data_output": True}, "id": identity, "outputs": [{"name": "y"}],
        }  # fmt: skip


def test_a_usual_head_is_read():
    head = head_of(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A:  b \r\n\r\nhello")
    assert head is not None
    assert (head.status, head.length, head.will_close) == (200, 5, False)
    assert head.headers == {"content-length": "5", "x-a": "b"}
    assert head_of(b"HTTP/1.1 404 \r\nContent-Length: 0\r\nConnection: close\r\n\r\n").will_close


@pytest.mark.parametrize(
    "text",
    [
        b"", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 204 No\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.1 200 OK\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n",
    ],
)  # fmt: skip
def test_any_other_is_left_to_http_client(text):
    assert head_of(text) is None
