"""What a forward over HTTP costs beside an echo of the same bytes by plain uvicorn, and beside tritonclient.

    python benchmarks/cloud/rpc.py [--rounds 40] [--small] [--folder amd-epyc-2-cores]

Arms, in turns, a round of each after the other; client and server share the machine, and torch has one thread in each:

    echo      uvicorn as it comes, and an application that reads the body into one buffer and sends that back; to a raw
              keep-alive client
    server    `apt-model serve`'s application, to that raw client
    client    our client without a layer: `OIPBackend.infer`
    layer     `CloudNPULinear.forward`, every token checked
    triton    tritonclient[http], from numpy to numpy
    product   the linear itself, here: what is taken off where a figure says "less the product"

Every answer is compared with the product. Microseconds, over all calls of all rounds.
"""

import argparse
import contextlib
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import record  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import uvicorn  # noqa: E402

from apt_model.cloud import wire  # noqa: E402
from apt_model.cloud.backend import OIPBackend  # noqa: E402
from apt_model.cloud.client import DEADLINE_HEADER  # noqa: E402
from apt_model.cloud.deadline import Deadline  # noqa: E402
from apt_model.cloud.http_transport import HttpTransport  # noqa: E402
from apt_model.cloud.server import run  # noqa: E402
from apt_model.cloud.server.app import Application  # noqa: E402
from apt_model.cloud.server.config import ServerConfig  # noqa: E402
from apt_model.cloud.server.models import Models, on_device  # noqa: E402
from apt_model.cloud.server.store import Store  # noqa: E402
from apt_model.cloud.tensors import to_wire  # noqa: E402
from apt_model.optimization import CloudNPULinear  # noqa: E402

WIDTH = 16  # narrow, so that the product is short beside the bytes
SIZES = {"8 KiB": 8 << 10, "1 MiB": 1 << 20}
CALLS = {"8 KiB": 100, "1 MiB": 20}  # of an arm in a round
REMOTE = ("echo", "server", "client", "layer", "triton")


async def echo(scope, receive, send):
    """Read a body into one buffer and send it back."""
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


def serve(kind, folder):
    """In a process of its own: print the port, and serve until SIGTERM."""
    torch.set_num_threads(1)
    if kind == "echo":
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio sets it on sockets of its own alone
        print(listening.getsockname()[1], flush=True)
        quiet = {"log_level": "error", "access_log": False, "lifespan": "off"}
        config = uvicorn.Config(echo, http="httptools", timeout_keep_alive=run.KEEP_ALIVE_SECONDS, **quiet)
        uvicorn.Server(config).run(sockets=[listening])
        return
    config = ServerConfig(allow_upload=True)
    models, store = Models(on_device(torch.device("cpu"))), Store(Path(folder) / kind, config.max_store)
    run.serve(Application(config, models, store), "127.0.0.1", 0, on_start=lambda port: print(port, flush=True))


class Raw:
    """One connection; a new id in every request, as a client's; nothing is copied but into the answer's buffer."""

    def __init__(self, port, path, x):
        message = wire.Message(tensors=(to_wire("x", x),), id=uuid.uuid4().hex, wanted=("y",))
        (text, data), length = wire.encode_request(message)
        self.text, self.data, self.id = text, data, message.id.encode()
        self.head = (
            f"POST {path}/infer HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {length + len(data)}\r\n"
            f"Content-Type: application/octet-stream\r\n{wire.HEADER_LENGTH}: {length}\r\n{DEADLINE_HEADER}: 10000\r\n"
            "\r\n"
        ).encode()
        self.buffer = memoryview(bytearray(len(data) + 8192))
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __call__(self):
        text = self.text.replace(self.id, uuid.uuid4().hex.encode())
        sent = self.socket.sendmsg([self.head, text, self.data]) - len(self.head) - len(text)
        if sent < len(self.data):
            self.socket.sendall(self.data[sent:])
        got, end = 0, None
        while end is None or got < end:
            count = self.socket.recv_into(self.buffer[got:])
            assert count, "the server went away"
            got += count
            if end is None and (at := bytes(self.buffer[: min(got, 1024)]).find(b"\r\n\r\n")) >= 0:
                head = bytes(self.buffer[:at]).lower()
                end = at + 4 + int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return torch.frombuffer(self.buffer, dtype=torch.uint8)[end - len(self.data) : end]


