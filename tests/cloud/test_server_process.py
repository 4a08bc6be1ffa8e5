"""`apt-model serve` over sockets, in a process of its own: start, keys, lost clients, an end that loses nothing."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.nn.functional as F
from served import OPEN, ROOT, answered, linear_file, over_http, request, running
from small_models import noise

from apt_model.cli.main import main
from apt_model.cloud.server import run
from apt_model.cloud.server.connection import HEADER_SECONDS

CANARY = "canary-7f3a91"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of one linear layer, for tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("served")
    tensors = linear_file(folder / "a.safetensors", torch.bfloat16)
    with (folder / "log").open("w+") as log, running("--weights", folder / "a.safetensors", log=log) as (process, port):
        yield process, port, tensors
        log.seek(0)
        assert not log.read()


def infer(port, x, connection=None, model="model", **options):
    body, headers = request({"x": x}, **options)
    code, found, answer = over_http(port, "POST", f"/v2/models/{model}/infer", body, headers, connection=connection)
    assert code == 200, answer
    return answered(found, answer)["y"]


def test_a_forward_over_a_socket(server):
    _, port, tensors = server
    connection = http.client.HTTPConnection(OPEN, port, timeout=10)
    for rows in (1, 3, 20_000):  # the last comes and goes in many pieces
        x = noise(rows, 16, seed=rows).bfloat16()
        assert torch.equal(infer(port, x, connection), F.linear(x, **tensors))
    connection.close()


def test_a_refused_request_leaves_the_connection_usable(server):
    _, port, tensors = server
    connection = http.client.HTTPConnection(OPEN, port, timeout=10)
    body, headers = request({"x": noise(1, 15)})
    for _ in range(3):
        assert over_http(port, "POST", "/v2/models/model/infer", body, headers, connection=connection)[0] == 400
        assert over_http(port, "POST", "/v2/models/none/infer", body, headers, connection=connection)[0] == 404
        x = noise(1, 16).bfloat16()
        assert torch.equal(infer(port, x, connection), F.linear(x, **tensors))
    connection.close()


def raw(port, *pieces, pause=0.0):
    """What a server answers to these bytes, until it closes."""
    with socket.create_connection((OPEN, port), timeout=30) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        found = b""
        try:
            while piece := connection.recv(1 << 16):
                found += piece
        except ConnectionResetError:
            pass
        return found


def test_bytes_that_are_no_http(server):
    _, port, _ = server
    end = b"\r\nHost: localhost\r\nConnection: close\r\n"
    cases = (
        (b"\x16\x03\x01\x02\x00" * 20 + b"\r\n\r\n", b" 400 "),
        (b"GET /v2 HTTP/9.9\r\n\r\n", b" 400 "),
        (b"POST /v2/models/model/infer HTTP/1.1" + end + b"Content-Length: x\r\n\r\n", b" 400 "),
        (
            b"POST /v2/models/model/infer HTTP/1.1" + end + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
            b" 400 ",
        ),
        (b"POST /v2/models/model/infer HTTP/1.1" + end + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b" 411 "),
        (b"GET /v2 HTTP/1.1" + end + b"X: " + b"y" * 1_000_000 + b"\r\n\r\n", b" 431 "),
        (b"GET /v2 HTTP/1.1" + end + b"\r\n", b" 200 "),
    )
    for sent, code in cases:
        found = raw(port, sent)
        assert code in found.partition(b"\r\n")[0], (sent[:60], found[:200])


def test_a_head_that_does_not_end(server):
    _, port, _ = server
    with socket.create_connection((OPEN, port), timeout=30) as connection:
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012
            connection.sendall(b"GET /v2 HTTP/1.1\r\n")
            end = time.monotonic() + 0.8 * HEADER_SECONDS  # sooner than a slow head is ended
            while time.monotonic() < end:  # megabytes fit the buffers between, until the server has its turn
                connection.sendall(b"X-Header: " + b"y" * 1000 + b"\r\n")
        assert psutil.Process(server[0].pid).is_running()


def is_idle(port):
    """Whether nothing is read or computed, at least after some seconds: a request counts until its answer is sent."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        metrics = over_http(port, "GET", "/metrics")[2]
        if b"apt_inflight 0" in metrics and b"apt_reading 0" in metrics:
            return True
        time.sleep(0.05)
    return False


def test_clients_that_leave(server):
    _, port, tensors = server
    body, headers = request({"x": noise(4000, 16).bfloat16()})
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    start = (
        f"POST /v2/models/model/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode()
    )
    for _ in range(20):
        for sent in (start, start + body[:100], start + body):
            connection = socket.create_connection((OPEN, port), timeout=10)
            connection.sendall(sent)
            connection.close()
    assert is_idle(port)
    x = noise(2, 16).bfloat16()
    assert torch.equal(infer(port, x), F.linear(x, **tensors))
    assert is_idle(port)


def test_a_large_body_that_nobody_asked_for(server):
    """The refusal reaches a client that sends first and reads later."""
    _, port, _ = server
    found = over_http(port, "POST", "/v2/models/none/infer", bytes(20 << 20), {"Inference-Header-Content-Length": 1})
    assert found[0] == 404


