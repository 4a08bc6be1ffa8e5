"""Help for the server's tests: files of weights, an application in process, and one in a process of its own."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file

from apt_model.cloud import wire
from apt_model.cloud.server.app import Application
from apt_model.cloud.server.config import ServerConfig
from apt_model.cloud.server.models import Models, on_device
from apt_model.cloud.server.store import Store
from apt_model.cloud.tensors import to_wire

ROOT = Path(__file__).parents[2]
OPEN = "127.0.0.1"


def linear_file(path, dtype=torch.float32, out=24, wide=16, *, bias=True, seed=0, about=True):
    """A file of one linear layer, and its tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"weight": torch.randn(out, wide, generator=generator).to(dtype)}
    if bias:
        tensors["bias"] = torch.randn(out, generator=generator).to(dtype)
    save_file(tensors, path, metadata={"kind": "linear", "config": "{}"} if about else None)
    return tensors


def application(tmp_path, *files, store=False, **options):
    """An application that holds these files, as m0, m1, ..."""
    models = Models(on_device(torch.device("cpu")))
    for number, path in enumerate(files):
        models.load(f"m{number}", path)
    config = ServerConfig(allow_upload=store, **options)
    return Application(config, models, Store(tmp_path / "store", config.max_store) if store else None)


async def ask(app, method, path, body=b"", headers=(), *, client=OPEN, pieces=None, pause=0.0, keep_length=True):
    """One request in process: status, headers and body of its answer."""
    pieces = [body] if pieces is None else list(pieces)
    length = [(b"content-length", str(sum(map(len, pieces))).encode())] if keep_length else []
    named = [*length, *((name.lower().encode(), str(value).encode()) for name, value in dict(headers).items())]
    scope = {
        "type": "http", "method": method, "path": path, "headers": named, "client": (client, 1), "query_string": b"",
    }  # fmt: skip
    waiting, sent = list(pieces), []

    async def receive():
        if not waiting:
            await asyncio.sleep(3600)
        if pause:
            await asyncio.sleep(pause)
        piece = waiting.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(waiting)}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    start = sent[0]
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], found, b"".join(bytes(each.get("body", b"")) for each in sent[1:])


def request(tensors, *, id=None, binary=True, **parameters):  # noqa: A002
    """Body and headers of an infer."""
    message = wire.Message(
        tensors=tuple(to_wire(name, tensor) for name, tensor in tensors.items()), id=id, binary=binary,
        parameters=parameters,
    )  # fmt: skip
    parts, length = wire.encode_request(message)
    return b"".join(bytes(part) for part in parts), {wire.HEADER_LENGTH: length}


def answered(headers, body):
    """The tensors of an answer."""
    from apt_model.cloud.tensors import as_tensor

    length = headers.get(wire.HEADER_LENGTH.lower())
    found = wire.decode_response(bytearray(body), int(length) if length else None, wire.Limits())
    return {each.name: as_tensor(each) for each in found.tensors}


def infer(app, model, tensors, *, path=None, more=(), **options):
    """Tensors of the answer; the status must be 200."""
    body, headers = request(tensors, **options)
    status, found, answer = asyncio.run(
        ask(app, "POST", path or f"/v2/models/{model}/infer", body, {**headers, **dict(more)})
    )
    assert status == 200, answer
    return answered(found, answer)


@contextlib.contextmanager
def running(*args, device="cpu", env=None, log=None, port=0):
    """`apt-model serve` in a process of its own: the process and its port, once it is ready."""
    command = [sys.executable, "-m", "apt_model", "serve", "--port", str(port), "--device", device, *map(str, args)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=log or subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )
    try:
        seen = ""
        for line in process.stdout:
            seen += line
            if line.startswith("ready"):
                break
        match = re.search(r"http://\S+:(\d+)\n", seen)
        assert match, f"it did not start: {seen}"
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield process, int(match[1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def over_http(port, method, path, body=b"", headers=(), *, connection=None):
    """One request over a socket: status, headers and body."""
    own = connection is None
    connection = connection or http.client.HTTPConnection(OPEN, port, timeout=30)
    try:
        connection.request(method, path, body or None, {name: str(value) for name, value in dict(headers).items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        if own:
            connection.close()


def told(body):
    """The error of an answer."""
    return json.loads(body)["error"]