class Bench:
    """The arms of one size: each a function, and what its answer must be."""

    def __init__(self, ports, size):
        torch.manual_seed(0)
        self.x = x = torch.randn(SIZES[size] // 4 // WIDTH, WIDTH)
        linear = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(requires_grad=False)
        self.backend = backend = OIPBackend([HttpTransport(f"http://127.0.0.1:{ports['server']}")])
        layer = CloudNPULinear.from_linear(linear, cloud_backend=backend, fallback_local=False)
        layer.push_weights()
        weights = layer._known.weights
        path = f"/v2/models/{weights.model}/versions/{weights.version}"
        wanted = {"y": (torch.float32, tuple(x.shape))}
        y = F.linear(x, linear.weight, linear.bias)
        as_bytes = y.view(-1).view(torch.uint8)
        self.arms = {
            "echo": (Raw(ports["echo"], path, x), x.view(-1).view(torch.uint8)),
            "server": (Raw(ports["server"], path, x), as_bytes),
            "client": (lambda: backend.infer(weights, {"x": x}, wanted, deadline=Deadline(10.0))["y"], y),
            "layer": (lambda: layer(x), y),
            "triton": (self._triton(ports["server"], weights), y),
            "product": (lambda: F.linear(x, linear.weight, linear.bias), y),
        }

    def _triton(self, port, weights):
        import tritonclient.http as triton

        client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        array, wanted = self.x.numpy(), [triton.InferRequestedOutput("y", binary_data=True)]

        def call():
            given = triton.InferInput("x", list(array.shape), "FP32")
            given.set_data_from_numpy(array, binary_data=True)
            found = client.infer(weights.model, [given], model_version=weights.version, outputs=wanted)
            return found.as_numpy("y")

        return call

    def round(self, calls, took):
        """Some calls of each arm, after two that are not timed."""
        for name, (call, expected) in self.arms.items():
            for number in range(-2, calls):
                began = time.perf_counter()
                found = call()
                seconds = time.perf_counter() - began
                assert torch.equal(found, expected) if name == "echo" else _is_close(found, expected), name
                if number >= 0:
                    took[name].append(1e6 * seconds)


def _is_close(found, expected):
    found = torch.tensor(found) if isinstance(found, np.ndarray) else found
    found, expected = (each.clone().view(torch.float32) for each in (found, expected))  # an answer's place is any
    return torch.allclose(found.view(-1), expected.view(-1), rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def served():
    """Both servers' ports."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        servers = {
            kind: subprocess.Popen(  # noqa: S603 - this file
                [sys.executable, __file__, "--serve", kind, folder], stdout=subprocess.PIPE, text=True, env=environment
            )
            for kind in ("echo", "server")
        }
        try:
            yield {kind: int(server.stdout.readline()) for kind, server in servers.items()}
        finally:
            for server in servers.values():
                server.terminate()
                server.wait()
                server.stdout.close()


def row(size, took):
    """Percentiles of each arm, and the ratios and differences that the goals are about."""
    middle = {name: statistics.median(each) for name, each in took.items()}
    found = {"activations": size, "width": WIDTH, "calls": len(took["echo"])}
    for name, each in took.items():
        cuts = statistics.quantiles(each, n=10)
        found[name] = {"median": round(middle[name], 1), "p10": round(cuts[0], 1), "p90": round(cuts[8], 1)}
    less = {name: middle[name] - (middle["product"] if name != "echo" else 0) for name in REMOTE}
    found["to_echo"] = {name: round(middle[name] / middle["echo"], 3) for name in REMOTE[1:]}
    found["to_echo_less_the_product"] = {name: round(less[name] / middle["echo"], 3) for name in REMOTE[1:]}
    found["over_echo_less_the_product"] = {name: round(less[name] - middle["echo"], 1) for name in REMOTE[1:]}
    found["to_triton"] = {name: round(middle[name] / middle["triton"], 3) for name in REMOTE[:-1]}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--small", action="store_true", help="two rounds, to see that it runs")
    parser.add_argument("--folder", help="of benchmarks/results, to write serve_rpc.json there")
    parser.add_argument("--out", type=Path, help="another folder for it")
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    logging.getLogger("apt_model.cloud").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    above, rows = record.header(), []
    with served() as ports:
        benches = {size: Bench(ports, size) for size in SIZES}
        took = {size: {name: [] for name in bench.arms} for size, bench in benches.items()}
        for _ in range(2 if options.small else options.rounds):
            for size, bench in benches.items():
                bench.round(CALLS[size] // (10 if options.small else 1), took[size])
        for size, bench in benches.items():
            bench.backend.close()
            rows.append(row(size, took[size]))
            print(json.dumps(rows[-1]), flush=True)
    folder = options.out or (ROOT / "benchmarks" / "results" / options.folder if options.folder else None)
    if folder:
        above["machine"]["device"] = record.processor()
        above["command"] = " ".join(["python", "benchmarks/cloud/rpc.py", *sys.argv[1:]])
        above["unit"] = "us; client and server on the same cores"
        print(record.write("serve_rpc", rows, folder=folder, above=above))


if __name__ == "__main__":
    main()
