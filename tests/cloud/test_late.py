"""An answer that is late is computed here in the meantime: right, counted once, and the server's times are learned."""

import contextlib
import logging
import signal
import socket
import ssl
import threading
import time

import pytest
import torch
import trustme
from clouds import counts, in_threads, over_http, reference
from served import running
from torch import nn

from apt_model.cloud.backend import OIPBackend
from apt_model.cloud.client import Client, Retry, Tally
from apt_model.cloud.deadline import Deadline
from apt_model.cloud.endpoint import _KINDS, LATE, MANY, Endpoint, kind_of
from apt_model.cloud.fake import Answer, FakeServer
from apt_model.cloud.fake_http import serving
from apt_model.cloud.http_transport import HttpTransport
from apt_model.cloud.remote_block import RemoteBlock
from apt_model.cloud.transport import InProcess, Request
from apt_model.core.errors import CloudError, LateError
from apt_model.optimization import CloudNPULinear

POST = Request(method="POST", path="/x", parts=(b"x",))


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "apt_model.cloud")


def known(backend, seconds=0.02):
    """Whatever was slow while this machine did something else: every kind of request took so long."""
    for endpoint in backend.client.endpoints:
        for times in endpoint._times.values():
            times.seconds.extend([seconds] * 99)


def warm(layer, x, backend, seconds=0.02):
    """A layer whose server's times are known."""
    with torch.no_grad():
        for _ in range(4):
            layer(x)
    known(backend, seconds)
    return layer


def state(backend):
    return [each.breaker.state for each in backend.client.endpoints]


@contextlib.contextmanager
def quickly(seconds=1.0):
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < seconds


class Slow:
    """Echoes; the next answers have so many seconds, or a fault."""

    def __init__(self, *steps):
        self.steps = list(steps)

    def answer(self, _method, _path, _headers, body):
        step = self.steps.pop(0) if self.steps else 0.0
        if isinstance(step, float):
            time.sleep(step)
            return Answer(200, body)
        return Answer(200, body, fault=step)


# --- what is late


def test_times_are_kept_by_path_and_size():
    endpoint, (small, large, other) = Endpoint(InProcess(Slow())), [
        kind_of(Request(method="POST", path=path, parts=(bytes(size),)))
        for path, size in (("/a", 100), ("/a", 5000), ("/b", 100))
    ]  # fmt: skip
    assert kind_of(Request(method="POST", path="/a", parts=(bytes(64), bytes(20)))) == small
    for _ in range(7):
        endpoint.took(small, 0.01)
    assert endpoint.late_after(small, LATE) is None
    endpoint.took(small, 0.02)
    assert endpoint.late_after(small, LATE) == pytest.approx(0.03)
    assert endpoint.late_after(large, LATE) is endpoint.late_after(other, LATE) is None
    for _ in range(8):
        endpoint.took(large, 1.0)
    assert endpoint.late_after(small, LATE) == pytest.approx(0.03)
    for _ in range(99):
        endpoint.took(small, 0.01)
    assert endpoint.late_after(small, LATE) == pytest.approx(0.015)  # the slow one was long ago


def test_what_is_missed_has_twice_as_long_until_an_answer_comes():
    endpoint, kind = Endpoint(InProcess(Slow())), kind_of(POST)
    endpoint.missed(kind, 1.0)
    for _ in range(8):
        endpoint.took(kind, 0.01)
    for _ in range(5):
        endpoint.missed(kind, 0.015)  # by several threads at once
    assert endpoint.late_after(kind, LATE) == pytest.approx(0.03)
    endpoint.missed(kind, 0.03)
    assert endpoint.late_after(kind, LATE) == pytest.approx(0.06)
    endpoint.took(kind, 0.04)
    assert endpoint.late_after(kind, LATE) == pytest.approx(0.06)
    for _ in range(99):
        endpoint.took(kind, 0.01)
    assert endpoint.late_after(kind, LATE) == pytest.approx(0.015)


def test_the_kinds_are_bounded():
    endpoint = Endpoint(InProcess(Slow()))
    for number in range(_KINDS + 10):
        for _ in range(8):
            endpoint.took((f"/{number}", 1), 0.01)
    assert len(endpoint._times) == _KINDS
    assert endpoint.late_after(("/0", 1), LATE) is None
    assert endpoint.late_after((f"/{_KINDS}", 1), LATE) is not None


