"""Messages of the protocol with faults in them, a step at a time from a seed, to our server and to our client.

An even step is a request to the whole ASGI application; an odd one an answer to the whole client. A step without a
fault must be accepted; what has one is accepted or refused in words of ours, and nothing else is ever raised.
"""

import asyncio
import collections
import copy
import itertools
import json
import random
import re
import struct

import torch
from served import application, linear_file

from apt_model.cloud import wire
from apt_model.cloud.backend import OIPBackend
from apt_model.cloud.breaker import Breaker
from apt_model.cloud.client import Client, Retry
from apt_model.cloud.deadline import Deadline
from apt_model.cloud.dialect import Dialect, path_of
from apt_model.cloud.server.heads import Headers
from apt_model.cloud.tensors import Weights
from apt_model.cloud.transport import Response
from apt_model.core.errors import CloudError

WIDE, OUT = 16, 24
MAX_BODY = 1 << 16
LENGTH = wire.HEADER_LENGTH.lower()
_DEEP = [[]]
for _ in range(60):
    _DEEP = [_DEEP]
VALUES = (
    None, True, False, -1, 0, 1, 2, 2**31, 2**63, 2**64, 10**300, 0.5, 1e308, -0.0, float("nan"), float("inf"), "", "0",
    "x", "y", "x" * 300, "\ud800", "\x00", "FP32", "FP16", "BF16", "INT8", "BYTES", "fp32", "int8g64", [], {}, [0],
    [[]], [1, WIDE], [2**40, 2**40], [0, 2**70], {"binary_data_size": 64}, {"binary_data": True}, {"name": "y"}, _DEEP,
)  # fmt: skip
KEYS = ("name", "shape", "datatype", "data", "parameters", "id", "inputs", "outputs", "binary_data_size", "error", "x")
LENGTHS = ("", "0", "1", "-1", "+5", "1e2", "0x10", " 7", "٣", "9" * 12, "9" * 40, "65537", "nan")
BYTES = (
    b"", b"\x00", b"\xff", b"{", b"}", b"[", b"]", b'"', b",", b":", b"-", b"1e999", b"NaN", b"\\ud800", b"null",
    b"[" * 3000, b'{"a":' * 900, b"9" * 5000, b"\xed\xa0\x80",
)  # fmt: skip


