"""One method, over a socket and without: what goes wrong on the way arrives as our own errors, in time."""

import os
import socket
import threading
import time

import pytest
from clouds import CANARY, bearer

from apt_model.cloud.fake import Answer
from apt_model.cloud.fake_http import serving
from apt_model.cloud.http_transport import HttpTransport
from apt_model.cloud.transport import InProcess, Request
from apt_model.core.errors import CloudError, ConfigError, DeadlineError, RefusedError, WireError


class Echo:
    """Answers with the body, or with what it was told to."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def answer(self, method, path, headers, body):
        self.asked.append((method, path, headers))
        return self.answers.pop(0) if self.answers else Answer(200, body)


def ask(transport, *parts, timeout=5.0, method="POST", path="/x", most=1 << 20):
    return transport.send(Request(method=method, path=path, parts=parts, most=most), timeout=timeout)


def test_parts_arrive_as_one_body_with_the_key_below_the_addresss_path():
    echo = Echo()
    with serving(echo) as served:
        transport = HttpTransport(f"{served.url}/v1/infers/abc/", auth=bearer())
        found = ask(transport, b"one", bytearray(b"two"), memoryview(b"three")[1:])
        assert (found.status, bytes(found.body)) == (200, b"onetwohree")
        assert echo.asked[0][:2] == ("POST", "/v1/infers/abc/x")
        assert echo.asked[0][2]["authorization"] == f"Bearer {CANARY}"
        assert CANARY not in repr(transport)
        transport.close()


def test_a_connection_is_kept_and_replaced_when_it_was_closed_meanwhile():
    echo = Echo()
    with serving(echo) as served:
        transport = HttpTransport(served.url)
        for _ in range(5):
            ask(transport, b"x")
        assert len(served.sockets) == 1
        for each in list(served.sockets):
            each.shutdown(socket.SHUT_RDWR)
        time.sleep(0.05)
        assert bytes(ask(transport, b"again").body) == b"again"
        transport.close()
        assert transport.open_connections == 0
        with pytest.raises(CloudError, match="is closed"):
            ask(transport, b"x")


def test_a_connection_that_dies_under_a_request_is_tried_once_more():
    echo = Echo(Answer(200, b"1"), Answer(200, fault="refuse"), Answer(200, b"2"))
    with serving(echo) as served:
        transport = HttpTransport(served.url)
        assert bytes(ask(transport).body) == b"1"
        assert bytes(ask(transport).body) == b"2"
        transport.close()


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (Answer(200, fault="refuse"), CloudError, "went away"),
        (Answer(200, b"123456", fault="truncate"), WireError, "ends after 3 of 6"),
        (Answer(200, bytes(2000)), WireError, "at most 1000 bytes, got 2000"),
        (Answer(302, b"", {"location": f"https://evil.example/?{CANARY}"}), RefusedError, "redirect"),
        (Answer(200, b"", {"x": "y" * 70000}), WireError, "no HTTP"),
    ],
)
def test_what_goes_wrong_is_one_of_our_errors(answer, kind, said):
    with serving(Echo(answer)) as served:
        transport = HttpTransport(served.url, auth=bearer())
        with pytest.raises(kind, match=said) as caught:
            ask(transport, b"x", most=1000)
        assert CANARY not in str(caught.value)
        assert transport.open_connections == 0
        transport.close()


def test_a_hung_server_is_left_at_the_deadline():
    with serving(Echo(Answer(200, fault="hang"))) as served:
        transport = HttpTransport(served.url)
        started = time.monotonic()
        with pytest.raises(DeadlineError, match=r"within 0\.2 s"):
            ask(transport, b"x", timeout=0.2)
        assert time.monotonic() - started < 0.4
        transport.close()


class Raw:
    """A listener that sends what it is told, byte by byte where told so."""

    def __init__(self, text, pause=0.0):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.text, self.pause = text, pause
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        connection, _ = self.listener.accept()
        with connection:
            read = b""
            while not read.endswith(b"x"):
                read += connection.recv(65536)
            try:
                for at in range(0, len(self.text), 1 if self.pause else len(self.text) or 1):
                    connection.sendall(self.text[at : at + 1] if self.pause else self.text)
                    time.sleep(self.pause)
            except OSError:
                pass

    @property
    def url(self):
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def close(self):
        self.thread.join()
        self.listener.close()


def test_a_server_that_drips_is_left_at_the_deadline():
    raw = Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + bytes(100), pause=0.02)
    transport = HttpTransport(raw.url)
    started = time.monotonic()
    with pytest.raises(DeadlineError):
        ask(transport, b"x", timeout=0.3)
    assert time.monotonic() - started < 0.5
    transport.close()
    raw.close()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", WireError),
        (b"", CloudError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n800\r\n" + bytes(2048) + b"\r\n0\r\n\r\n", WireError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", WireError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", WireError),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(5000), WireError),
    ],
)
def test_no_answer_is_believed_beyond_its_bounds(text, kind):
    raw = Raw(text)
    transport = HttpTransport(raw.url)
    with pytest.raises(kind):
        ask(transport, b"x", most=1000)
    transport.close()
    raw.close()


def test_an_answer_that_ends_with_the_connection_is_read():
    raw = Raw(b"HTTP/1.0 200 OK\r\n\r\nhello")
    transport = HttpTransport(raw.url)
    assert bytes(ask(transport, b"x").body) == b"hello"
    transport.close()
    raw.close()


def test_nobody_listening_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    started = time.monotonic()
    with pytest.raises(CloudError, match="cannot be reached: ConnectionRefusedError"):
        ask(HttpTransport(url), b"x")
    assert time.monotonic() - started < 0.5


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com", "http://127.0.0.1.evil.example", "ftp://localhost", "https://", "localhost:80", "",
        "https://user:pw@host/", "https://host/?key=1", "https://host/#x", "https://ho st", "https://h:99999", "https://[",
    ],
)  # fmt: skip
def test_an_address_that_is_no_safe_one_is_refused(url):
    with pytest.raises(ConfigError) as caught:
        HttpTransport(url)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://localhost:8080/", "http://localhost:8080"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("http://127.0.0.5", "http://127.0.0.5"),
        ("https://Host.example/v1/infers/x/", "https://host.example/v1/infers/x"),
    ],
)
def test_addresses_that_are_taken(url, name):
    assert HttpTransport(url).name == name


def test_closing_ends_a_request_that_waits():
    with serving(Echo(Answer(200, fault="hang"))) as served:
        transport = HttpTransport(served.url)
        errors = []

        def wait():
            try:
                ask(transport, b"x", timeout=20)
            except CloudError as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        while not transport.open_connections:
            time.sleep(0.01)
        time.sleep(0.05)
        transport.close()
        thread.join(2)
        assert len(errors) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_opens_connections_of_its_own():
    echo = Echo()
    with serving(echo) as served:
        transport = HttpTransport(served.url)
        ask(transport, b"x")
        owner, since, connection = transport._idle[0]
        transport._idle[0] = (owner + 1, since, connection)  # as a child finds it
        ask(transport, b"x")
        assert transport.open_connections == 1
        assert transport._idle[0][2] is not connection
        transport.close()


# --- in this process


def app(*answers):
    from apt_model.cloud.fake import asgi

    return asgi(Echo(*answers))


def test_an_application_is_asked_as_a_socket_would_be():
    transport = InProcess(app(), auth=bearer(), prefix="/p")
    assert bytes(ask(transport, b"a", b"b").body) == b"ab"
    transport.close()
    with pytest.raises(CloudError, match="closed"):
        ask(transport, b"x")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(200, fault="refuse"), CloudError),
        (Answer(200, b"123456", fault="truncate"), WireError),
        (Answer(200, bytes(2000)), WireError),
        (Answer(200, fault="hang"), DeadlineError),
    ],
)
def test_an_applications_faults_are_the_same_errors(answer, kind):
    transport = InProcess(app(answer))
    with pytest.raises(kind):
        ask(transport, b"x", most=1000, timeout=0.2 if answer.fault == "hang" else 5)
    transport.close()