# --- the transports


@pytest.mark.parametrize("steps", [(0.0, 0.08), (0.08,)])
def test_a_late_answer_that_comes_is_read_and_its_connection_kept(steps):
    with serving(Slow(*steps)) as served:
        transport = HttpTransport(served.url)
        for _ in steps[1:]:
            transport.send(POST, timeout=5, late=1.0)
        with pytest.raises(LateError, match="no answer within") as late:
            transport.send(POST, timeout=5, late=0.02)
        time.sleep(0.12)
        (rest,) = late.value.rests
        assert bytes(rest().body) == b"x"
        assert bytes(transport.send(POST, timeout=5).body) == b"x"
        assert len(served.sockets) == transport.open_connections == 1
        transport.close()


@pytest.mark.parametrize("fault", ["hang", "refuse"])
def test_a_late_answer_that_does_not_come_closes_its_connection(fault):
    with serving(Slow(0.0, 0.05 if fault == "refuse" else fault)) as served:
        transport = HttpTransport(served.url)
        transport.send(POST, timeout=5)
        with quickly(), pytest.raises(LateError) as late:
            transport.send(POST, timeout=5, late=0.02)
        if fault == "refuse":
            for each in list(served.sockets):
                each.shutdown(socket.SHUT_RDWR)
        with quickly(), pytest.raises(CloudError):
            late.value.rests[0]()
        assert transport.open_connections == 0
        transport.close()


def test_the_deadline_comes_first():
    with serving(Slow("hang")) as served:
        transport = HttpTransport(served.url)
        with quickly(), pytest.raises(CloudError, match=r"no answer within 0\.05 s$"):
            transport.send(POST, timeout=0.05, late=0.1)
        assert transport.open_connections == 0
        transport.close()


class Mute:
    """A listener that answers with what it is told and no more, to clients it does not read from."""

    def __init__(self, text=b""):
        self.listener, self.text, self.taken = socket.create_server(("127.0.0.1", 0)), text, []
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        with contextlib.suppress(OSError):
            self.taken.append(self.listener.accept()[0])
            self.taken[0].sendall(self.text)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        for each in [*self.taken, self.listener]:
            each.close()