def test_the_key_is_nowhere(tmp_path):
    linear_file(tmp_path / "a.safetensors")
    arguments = ("--weights", tmp_path / "a.safetensors", "--token-env", "SERVE_KEY")
    with (tmp_path / "log").open("w+") as log:
        with running(*arguments, env={"SERVE_KEY": CANARY, "APT_DEBUG": "1"}, log=log) as (_, port):
            good = {"Authorization": f"Bearer {CANARY}"}
            assert over_http(port, "GET", "/v2")[0] == 401
            seen = [over_http(port, "GET", path, headers=good) for path in ("/v2", "/metrics", "/none")]
            seen += [over_http(port, "POST", "/v2/models/model/infer", b"x", good)]
            assert [each[0] for each in seen] == [200, 200, 404, 400]
            raw(
                port, b"GET /v2 HTTP/1.1\r\nAuthorization: Bearer " + CANARY.encode() + b"\r\nContent-Length: x\r\n\r\n"
            )
            assert CANARY not in str(seen)
        log.seek(0)
        assert CANARY not in log.read()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "::", "--allow-upload"], "there is no key"),
        (["--allow-upload", "--token-env", "NO_SUCH_KEY"], "there is no such variable"),
        ([], "missing: --weights FILE"),
        (["--weights", "none.safetensors"], "does not exist"),
        (["--allow-upload", "--max-body", "much"], "--max-body: expected a size"),
        (["--allow-upload", "--ram-mb", "5", "--gpu-mb", "5", "--device", "cpu"], "on the CPU"),
        (["--allow-upload", "--ssd-mb", "5"], "go with --ram-mb"),
        (["--weights", "x", "--config", "{}"], "--config without --block"),
    ],
)
def test_a_start_that_is_refused(arguments, said, capsys):
    assert main(["serve", "--port", "0", *arguments]) in (2, 3)
    assert said in capsys.readouterr().err


def test_an_accelerator_s_share_must_be_said(monkeypatch, capsys):
    monkeypatch.setattr("apt_model.core.system.get_device", lambda _: torch.device("cuda", 0))
    assert main(["serve", "--port", "0", "--allow-upload", "--ram-mb", "5", "--device", "cuda"]) == 2
    assert "--ram-mb on cuda:0 goes with --gpu-mb" in capsys.readouterr().err


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_every_address_is_of_both_families(tmp_path):
    tensors = linear_file(tmp_path / "a.safetensors")
    arguments = ("--weights", tmp_path / "a.safetensors", "--host", "::", "--token-env", "SERVE_KEY")
    body, headers = request({"x": noise(1, 16)})
    with running(*arguments, env={"SERVE_KEY": CANARY}) as (_, port):
        for host in ("127.0.0.1", "::1"):
            connection = http.client.HTTPConnection(host, port, timeout=10)
            code, found, answer = over_http(
                port, "POST", "/v2/models/model/infer", body, {**headers, "X-Auth-Token": CANARY}, connection=connection
            )
            assert code == 200
            assert torch.equal(answered(found, answer)["y"], F.linear(noise(1, 16), **tensors))
            connection.close()


def test_connections_that_do_nothing_are_ended(monkeypatch):
    """A head that does not come, and an answer that nobody reads: looked for twice a second."""

    class Connection:
        def __init__(self, *, heard, paused):
            self.heard, self.told, self.aborted = heard, None, False
            self.flow = SimpleNamespace(write_paused=paused)
            self.transport = SimpleNamespace(abort=lambda: setattr(self, "aborted", True))

        def close_with(self, status):
            self.told = status

    now = 1000.0
    monkeypatch.setattr(run.time, "monotonic", lambda: now)
    young, old = Connection(heard=now - 1, paused=False), Connection(heard=now - 60, paused=False)
    computing, unread = Connection(heard=0.0, paused=False), Connection(heard=0.0, paused=True)
    read_again = Connection(heard=0.0, paused=True)
    everyone = {young, old, computing, unread, read_again}
    run._sweep(everyone)
    assert [each.told for each in (young, old, computing)] == [None, b"408 Request Timeout", None]
    read_again.flow.write_paused = False
    now += run.SEND_SECONDS / 2
    run._sweep(everyone)
    read_again.flow.write_paused = True
    assert not unread.aborted
    now += run.SEND_SECONDS
    run._sweep(everyone)
    assert [each.aborted for each in (unread, read_again, computing)] == [True, False, False]


def test_it_drains(tmp_path):
    """Forwards that run when SIGTERM comes are answered; the next are told to go elsewhere; then it ends, well."""
    linear_file(tmp_path / "a.safetensors", out=4096, wide=4096)
    with running("--weights", tmp_path / "a.safetensors") as (process, port):
        body, headers = request({"x": noise(512, 4096)})
        results = []

        def client():
            connection = http.client.HTTPConnection(OPEN, port, timeout=30)
            while True:
                try:
                    code, found, answer = over_http(
                        port, "POST", "/v2/models/model/infer", body, headers, connection=connection
                    )
                except ConnectionRefusedError:
                    return
                results.append((code, found.get("retry-after"), len(answer)))
                if code != 200:
                    return

        clients = [threading.Thread(target=client) for _ in range(4)]
        for each in clients:
            each.start()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        for each in clients:
            each.join(timeout=30)
        assert process.wait(timeout=30) == 0
        assert {code for code, _, _ in results} <= {200, 503}
        assert sum(code == 200 for code, _, _ in results) >= 4
        assert all(again == "1" for code, again, _ in results if code == 503)
        assert all(size > 4096 * 512 * 4 for code, _, size in results if code == 200)


def test_not_ready_while_loading(tmp_path):
    """A pipe for a file: it is open, and nothing comes."""
    os.mkfifo(tmp_path / "a.safetensors")
    command = [sys.executable, "-m", "apt_model", "serve", "--port", "0", "--weights", str(tmp_path / "a.safetensors")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        port = int(process.stdout.readline().rpartition(":")[2])
        assert over_http(port, "GET", "/ping")[0] == 204
        assert over_http(port, "GET", "/v2/health/live")[0] == 200
        for path in ("/health", "/v2/health/ready", "/v2/models/model", "/v2/models/model/ready"):
            code, headers, body = over_http(port, "GET", path)
            assert (code, headers["retry-after"]) == (503, "1"), path
            assert "loading" in json.loads(body)["error"]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
