"""A short forward that comes whole is answered in one step: as all others are, and by the same rules."""

import contextlib
import gc
import os
import socket
import threading
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from served import answered, application, linear_file, request
from small_models import noise

from apt_model.cloud import int8g64
from apt_model.cloud.server import run
from apt_model.cloud.server.key import Key

pytest.importorskip("uvicorn")
HOST = b"Host: localhost"


@contextlib.contextmanager
def served(app, host="127.0.0.1"):
    """The application by uvicorn, in a thread: what makes a connection to it, and the server."""
    ports = []
    ready = threading.Event()
    server = run.make_server(app, host, 0, lambda port: (ports.append(port), ready.set()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": run._both_families(0) if host == "::" else None})
    thread.start()
    assert ready.wait(30)
    lines = []
    try:
        yield lambda: lines.append(Line(ports[0])) or lines[-1], server
    finally:
        for line in lines:
            line.socket.close()
        server.should_exit = True
        thread.join()


@pytest.fixture
def app(tmp_path):
    tensors = linear_file(tmp_path / "a.safetensors")
    made = application(tmp_path, tmp_path / "a.safetensors", store=True)
    made.expected = lambda x: F.linear(x, **tensors)
    return made


def post(body, headers, path=b"/v2/models/m0/infer", more=(HOST,)):
    named = [f"{name}: {value}".encode() for name, value in headers.items()]
    lines = [b"POST " + path + b" HTTP/1.1", *more, *named, b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*lines, b"", body])


class Line:
    """A connection that is read by hand."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.rest = b""

    def read(self):
        """Status, headers and body of an answer, and in how many pieces it came."""
        pieces = 0
        while b"\r\n\r\n" not in self.rest:
            self.rest += self._piece()
            pieces += 1
        head, _, rest = self.rest.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:])
        length = int(headers["content-length"])
        while len(rest) < length:
            rest += self._piece()
            pieces += 1
        self.rest = rest[length:]
        return int(lines[0].split()[1]), headers, rest[:length], pieces

    def _piece(self):
        piece = self.socket.recv(1 << 16)
        assert piece, "closed"
        return piece

    def ask(self, *pieces):
        for number, piece in enumerate(pieces):
            time.sleep(0.03 if number else 0)
            self.socket.sendall(piece)
        return self.read()


def in_two(message):
    """Pieces that a server gets one after the other."""
    return [message[:-5], message[-5:]]


def is_soon(what):
    """Whether it is so, after at most some seconds: an answer is there before it is counted."""
    end = time.monotonic() + 10
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    return what()


def plain(headers):
    return {name: value for name, value in headers.items() if name != "date"}


def test_at_once_and_the_usual_way_answer_alike(app, monkeypatch):
    x = noise(3, 16)
    good, headers = request({"x": x}, id="a")
    bad, of_bad = request({"x": noise(3, 15)}, id="a")
    json_alone, of_json = request({"x": x}, binary=False)
    eight, of_eight = request(
        {"x_q": torch.ones(2, 64, dtype=torch.int8), "x_scale": torch.ones(2, 1).half()}, wire="int8g64"
    )
    cases = {
        "a forward": (post(good, headers), 200, True),
        "in 8 bits": (post(eight, of_eight), 200, True),
        "a gradient": (post(*request({"x": x, "dy": noise(3, 24)}, id="b"), b"/v2/models/m0.bwd/infer"), 200, True),
        "an answer in JSON": (post(json_alone, of_json), 200, False),
        "of another width": (post(bad, of_bad), 400, False),
        "no such model": (post(good, headers, b"/v2/models/m1/infer"), 404, False),
        "no such path": (post(good, headers, b"/v2/other/m0/infer"), 404, False),
        "another call": (post(good, headers, b"/v2/models/m0/versions/infer"), 405, False),
        "no time": (post(good, {**headers, "X-Apt-Deadline-Ms": 0}), 408, False),
        "a deadline that is none": (post(good, {**headers, "X-Apt-Deadline-Ms": "x"}), 400, False),
        "JSON of no length": (post(good, {"Inference-Header-Content-Length": "x"}), 400, False),
        "compressed": (post(good, {**headers, "Content-Encoding": "gzip"}), 415, False),
        "for another host": (post(good, headers, more=(b"Host: example.com",)), 403, False),
        "no JSON": (post(b"nothing", headers), 400, False),
    }
    with served(app) as (connect, server):
        usual, found = [], app.forwards.at_once
        monkeypatch.setattr(app.forwards, "at_once", lambda *args: usual.append(found(*args)) or usual[-1])
        for number, (name, (message, status, is_short)) in enumerate(cases.items()):
            line, times = connect(), 2 * number
            whole = line.ask(message)
            # An answer is there before what sent it returns.
            assert is_soon(lambda: len(usual) == times + 1), name  # noqa: B023
            assert usual[-1] == is_short, name
            split = connect().ask(*in_two(message))
            assert len(usual) == times + 1, name  # what does not come whole goes the usual way
            assert (whole[0], split[0]) == (status, status), (name, whole, split)
            assert (plain(whole[1]), whole[2]) == (plain(split[1]), split[2]), name
            # The connection stays, whichever way it went.
            again = line.ask(post(good, headers))
            assert torch.equal(answered(again[1], again[2])["y"], app.expected(x)), name
            assert is_soon(lambda: len(usual) == times + 2), name  # noqa: B023
        asked = 3 * len(cases)
        assert is_soon(lambda: server.server_state.total_requests == asked)
        counts = [text for text in app.metrics.text().splitlines() if text.startswith("apt_requests_total")]
        assert sum(int(text.split()[-1]) for text in counts) == asked


def test_an_answer_is_one_write(app):
    x = noise(3, 16)
    message = post(*request({"x": x}))
    with served(app) as (connect, _):
        line = connect()
        for pieces in ([message], in_two(message)):
            assert {line.ask(*pieces)[3] for _ in range(5)} == {1}
        assert line.ask(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")[3] == 1


@pytest.mark.parametrize("pieces", [1, 2, 7, 40])
def test_a_long_body_is_read_where_it_is_computed_from(app, pieces):
    x = noise(30_000, 16)
    body, headers = request({"x": x})
    asked = b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    message = post(body, headers) + asked  # the next request, behind the body in one piece
    with served(app) as (connect, server):
        line = connect()
        step = -(-len(message) // pieces)
        for start in range(0, len(message), step):
            line.socket.sendall(message[start : start + step])
            time.sleep(0.02 if pieces < 10 else 0.001)
        status, headers, answer, _ = line.read()
        assert status == 200
        assert torch.allclose(answered(headers, answer)["y"], app.expected(x))
        assert line.read()[0] == 200
        # What was read past uvicorn's parser left it as it is after any body.
        assert line.ask(post(body[:500_000], {"Content-Encoding": "x"}))[0] == 415
        assert line.ask(asked)[0] == 200
        assert is_soon(lambda: server.server_state.total_requests == 4)
        assert app.metrics.received >= len(body)


def test_a_long_body_that_does_not_end(tmp_path):
    linear_file(tmp_path / "a.safetensors")
    app = application(tmp_path, tmp_path / "a.safetensors", silent_seconds=0.3)
    message = post(*request({"x": noise(30_000, 16)}))
    with served(app) as (connect, server):
        slow, gone = connect(), connect()
        for line in (slow, gone):
            line.socket.sendall(message[:500_000])
        gone.socket.close()
        began = time.monotonic()
        status, headers, _, _ = slow.read()  # though it goes on for a while
        assert (status, headers["connection"]) == (408, "close")
        assert 0.25 < time.monotonic() - began < 5
        assert is_soon(lambda: not server.server_state.connections)
        assert len(app._readings) == app._readings.nbytes == 0
        assert connect().ask(message)[0] == 200


def test_a_long_body_that_goes_on_has_its_time(tmp_path):
    tensors = linear_file(tmp_path / "a.safetensors")
    app = application(tmp_path, tmp_path / "a.safetensors", silent_seconds=0.3)
    x = noise(30_000, 16)
    message = post(*request({"x": x}))
    with served(app) as (connect, _):
        line = connect()
        for start in range(0, len(message), 1 + len(message) // 6):
            line.socket.sendall(message[start : start + 1 + len(message) // 6])
            time.sleep(0.1)
        status, headers, body, _ = line.read()
        assert status == 200
        assert torch.allclose(answered(headers, body)["y"], F.linear(x, **tensors))


def test_requests_one_behind_the_other(app):
    """Short ones and others on one connection, all sent before the first is answered."""
    xs = [noise(2, 16), noise(9000, 16), noise(2, 16) + 1, noise(9000, 16) + 1, noise(1, 16)]
    with served(app) as (connect, _):
        line = connect()
        line.socket.sendall(b"".join(post(*request({"x": x}, id=str(number))) for number, x in enumerate(xs)))
        for x in xs:
            status, headers, body, _ = line.read()
            assert status == 200
            assert torch.allclose(answered(headers, body)["y"], app.expected(x))


@pytest.mark.parametrize("rows", [2, 30_000])
def test_one_that_waits_to_be_asked_for_its_body(app, rows):
    body, headers = request({"x": noise(rows, 16)})
    message = post(body, headers, more=(HOST, b"Expect: 100-continue"))
    head = message[: -len(body)]
    with served(app) as (connect, _):
        line = connect()
        line.socket.sendall(head)
        assert line.socket.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert line.ask(body)[0] == 200


@pytest.mark.parametrize("rows", [2, 30_000])
def test_a_connection_that_is_to_end(app, rows):
    message = post(*request({"x": noise(rows, 16)}), more=(HOST, b"Connection: close"))
    with served(app) as (connect, _):
        line = connect()
        status, headers, _, _ = line.ask(message)
        assert (status, headers["connection"]) == (200, "close")
        assert line.socket.recv(1) == b""


def test_while_it_drains_and_when_it_is_full(app, monkeypatch):
    message = post(*request({"x": noise(2, 16)}))
    with served(app) as (connect, _):
        line = connect()
        app.metrics.inflight = app.config.max_inflight
        assert line.ask(message)[0] == 429
        app.metrics.inflight = 0
        assert line.ask(message)[0] == 200
        app.draining = True
        status, headers, _, _ = line.ask(message)
        assert (status, headers["connection"]) == (503, "close")


def test_the_key_is_asked_for(tmp_path):
    linear_file(tmp_path / "a.safetensors")
    app = application(tmp_path, tmp_path / "a.safetensors", key=Key("canary"))
    body, headers = request({"x": noise(2, 16)})
    with served(app) as (connect, _):
        line = connect()
        assert line.ask(post(body, headers))[0] == 401
        assert line.ask(post(body, {**headers, "Authorization": "Bearer canary"}))[0] == 200
        assert line.ask(post(body, {**headers, "Authorization": "Bearer canarx"}))[0] == 401


@pytest.mark.parametrize("host", ["127.0.0.1", "::"])
def test_no_answer_waits_for_an_acknowledgement(app, host):
    if host == "::" and not socket.has_dualstack_ipv6():
        pytest.skip("this system has no IPv6")
    with served(app, host) as (connect, server):
        line = connect()
        assert line.ask(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200
        (connection,) = server.server_state.connections
        taken = connection.transport.get_extra_info("socket")
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_long_body_whose_head_is_wrong_is_refused_before_it_is_there(app):
    message = post(*request({"x": noise(30_000, 15)}))
    with served(app) as (connect, server):
        line = connect()
        status, headers, body, _ = line.ask(message[:400_000])
        assert (status, headers["connection"]) == (400, "close")
        assert b"expected a shape [..., 16]" in body
        line.socket.close()
        assert is_soon(lambda: not server.server_state.connections)
        assert len(app._readings) == app._readings.nbytes == 0


@pytest.mark.parametrize("what", ["a gradient", "in 8 bits", "of two tensors"])
def test_a_long_body_of_other_kinds(app, what):
    x = noise(30_000, 16)
    if what == "in 8 bits":
        q, scale = int8g64.pack(x)
        message = post(*request({"x_q": q, "x_scale": scale}, wire="int8g64"))
    else:
        tensors = {"dy": noise(30_000, 24), **({"x": x} if what == "of two tensors" else {})}
        message = post(*request(tensors), b"/v2/models/m0.bwd/infer")
    with served(app) as (connect, _):
        found = []
        for pieces in ([message], [message[:300_000], message[300_000:]]):
            status, headers, body, _ = connect().ask(*pieces)
            assert status == 200, body
            found.append(answered(headers, body))
    for name, each in found[0].items():
        assert torch.equal(each, found[1][name])
    if what == "in 8 bits":
        y = app.expected(int8g64.unpack(q, scale, 16, torch.float32))
        assert torch.equal(int8g64.pack(y)[0], found[0]["y_q"])
    else:
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            app.expected(leaf).backward(tensors["dy"])
        torch.testing.assert_close(found[0]["dx"], leaf.grad)


@pytest.mark.parametrize("rows", [0, 2, 30_000])
def test_a_connection_that_is_gone_is_freed_at_once(app, rows):
    """Ten thousand of them are many megabytes, where each waits for the collector of cycles."""
    asked = b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    message = post(*request({"x": noise(rows, 16)})) if rows else asked
    with served(app) as (connect, server):
        line = connect()
        assert line.ask(message)[0] == 200
        freed = [weakref.ref(each) for each in server.server_state.connections]
        gc.collect()
        gc.disable()
        try:
            line.socket.close()
            assert is_soon(lambda: freed[0]() is None)
        finally:
            gc.enable()


def test_a_long_answer_is_sent_with_its_head(app, monkeypatch):
    """One system call for all that the socket takes, and nothing is lost where it takes less."""
    calls, writev = [], os.writev

    def limited(file, parts):
        calls.append(sum(len(part) for part in parts))
        take = (len(calls) * 37_777) % calls[-1]  # also less than the head
        if len(calls) == 3:
            raise BlockingIOError
        return writev(file, [b"".join(parts)[: take if len(calls) > 1 else 50]])

    monkeypatch.setattr(os, "writev", limited)
    x = noise(30_000, 16)
    message = post(*request({"x": x}))
    with served(app) as (connect, _):
        line = connect()
        for number in range(1, 5):
            status, headers, body, _ = line.ask(message)
            assert status == 200
            assert torch.allclose(answered(headers, body)["y"], app.expected(x))
            assert len(calls) == number
            assert calls[-1] > len(body)