@pytest.mark.parametrize(
    ("scheme", "text", "size"),
    [
        ("http", b"", 64 << 20),  # nobody reads the request
        ("http", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n12345", 1),  # the answer stops in its middle
        ("https", b"", 1),  # there is no connection yet
    ],
)
def test_a_server_may_hang_at_any_time(scheme, text, size):
    mute = Mute(text)
    transport = HttpTransport(f"{scheme}://127.0.0.1:{mute.port}")
    request = Request(method="POST", path="/x", parts=(bytes(size),))
    with quickly(), pytest.raises(LateError) as late:
        transport.send(request, timeout=5, late=0.05)
    with pytest.raises(CloudError, match="given up"):
        late.value.rests[0]()
    assert transport.open_connections == 0
    transport.close()
    mute.close()


def test_over_tls_it_is_the_same(tmp_path):
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(5)

    def run():
        taken = context.wrap_socket(listener.accept()[0], server_side=True)
        for _ in range(2):
            read = b""
            while not read.endswith(b"x"):
                read += taken.recv(65536)
            time.sleep(0.06)
            taken.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1")
        taken.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    transport = HttpTransport(f"https://127.0.0.1:{listener.getsockname()[1]}", context=trusted)
    for late in (0.03, 0.02):
        with pytest.raises(LateError) as found:
            transport.send(POST, timeout=5, late=late)
        time.sleep(0.1)
        assert bytes(found.value.rests[0]().body) == b"1"
    transport.close()
    thread.join(5)
    listener.close()


def test_an_application_in_this_process_is_late_too():
    from apt_model.cloud.fake import asgi

    transport = InProcess(asgi(Slow(0.05, "hang")))
    for comes in (True, False):
        with pytest.raises(LateError) as late:
            transport.send(POST, timeout=5, late=0.01)
        time.sleep(0.1)
        if comes:
            assert bytes(late.value.rests[0]().body) == b"x"
        else:
            with quickly(), pytest.raises(CloudError, match="given up"):
                late.value.rests[0]()
    transport.close()


# --- the layers


def test_a_late_answer_is_computed_here_and_counted_once():
    fault = [None]
    with over_http(FakeServer(fault=lambda _: fault[0])) as (_, _, backend), torch.no_grad():
        x = torch.randn(4, 64)
        layer = warm(CloudNPULinear(64, 64, cloud_backend=backend), x, backend)
        before, endpoint = layer.get_stats(), backend.client.endpoints[0]
        fault[0] = "hang"
        with quickly():
            for _ in range(3):
                assert torch.equal(layer(x), reference(layer, x))
                assert endpoint.transport.open_connections == 0
                assert endpoint.breaker._failures > 0
        stats = layer.get_stats()
        assert counts(layer) == (4, 3, 0)
        assert stats["errors"] == {"LateError": 3}
        assert stats["retries"] == before["retries"]
        assert stats["bytes_sent"] - before["bytes_sent"] == 3 * 4 * 64 * 4 + 3 * (before["bytes_sent"] // 4 - 1024)
        assert stats["bytes_received"] == before["bytes_received"]
        assert state(backend) == ["open"]


class Here(nn.Linear):
    """A block that may take long here, or fail."""

    def __init__(self):
        super().__init__(8, 8, bias=False)
        self.requires_grad_(requires_grad=False)
        self.seconds, self.error = 0.0, None

    def forward(self, x):
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return super().forward(x)


def block(here, backend):
    return RemoteBlock("linear", {}, {"weight": here.weight}, cloud_backend=backend, local=here)


def test_an_answer_that_comes_in_the_meantime_is_learned_from():
    here, x = Here(), torch.randn(3, 8)
    with over_http() as (fake, served, backend), torch.no_grad():
        layer = warm(block(here, backend), x, backend)
        before, endpoint = layer.get_stats(), backend.client.endpoints[0]
        (kind,) = [kind for kind in endpoint._times if kind[0].endswith("/infer")]
        fake.seconds, here.seconds = 0.045, 0.05
        assert torch.equal(layer(x), nn.functional.linear(x, here.weight))
        assert counts(layer) == (4, 1, 0)
        received = before["bytes_received"]
        assert layer.get_stats()["bytes_received"] > received
        assert 0.045 < endpoint._times[kind].seconds[-1] <= 0.06  # 2 x 30 ms at most: it came while that was computed
        assert (endpoint.breaker._failures, endpoint.transport.open_connections) == (0, 1)
        assert len(served.sockets) == 1
        layer(x)  # now it is in time
        assert counts(layer) == (5, 1, 0)


def test_a_server_that_became_slower_is_used_again():
    with over_http() as (fake, _, backend), torch.no_grad():
        x = torch.randn(4, 64)
        layer = warm(CloudNPULinear(64, 64, cloud_backend=backend), x, backend, 0.02)
        fake.seconds = 0.06
        for _ in range(4):
            assert torch.equal(layer(x), reference(layer, x))
        cloud, local, _ = counts(layer)
        assert (cloud, local) in {(6, 2), (7, 1)}  # late after 30 ms and perhaps after 60, in time after 120
        assert state(backend) == ["closed"]


def test_a_process_that_hangs_costs_milliseconds():
    with running("--allow-upload") as (process, port), torch.no_grad():
        backend, x = OIPBackend([HttpTransport(f"http://127.0.0.1:{port}")]), torch.randn(4, 64)
        layer = warm(CloudNPULinear(64, 64, cloud_backend=backend), x, backend, 0.01)
        process.send_signal(signal.SIGSTOP)
        with quickly(1.0):
            for _ in range(4):
                assert torch.equal(layer(x), reference(layer, x))
        process.send_signal(signal.SIGCONT)
        assert counts(layer) == (4, 4, 0)
        assert layer.get_stats()["errors"] == {"LateError": 3, "CloudError": 1}  # then it is left alone
        assert backend.client.endpoints[0].transport.open_connections == 0
        backend.close()


@pytest.mark.parametrize("error", [ValueError("mine"), OSError("mine"), CloudError("mine")], ids=repr)
def test_what_goes_wrong_here_is_raised_and_the_exchange_ends(error):
    fault, here, x = [None], Here(), torch.randn(3, 8)
    with over_http(FakeServer(fault=lambda _: fault[0])) as (_, _, backend), torch.no_grad():
        layer = warm(block(here, backend), x, backend)
        fault[0], here.error = "hang", error
        with quickly(), pytest.raises(type(error), match="mine"):
            layer(x)
        assert counts(layer) == (4, 0, 1)
        endpoint = backend.client.endpoints[0]
        assert (endpoint.breaker._failures, endpoint.transport.open_connections) == (1, 0)


@pytest.mark.parametrize("how", ["fallback", "late", "few"])
def test_nothing_is_late_without_a_fallback_or_before_times_are_known(how):
    with over_http() as (fake, _, backend), torch.no_grad():
        x = torch.randn(4, 64)
        backend.client._late = None if how == "late" else LATE
        layer = CloudNPULinear(64, 64, cloud_backend=backend, fallback_local=how != "fallback")
        warm(layer, x, backend, 0.001)
        for times in backend.client.endpoints[0]._times.values() if how == "few" else ():
            while len(times.seconds) >= MANY:
                times.seconds.pop()
        fake.seconds = 0.05
        layer(x)
        assert counts(layer) == (5, 0, 0)


def test_what_takes_long_here_is_begun_later():
    here, x = Here(), torch.randn(3, 8)
    with over_http() as (fake, _, backend), torch.no_grad():
        here.seconds = 0.4
        layer = warm(block(here, backend), x, backend, 0.01)  # computed here once, to compare
        fake.seconds = 0.06
        layer(x)  # late after 15 ms, but a quarter of 400 ms is longer
        assert counts(layer) == (5, 0, 0)


@pytest.mark.parametrize("wire", ["exact", "int8g64"])
def test_a_request_of_several_ends_with_the_one_that_is_late(wire):
    fault = []
    fake = FakeServer(max_body=12_000, max_upload=1 << 20, fault=lambda _: fault.pop(0) if fault else None)
    with over_http(fake) as (_, _, backend), torch.no_grad():
        x = torch.randn(200, 64)
        layer = warm(CloudNPULinear(64, 128, cloud_backend=backend, wire=wire), x, backend)
        asked = len(fake.ids)
        fault += [None, "hang"]
        with quickly():
            assert torch.equal(layer(x), reference(layer, x))
        assert counts(layer) == (4, 1, 0)
        assert len(fake.ids) <= asked + 2


@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_gradients_of_what_was_late_are_those_of_here(cast, which):
    fault = [None]
    fake = FakeServer(fault=lambda path: fault[0] if (".bwd/" in path) == (which == "backward") else None)
    with over_http(fake) as (_, _, backend):
        layer, plain = CloudNPULinear(6, 9, cloud_backend=backend), nn.Linear(6, 9)
        plain.load_state_dict(layer.state_dict())
        grads = []
        for module in (layer, plain):
            x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
            with torch.autocast("cpu", cast, enabled=cast is not None):
                if module is layer:
                    for _ in range(8):
                        layer(x).float().square().sum().backward()
                    known(backend)
                    fault[0], x.grad = "hang", None
                    layer.zero_grad()
                with quickly():
                    y = module(x)
                    y.float().square().sum().backward()
            grads.append([y, x.grad, *(each.grad for each in module.parameters())])
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(
                one, two, rtol=1e-5 if cast is None else 0.02, atol=1e-5 if cast is None else 0.02
            )
        stats = layer.get_stats()
        assert counts(layer) == ((8, 1, 0) if which == "forward" else (9, 0, 0))
        assert (stats["backward_cloud"], stats["backward_local"]) == ((8, 0) if which == "forward" else (8, 1))
        assert stats["errors"] == {"LateError": 1}


# --- replicas


@contextlib.contextmanager
def two(*faults, seconds=0.02):
    """A layer before two servers, whose times are known, and which then have these faults."""
    fault = [None, None]
    fakes = [FakeServer(fault=lambda _, number=number: fault[number]) for number in range(2)]
    with serving(fakes[0]) as first, serving(fakes[1]) as second, torch.no_grad():
        transports = [HttpTransport(each.url) for each in (first, second)]
        backend = OIPBackend(transports, client=Client(transports, retry=Retry(attempts=1)))
        layer, x = CloudNPULinear(16, 16, cloud_backend=backend), torch.randn(2, 16)
        warm(layer, x, backend)
        endpoints = backend.client.endpoints
        for kind in list(endpoints[0]._times):
            endpoints[1].took(kind, 0.0)
        known(backend, seconds)
        fault[:] = faults
        try:
            yield layer, x, backend
        finally:
            backend.close()
        assert not any(each.open_connections for each in transports)


def ended(transport):
    until = time.monotonic() + 2
    while transport.open_connections:
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_replica_is_asked_before_it_is_computed_here():
    with two("hang", None, seconds=0.1) as (layer, x, backend):  # the replica has 150 ms, on a machine that is busy too
        with quickly():
            assert torch.equal(layer(x), reference(layer, x))
        assert counts(layer) == (5, 0, 0)
        assert layer.get_stats()["retries"] == 1
        ended(backend.client.endpoints[0].transport)  # nobody waits for it to the deadline
        assert [each.breaker._failures for each in backend.client.endpoints] == [1, 0]


def test_where_all_are_late_it_is_computed_here():
    with two("hang", "hang") as (layer, x, backend):
        with quickly():
            assert torch.equal(layer(x), reference(layer, x))
        assert counts(layer) == (4, 1, 0)
        assert layer.get_stats()["errors"] == {"LateError": 1}
        assert [each.breaker._failures for each in backend.client.endpoints] == [1, 1]
        assert not any(each.transport.open_connections for each in backend.client.endpoints)
        with quickly(2.0):
            for _ in range(3):
                layer(x)
        assert counts(layer) == (4, 4, 0)
        assert state(backend) == ["open", "open"]


def test_a_replica_that_is_left_alone_is_none():
    with two("hang", None) as (layer, x, backend):
        backend.client.endpoints[1].breaker.failure(severe=True)
        with quickly():
            assert torch.equal(layer(x), reference(layer, x))
        assert counts(layer) == (4, 1, 0)
        assert backend.client._pool is None


# --- threads


def test_counters_are_exact_under_threads():
    lock, numbers = threading.Lock(), iter(range(10_000))

    def fault(_):
        with lock:
            return (None, None, "hang", None, None, "fail")[next(numbers) % 6]

    fake = FakeServer(max_inflight=64)
    with serving(fake) as served:
        transport = HttpTransport(served.url)
        backend = OIPBackend([transport], client=Client([transport], retry=Retry(attempts=1)))
        backend.client.endpoints[0].breaker.threshold = 1 << 60
        with torch.no_grad():
            x = torch.randn(3, 8)
            layer = warm(CloudNPULinear(8, 8, cloud_backend=backend), x, backend, 0.01)
            fake.fault, wrong = fault, []

            def work(_):
                for _ in range(10):
                    if not torch.allclose(layer(x), reference(layer, x), atol=1e-5):
                        wrong.append(1)  # noqa: PERF401 - a thread that fails says so at once

            with quickly(5.0):
                in_threads(work, 4)
            assert not wrong
            cloud, local, raised = counts(layer)
            stats = layer.get_stats()
            assert (cloud + local, raised) == (44, 0)
            assert local == stats["cloud_errors"] == sum(stats["errors"].values())
            assert stats["errors"]["LateError"] > 3
            backend.close()
            assert transport.open_connections == 0


def test_a_late_probe_leaves_the_breaker_right():
    """One that was let through to see whether the server is there again, and hangs."""
    fault = [None]
    with over_http(FakeServer(fault=lambda _: fault[0])) as (_, _, backend), torch.no_grad():
        x = torch.randn(4, 64)
        layer = warm(CloudNPULinear(64, 64, cloud_backend=backend), x, backend)
        breaker = backend.client.endpoints[0].breaker
        breaker.failure(severe=True)
        breaker._until = 0.0
        fault[0] = "hang"
        layer(x)
        assert (breaker.state, breaker._probing) == ("open", False)
        breaker._until, fault[0] = 0.0, None
        layer(x)
        assert breaker.state == "closed"


def test_an_answer_to_the_client_may_come_late_too():
    with serving(Slow(*[0.0] * 8, 0.06)) as served:
        client, tally = Client([HttpTransport(served.url)]), Tally()
        for _ in range(8):
            client.ask(POST, Deadline(5))
        known_times = client.endpoints[0]._times[kind_of(POST)]
        known_times.seconds.extend([0.01] * 99)
        with pytest.raises(LateError) as late:
            client.ask(POST, Deadline(5), tally=tally, meanwhile=0.03)
        assert (tally.sent, tally.received, known_times.least) == (1, 0, 0.06)
        time.sleep(0.1)
        late.value.end()
        assert (tally.sent, tally.received, known_times.least) == (1, 1, 0.0)
        client.close()