def _nodes(value, found):
    """Every place in a tree: its container and its key."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(each, dict | list):
            _nodes(each, found)
    return found


def _tree(draw, head):
    """A fault in what the JSON says."""
    places = _nodes(head, [])
    if not places:
        return
    container, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind == 0:
        del container[key]
    elif kind == 1:
        container[key] = [container[key]] * draw.choice((0, 1, 2, 17))
    elif kind == 2 and isinstance(container, dict):
        container[draw.choice(KEYS)] = container.pop(key)
    elif kind == 3 and isinstance(container, dict):
        container[draw.choice(KEYS)] = copy.deepcopy(draw.choice(VALUES))
    else:
        container[key] = copy.deepcopy(draw.choice(VALUES))


def _bytes(draw, body):
    """A fault in the bytes."""
    at, kind = draw.randrange(len(body) + 1), draw.randrange(5)
    if kind == 0 and at < len(body):
        body[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        body[at:at] = draw.choice(BYTES)
    elif kind == 2:
        del body[at : at + draw.choice((1, 2, 4, 30))]
    elif kind == 3:
        del body[at:]
    else:
        other = draw.randrange(len(body) + 1)
        body[at:at] = body[other : other + draw.choice((1, 8, 64))]


def _tensor(draw, name, datatype, shape, *, binary):
    """Its place in the JSON, and its bytes."""
    count = shape[0] * shape[1]
    about = {"name": name, "datatype": datatype, "shape": shape}
    if not binary:
        data = [draw.choice((0, 1, -1, 0.5, 0.1, 1e-3)) for _ in range(count)]
        if draw.random() < 0.3:
            data = [data[row * shape[1] : (row + 1) * shape[1]] for row in range(shape[0])]
        return {**about, "data": data}, b""
    # Small numbers of every type: zeros in the higher bytes.
    size = wire.SIZES[datatype]
    values = b"".join(struct.pack("<H", draw.randrange(1 << 10)).rjust(size, b"\0")[:size] for _ in range(count))
    return {**about, "parameters": {"binary_data_size": len(values)}}, values


def _faulty(draw, head, tail, *, binary):
    """Body, the header that says how long its JSON is, and whether there is a fault."""
    many = draw.choice((0, 0, 1, 1, 1, 2, 4))
    for _ in range(many):
        _tree(draw, head)
    text = json.dumps(head).encode()
    body, length = bytearray(text + tail), str(len(text)) if binary else None
    if draw.random() < 0.35:
        many += 1
        for _ in range(draw.choice((1, 1, 2, 5))):
            _bytes(draw, body)
    if draw.random() < 0.12:
        many += 1
        near = str(max(len(text) + draw.choice((-1, 1, -8, len(tail))), 0))
        length = draw.choice((None, near, near, draw.choice(LENGTHS)))
    return bytes(body), length, many > 0


def request_of(draw):
    """A request: body, length of its JSON, whether there is a fault."""
    rows, binary = draw.randint(1, 3), draw.random() < 0.6
    coded = binary and draw.random() < 0.25
    parts = [("x", draw.choice(("FP32", "FP16", "BF16")) if binary else "FP32", [rows, WIDE])]
    if coded:
        parts = [("x_q", "INT8", [rows, draw.choice((WIDE, 64))]), ("x_scale", "FP16", [rows, 1])]
    made = [_tensor(draw, *each, binary=binary) for each in parts]
    head = {"inputs": [about for about, _ in made], "parameters": {"binary_data_output": binary}}
    if coded:
        head["parameters"]["wire"] = "int8g64"
    elif draw.random() < 0.5:
        head["outputs"] = [{"name": "y", "parameters": {"binary_data": binary}}]
    if draw.random() < 0.5:
        head["id"] = str(draw.randrange(100))
    return _faulty(draw, head, b"".join(values for _, values in made), binary=binary)


def answer_of(draw, rows, *, binary, datatype):
    """An answer to our client: status, headers, body, whether there is a fault."""
    about, values = _tensor(draw, "y", datatype if binary else "FP32", [rows, OUT], binary=binary)
    head = {"model_name": "m", "model_version": "v", "id": "step", "outputs": [about], "parameters": {}}
    body, length, fault = _faulty(draw, head, values, binary=binary)
    headers = {} if length is None else {LENGTH: length}
    status = 200
    if draw.random() < 0.1:
        status, fault = draw.choice((201, 204, 206, 400, 401, 404, 408, 413, 429, 500, 501, 503, 504)), True
        headers["retry-after"] = draw.choice(("1", "nan", "-1", "1e400", "inf", "Wed", "٣"))
        if draw.random() < 0.5:
            body = json.dumps({draw.choice(("error", "detail", "x")): copy.deepcopy(draw.choice(VALUES))}).encode()
    return status, headers, body, fault


def metadata_of(draw):
    """An answer of /v2."""
    limits = {"max_body": MAX_BODY, "max_inflight": 8, "max_upload": 0}
    head = {"name": "apt_model", "version": "1", "extensions": ["binary_tensor_data"], "limits": limits}
    body, _, _ = _faulty(draw, head, b"", binary=False)
    return body


class _Told:
    """A transport that answers what it was told."""

    name = "fuzzed"

    def __init__(self):
        self.answer = None

    def send(self, request, *, timeout, late=None):  # noqa: ARG002 - a transport's
        status, headers, body = self.answer
        return Response(status=status, headers=headers, body=bytearray(body[: request.most]))

    def redact(self, text):
        return text

    def close(self):
        """Nothing is open."""


class Fuzzer:
    """Steps of one seed; `folder` is for the server's weights."""

    def __init__(self, folder, seed):
        self.seed = seed
        self.found = collections.Counter()
        """How many steps ended how."""
        self.words = set()
        """What refusals said, without what came and without numbers."""
        linear_file(folder / "a.safetensors")
        self.app = application(folder, folder / "a.safetensors", max_body=MAX_BODY)
        self.told, hours = _Told(), itertools.count(0, 3600)
        client = Client(
            [self.told], retry=Retry(attempts=1), sleep=lambda _: None,
            breaker=lambda: Breaker(threshold=1 << 60, clock=lambda: float(next(hours))),
        )  # fmt: skip
        self.backend = OIPBackend([self.told], client=client)
        self.weights = Weights(kind="linear", config={}, tensors={"weight": torch.zeros(OUT, WIDE)})
        self.key = (self.weights.model, self.weights.version)

    def run(self, first, count):
        """Steps `first` to `first + count`; the one that fails is named."""
        asyncio.run(self._run(first, count))

    async def _run(self, first, count):
        for number in range(first, first + count):
            try:
                await self.step(number)
            except Exception as error:  # noqa: PERF203 - it names the step
                raise AssertionError(f"step {number} of seed {self.seed}: {type(error).__name__}: {error}") from error

    async def step(self, number):
        """One message."""
        draw = random.Random((self.seed << 48) + number)
        if number % 2 == 0:
            await self._request(draw)
        elif draw.random() < 0.1:
            self._metadata(draw)
        else:
            self._answer(draw)

    async def _request(self, draw):
        body, length, fault = request_of(draw)
        headers = [(b"content-length", str(len(body)).encode()), (b"host", b"localhost")]
        if length is not None:
            headers.append((LENGTH.encode(), length.encode()))
        scope = {
            "type": "http", "method": "POST", "path": "/v2/models/m0/infer", "headers": headers,
            "client": ("127.0.0.1", 1), "query_string": b"",
        }  # fmt: skip
        waiting, sent = [{"type": "http.request", "body": body, "more_body": False}], []

        async def receive():
            return waiting.pop() if waiting else {"type": "http.disconnect"}

        async def send(event):
            sent.append(event)

        def at_once():
            made = []
            is_made = self.app.at_once(
                scope["path"], Headers(headers), "127.0.0.1", body, lambda each: made.append(b"".join(each[0]))
            )
            assert is_made == bool(made)
            return made[0] if made else None

        is_first = draw.random() < 0.5
        made = at_once() if is_first else None
        await self.app(scope, receive, send)
        made = made if is_first else at_once()
        status = sent[0]["status"]
        self.found["request", status] += 1
        answer = b"".join(bytes(each.get("body", b"")) for each in sent[1:])
        assert status < 500, answer
        assert fault or status == 200, answer
        if made is None:
            assert fault or not (length and b'"binary_data_output": true' in body)
        else:
            assert (status, answer) == (200, made)
        if status == 200:
            named = dict(sent[0]["headers"]).get(LENGTH.encode())
            wire.decode_response(answer, int(named) if named else None, wire.Limits())
        else:
            self._said("request", json.loads(answer)["error"])

    def _answer(self, draw):
        rows, binary, own = draw.randint(1, 3), draw.random() < 0.6, draw.random() < 0.7
        dtype = draw.choice((torch.float32, torch.float16, torch.bfloat16))
        datatype = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}[dtype]
        *answer, fault = answer_of(draw, rows, binary=binary, datatype=datatype)
        self.told.answer = answer
        self.backend._dialect = Dialect(binary=binary, own=binary and own)
        self.backend._paths = {self.key: path_of(*self.key)}
        try:
            found = self.backend.infer(
                self.weights, {"x": torch.zeros(rows, WIDE, dtype=dtype)}, {"y": (dtype, (rows, OUT))},
                deadline=Deadline(60), identity="step",
            )  # fmt: skip
        except CloudError as error:
            if not fault:
                raise AssertionError("an answer without a fault is refused") from error
            self.found["answer", type(error).__name__] += 1
            self._said("answer", error.message)
        else:
            self.found["answer", "accepted"] += 1
            assert found.keys() == {"y"}
            assert (found["y"].dtype, found["y"].shape) == (dtype, (rows, OUT))

    def _metadata(self, draw):
        self.told.answer = (200, {}, metadata_of(draw))
        self.backend._dialect = None
        health = self.backend.health(fresh=True)  # raises nothing, ever
        self.found["metadata", "ok" if health.ok else "not ok"] += 1
        assert min(self.backend.limits()) > 0
        assert self.backend.upload_limit() >= 0

    def _said(self, kind, text):
        if len(self.words) < 10_000:
            self.words.add(
                (kind, re.sub(r"(got|answers|does not hold) .*|'.*|\d+|\[.*", "", text, flags=re.DOTALL)[:60])
            )
