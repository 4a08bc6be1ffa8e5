"""A server of tensors for tests, without a network: the protocol, uploads by content, and what can go wrong.

`FakeServer` is an ASGI application for `transport.InProcess`; `apt_model.cloud.fake_http` puts it behind a socket.
"""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.cloud import wire
from apt_model.cloud.int8g64 import pack, unpack
from apt_model.cloud.tensors import Weights, from_wire, to_wire
from apt_model.core.errors import AptError

Fault = Literal["refuse", "hang", "truncate", "flip", "stale", "fail", "busy"]
FAULTS: tuple[Fault, ...] = ("refuse", "hang", "truncate", "flip", "stale", "fail")
_DTYPES = {"FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32, "INT8": torch.int8}
_BY_NAME = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class Answer(NamedTuple):
    """What a fake answers."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}
    fault: Fault | None = None
    """What happens on the way: "refuse", "hang" or "truncate"."""


def refusal(status: int, text: str, **headers: str) -> Answer:
    """An error as the protocol has it; `retry_after="1"` becomes a header."""
    made = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, json.dumps({"error": text}).encode(), made)


def in_json(value: Any, status: int = 200) -> Answer:
    """An object."""
    return Answer(status, json.dumps(value).encode(), {"content-type": "application/json"})


Receive = Callable[[], Awaitable[Any]]
Function = Callable[[Mapping[str, Any], Mapping[str, Tensor], Tensor], Tensor]


def linear(_: Mapping[str, Any], tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """X W^T + b."""
    return F.linear(x, tensors["weight"], tensors.get("bias"))


def mlp(_: Mapping[str, Any], tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """down(gelu(up x))."""
    inner = F.gelu(F.linear(x, tensors["up.weight"], tensors.get("up.bias")))
    return F.linear(inner, tensors["down.weight"], tensors.get("down.bias"))


class Answers(Protocol):
    """A fake: an answer for a request."""

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Header names in lower case."""


def asgi(fake: Answers) -> Callable[[Mapping[str, Any], Receive, Any], Awaitable[None]]:
    """A fake as an ASGI application."""

    async def application(scope: Mapping[str, Any], receive: Receive, send: Any) -> None:
        body = bytearray()
        while True:
            event = await receive()
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        found = await asyncio.to_thread(fake.answer, scope["method"], scope["path"], headers, bytes(body))
        if found.fault == "hang":
            await asyncio.sleep(3600)
        if found.fault == "refuse":
            raise ConnectionResetError
        named = [(name.encode(), value.encode()) for name, value in found.headers.items()]
        named.append((b"content-length", str(len(found.body)).encode()))
        await send({"type": "http.response.start", "status": found.status, "headers": named})
        sent = found.body[: len(found.body) // 2] if found.fault == "truncate" else found.body
        await send({"type": "http.response.body", "body": sent})

    return application


class FakeServer:
    """Holds blocks and computes them.

    Args:
        key: that `Authorization: Bearer` or `X-Auth-Token` must carry; None asks for none.
        max_body: bytes.
        max_upload: bytes of a file of weights; 0 takes none.
        max_inflight: requests that are computed at once, then 429.
        whole_groups: int8g64 comes back in whole groups of 64.
        fault: what goes wrong with the next forward, asked with its path; None is nothing.
    """

    def __init__(
        self,
        *,
        key: str | None = None,
        max_body: int = 64 << 20,
        max_upload: int = 1 << 30,
        max_inflight: int = 8,
        whole_groups: bool = False,
        fault: Callable[[str], Fault | None] = lambda _: None,
    ) -> None:
        self.key, self.max_body, self.max_upload, self.max_inflight = key, max_body, max_upload, max_inflight
        self.whole_groups, self.fault = whole_groups, fault
        self.kinds: dict[str, Function] = {"linear": linear, "mlp": mlp}
        self.held: dict[tuple[str, str], Weights] = {}
        self.ready = True
        self.seconds = 0.0
        """Added to every forward."""
        self.requests: list[tuple[str, str, dict[str, str], int]] = []
        """Method, path, headers and bytes of each request."""
        self.ids: list[str | None] = []
        self._running = threading.Semaphore(max_inflight)

    def hold(self, weights: Weights) -> None:
        """Have weights without an upload, as with `serve --weights`."""
        self.held[weights.model, weights.version] = weights

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """The answer to one request; header names in lower case."""
        self.requests.append((method, path, dict(headers), len(body)))
        if path not in ("/ping", "/health", "/v2/health/live", "/v2/health/ready") and not self._is_allowed(headers):
            return refusal(401, "expected the key")
        parts = path.strip("/").split("/")
        if path == "/ping":
            return Answer(200 if self.ready else 204)
        if path in ("/health", "/v2/health/ready", "/v2/health/live"):
            return in_json({"ready": True}) if self.ready else refusal(503, "loading", retry_after="1")
        if path == "/v2":
            limits = {"max_body": self.max_body, "max_inflight": self.max_inflight, "max_upload": self.max_upload}
            return in_json({"name": "fake", "version": "1", "extensions": ["binary_tensor_data"], "limits": limits})
        match parts:
            case ["v2", "repository", "models", model, "versions", version]:
                return self._repository(method, model, version, body)
            case ["v2", "models", model, "versions", version, "infer"] if method == "POST":
                return self._guarded(path, model, version, headers, body)
        return refusal(404, "there is no such path")

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Any) -> None:
        """ASGI."""
        await asgi(self)(scope, receive, send)

    def _is_allowed(self, headers: Mapping[str, str]) -> bool:
        return (
            self.key is None
            or f"Bearer {self.key}" == headers.get("authorization")
            or (self.key == headers.get("x-auth-token"))
        )

    def _repository(self, method: str, model: str, version: str, body: bytes) -> Answer:
        if method == "GET":
            return in_json({}) if (model, version) in self.held else refusal(404, "unknown")
        if not self.max_upload or len(body) > self.max_upload:
            return refusal(413 if self.max_upload else 404, "no room")
        try:
            weights = read_file(body)
        except (ValueError, KeyError) as error:
            return refusal(400, f"no safetensors: {type(error).__name__}")
        if weights.version != version:
            return refusal(400, "the version is not the digest")
        known = (model, version) in self.held
        self.held[model, version] = weights
        return in_json({}, 200 if known else 201)

    def _guarded(self, path: str, model: str, version: str, headers: Mapping[str, str], body: bytes) -> Answer:
        fault = self.fault(path)
        if fault == "fail":
            return refusal(500, "something broke")
        if fault == "stale":
            return refusal(404, "unknown version")
        if not self.ready:
            return refusal(503, "loading", retry_after="1")
        if len(body) > self.max_body:
            return refusal(413, "too large")
        if fault == "busy" or not self._running.acquire(blocking=False):
            return refusal(429, "busy", retry_after="0.01")
        try:
            time.sleep(self.seconds)
            found = self._infer(model, version, headers, body)
        except AptError as error:
            return refusal(400, error.message)
        finally:
            self._running.release()
        if fault == "flip" and found.status == 200:
            changed = bytearray(found.body)
            changed[-1] ^= 0x40  # the top of the last element's exponent
            return found._replace(body=bytes(changed))
        return found._replace(fault=fault)

    def _infer(self, model: str, version: str, headers: Mapping[str, str], body: bytes) -> Answer:
        is_backward, base = model.endswith(".bwd"), model.removesuffix(".bwd")
        weights = self.held.get((base, version))
        if weights is None:
            return refusal(404, "unknown version")
        length = headers.get(wire.HEADER_LENGTH.lower())
        limits = wire.Limits(body_bytes=self.max_body)
        message = wire.decode_request(body, int(length) if length else None, limits)
        self.ids.append(message.id)
        coded = message.parameters.get("wire") == "int8g64"
        named = {each.name: each for each in message.tensors}
        if is_backward and weights.kind == "linear" and not {"x", "x_q"} & named.keys():  # its gradient needs none
            dy = _received(named, "dy", coded=coded)
            x = dy.new_zeros(*dy.shape[:-1], weights.tensors["weight"].shape[1])
        else:
            x = _received(named, "x", coded=coded)
        own = next(iter(weights.tensors.values())).dtype
        function = self.kinds[weights.kind]
        if is_backward:
            with torch.enable_grad():
                leaf = x.to(own).requires_grad_()
                y = function(weights.config, weights.tensors, leaf)
                found = torch.autograd.grad(y, leaf, _received(named, "dy", coded=coded).to(own))[0]
        else:
            with torch.no_grad():
                found = function(weights.config, weights.tensors, x.to(own))
        answer = wire.Message(
            tensors=self._sent("dx" if is_backward else "y", found.to(x.dtype), coded=coded), id=message.id,
            model=model, version=version,
        )  # fmt: skip
        parts, size = wire.encode_response(answer)
        return Answer(200, b"".join(parts), {wire.HEADER_LENGTH: str(size)})

    def _sent(self, name: str, tensor: Tensor, *, coded: bool) -> tuple[wire.WireTensor, ...]:
        if not coded:
            return (to_wire(name, tensor),)
        q, scale = pack(tensor)
        if self.whole_groups:
            q = F.pad(q, (0, -q.shape[-1] % 64))
        return to_wire(f"{name}_q", q), to_wire(f"{name}_scale", scale)


def _received(named: Mapping[str, wire.WireTensor], name: str, *, coded: bool) -> Tensor:
    def read(each: wire.WireTensor) -> Tensor:
        return from_wire({"t": each}, "t", _DTYPES[each.datatype], each.shape)

    if coded:
        q, scale = read(named[f"{name}_q"]), read(named[f"{name}_scale"])
        return unpack(q, scale, q.shape[-1], torch.float32)
    return read(named[name])


def read_file(body: bytes) -> Weights:
    """The weights of one safetensors file in memory."""
    size = int.from_bytes(body[:8], "little")
    head = json.loads(body[8 : 8 + size])
    about = head.pop("__metadata__")
    tensors = {}
    for name, each in head.items():
        start, end = (8 + size + offset for offset in each["data_offsets"])
        flat = torch.frombuffer(bytearray(body[start:end]), dtype=_BY_NAME[each["dtype"]])
        tensors[name] = flat.view(each["shape"])
    return Weights(kind=about["kind"], config=json.loads(about["config"]), tensors=tensors)


def seeded_faults(seed: int, rate: float, faults: Sequence[Fault] = FAULTS) -> Callable[[str], Fault | None]:
    """Faults by chance, the same ones for the same seed where one thread asks."""
    numbers = _numbers(seed)
    lock = threading.Lock()

    def fault(_: str) -> Fault | None:
        with lock:
            chance, which = next(numbers), next(numbers)
        return faults[int(which * len(faults))] if chance < rate else None

    return fault


def _numbers(seed: int) -> Iterator[float]:
    import random  # noqa: PLC0415 - tests alone

    made = random.Random(seed)
    while True:
        yield made.random()
