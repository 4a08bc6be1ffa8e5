"""What a forward over HTTP costs beside an echo of the same bytes by the same uvicorn: a block that computes nothing.

    python benchmarks/cloud/rpc.py

Client and server share the machine. Prints a row of JSON: medians in microseconds, each answer compared.
"""

import json
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "cloud"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from record import machine  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from served import request  # noqa: E402
from torch import nn  # noqa: E402

from apt_model.cloud.server import run  # noqa: E402
from apt_model.cloud.server.app import Application  # noqa: E402
from apt_model.cloud.server.blocks import Block, Kind, register, two_ports  # noqa: E402
from apt_model.cloud.server.config import ServerConfig  # noqa: E402
from apt_model.cloud.server.models import Models, on_device  # noqa: E402

ROWS = {"8 KiB": 1, "1 MiB": 128}
WIDTH = 4096
ROUNDS, CALLS = 9, 60


class Echo(Application):
    """Reads a body into one buffer, as the server does, and sends it back."""

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        length = next(int(value) for name, value in scope["headers"] if name == b"content-length")
        buffer, place, more = bytearray(length), 0, True
        while more:
            message = await receive()
            piece, more = message["body"], message["more_body"]
            buffer[place : place + len(piece)] = piece
            place += len(piece)
        headers = [(b"content-length", str(length).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": memoryview(buffer)})


def serve(kind):
    register(Kind("nothing", lambda *_: Block(nn.Identity(), *two_ports(WIDTH, WIDTH))))
    path = Path(sys.argv[2])
    models = Models(on_device(torch.device("cpu")))
    models.load("model", path, {"kind": "nothing", "config": {}})
    models.find("model", None).block.dtype = torch.float16
    app = (Echo if kind == "echo" else Application)(ServerConfig(), models)
    run.serve(app, "127.0.0.1", 0, on_start=lambda port: print(port, flush=True))


class Client:
    """One connection; nothing is copied but into the answer's buffer."""

    def __init__(self, port, rows):
        body, headers = request({"x": torch.randn(rows, WIDTH).half()})
        named = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        path = "POST /v2/models/model/infer HTTP/1.1\r\nHost: localhost\r\n"
        self.parts = [f"{path}Content-Length: {len(body)}\r\n{named}\r\n".encode(), body]
        self.data = body[-rows * WIDTH * 2 :]
        self.buffer = memoryview(bytearray(len(body) + 4096))
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call(self):
        began = time.perf_counter()
        sent = self.socket.sendmsg(self.parts)
        left = memoryview(self.parts[1])[max(sent - len(self.parts[0]), 0) :]
        if left:
            self.socket.sendall(left)
        got, end = 0, None
        while end is None or got < end:
            got += self.socket.recv_into(self.buffer[got:])
            if end is None and (at := bytes(self.buffer[: min(got, 1024)]).find(b"\r\n\r\n")) >= 0:
                head = bytes(self.buffer[:at]).lower()
                end = at + 4 + int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        took = time.perf_counter() - began
        assert self.buffer[end - len(self.data) : end] == self.data
        return took


def main():
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_file({"weight": torch.zeros(1)}, path)
        servers = {
            kind: subprocess.Popen([sys.executable, __file__, kind, str(path)], stdout=subprocess.PIPE, text=True)  # noqa: S603
            for kind in ("echo", "forward")
        }
        row = {}
        try:
            ports = {kind: int(server.stdout.readline()) for kind, server in servers.items()}
            for name, rows in ROWS.items():
                clients = {kind: Client(port, rows) for kind, port in ports.items()}
                took = {kind: [] for kind in clients}
                for _ in range(ROUNDS):
                    for kind, client in clients.items():
                        took[kind].append(statistics.median(client.call() for _ in range(CALLS)) * 1e6)
                row[name] = {kind: round(statistics.median(each), 1) for kind, each in took.items()}
                row[name]["ratio"] = round(row[name]["forward"] / row[name]["echo"], 3)
        finally:
            for server in servers.values():
                server.terminate()
                server.wait()
    print(json.dumps({**row, "machine": machine()}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(sys.argv[1])
    else:
        main()
