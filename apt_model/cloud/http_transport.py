"""HTTP/1.1 to one endpoint: a pool of connections that stay open, bodies that are never copied, bounded answers.

TLS is verified, plain HTTP goes to this machine alone, no redirect is followed, and the time given is that of the whole
exchange, however slowly the other side speaks.
"""

import collections
import http.client
import math
import os
import re
import select
import socket
import ssl
import time
from functools import partial
from typing import NoReturn

from apt_model.cloud.address import parsed, shown
from apt_model.cloud.http_answer import FIRST, answer_from, head_of, left_until
from apt_model.cloud.http_errors import mapped, too_late, words
from apt_model.cloud.secret import Auth
from apt_model.cloud.transport import Request, Response, check_length
from apt_model.core.errors import CloudError, DeadlineError, LateError, RefusedError, WireError

_IDLE = 30.0  # seconds after which a connection is not trusted to be open any more
_KEPT = 16
_CONNECT = 2  # times as long as an answer a connection may take before it is late: two round trips with TLS, or three
_REST = 0.005  # seconds for the rest of an answer that nobody waits for any more
_PIECE = 1 << 20  # what is written to TLS at once, so that the deadline is seen between
_TOGETHER = 64  # buffers that are written at once
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_NO_NAME = re.compile(r"[:\s]")
_GONE = (ConnectionError, http.client.RemoteDisconnected)


class _SilentError(TimeoutError):
    """Nothing has come yet, of an answer to all that was asked."""


class HttpTransport:
    """One endpoint.

    Args:
        url: https, or http to this machine; its path stands before every request's.
        auth: the header with the key.
        connect_timeout: seconds for a connection, at most; the rest of a request's time is for the exchange.
        context: of TLS; None verifies against the system's authorities.

    Raises:
        ConfigError: an address that is no such one.
    """

    def __init__(
        self, url: str, *, auth: Auth | None = None, connect_timeout: float = 5.0, context: ssl.SSLContext | None = None
    ) -> None:
        self._host, self._port, self._is_tls, self._prefix = parsed(url)
        address = shown(self._is_tls, self._host, self._port)
        self.name = address + self._prefix
        self._hello = f"Host: {address.partition('://')[2]}\r\nAccept-Encoding: identity"
        self._auth = auth
        self._connect_timeout = connect_timeout
        self._context = context
        # Appending to and popping from a deque needs no lock, so that none can be held while the process forks.
        self._idle: collections.deque[tuple[int, float, http.client.HTTPConnection]] = collections.deque()
        self._busy: set[http.client.HTTPConnection] = set()
        self._closed = False

    def send(self, request: Request, *, timeout: float, late: float | None = None) -> Response:
        """As `Transport.send`. A connection that was closed while it lay idle is replaced, once, without an error."""
        if self._closed:
            raise CloudError(f"{self.name} is closed")
        end = time.monotonic() + timeout
        connection, is_used = self._taken()
        try:
            return self._exchange(connection or self._connected(end, timeout, late), request, end, late)
        except _GONE as error:
            if not is_used or self._closed:
                raise CloudError(f"{self.name} went away: {words(error)}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise mapped(error, self.name, timeout) from error
        try:
            return self._exchange(self._connected(end, timeout, late), request, end, late)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise mapped(error, self.name, timeout) from error

    def redact(self, text: str) -> str:
        """As `Transport.redact`."""
        return self._auth.redact(text) if self._auth else text

    def close(self) -> None:
        """As `Transport.close`; who waits for an answer gets an error."""
        self._closed = True
        while self._idle:
            self._idle.pop()[2].close()
        for connection in list(self._busy):
            _cut(connection)

    @property
    def open_connections(self) -> int:
        """Those that lie idle and those in use."""
        return len(self._idle) + len(self._busy)

    def __repr__(self) -> str:
        return f"HttpTransport({self.name!r})"

    def _taken(self) -> tuple[http.client.HTTPConnection | None, bool]:
        """An idle connection that is still open, the last one used first."""
        while True:
            try:
                owner, since, connection = self._idle.pop()
            except IndexError:
                return None, False
            if owner == os.getpid() and time.monotonic() - since < _IDLE and _is_quiet(connection):
                return connection, True
            connection.close()  # a forked process closes its copy; the other process's stays open

    def _connected(self, end: float, timeout: float, late: float | None) -> http.client.HTTPConnection:
        left = end - time.monotonic()
        if left <= 0:
            raise too_late(self.name, timeout)
        limit = min(left, self._connect_timeout, math.inf if late is None else _CONNECT * late)
        connection: http.client.HTTPConnection
        if self._is_tls:
            self._context = self._context or ssl.create_default_context()
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=limit, context=self._context)
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=limit)
        try:
            connection.connect()
        except TimeoutError as error:
            connection.close()
            if limit not in (left, self._connect_timeout):
                raise LateError(f"{self.name}: no connection within {limit:.3g} s yet", self._given_up) from error
            kind = DeadlineError if limit == left else CloudError
            raise kind(f"{self.name}: no connection within {limit:.3g} s") from error
        except OSError as error:
            connection.close()
            raise mapped(error, self.name, timeout) from error
        return connection

    def _exchange(
        self, connection: http.client.HTTPConnection, request: Request, end: float, late: float | None,
        *, is_sent: bool = False,
    ) -> Response:  # fmt: skip
        soon = end if late is None else min(end, time.monotonic() + late)
        self._busy.add(connection)
        keep = waits = False
        broken = None
        try:
            sock: socket.socket = connection.sock
            if not is_sent:
                broken = self._write(sock, request, soon)
            try:
                response, is_open = self._answer(sock, request, soon)
            except (OSError, http.client.HTTPException):
                if broken is not None:
                    raise broken from None
                raise
        except TimeoutError as error:
            if soon == end:
                raise
            waits = isinstance(error, _SilentError)
            rest = partial(self._rest, connection, request) if waits else self._given_up
            raise LateError(f"{self.name}: no answer within {late:.3g} s yet", rest) from None
        else:
            keep = broken is None and is_open and not self._closed
            return response
        finally:
            if not waits:
                self._let_go(connection, keep=keep)

    def _let_go(self, connection: http.client.HTTPConnection, *, keep: bool) -> None:
        self._busy.discard(connection)
        if keep and len(self._idle) < _KEPT:
            self._idle.append((os.getpid(), time.monotonic(), connection))
            if self._closed:
                self.close()
        else:
            connection.close()

    def _rest(self, connection: http.client.HTTPConnection, request: Request) -> Response:
        """The answer that was late, where it began to come in the meantime; it has a few milliseconds to end."""
        sock = connection.sock
        if _is_quiet(connection) and not (isinstance(sock, ssl.SSLSocket) and sock.pending()):
            self._let_go(connection, keep=False)
            self._given_up()
        try:
            return self._exchange(connection, request, time.monotonic() + _REST, None, is_sent=True)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise CloudError(f"{self.name} went away: {words(error)}") from error

    def _given_up(self) -> NoReturn:
        raise CloudError(f"{self.name}: given up, as its answer was late")

    def _write(self, sock: socket.socket, request: Request, end: float) -> OSError | None:
        """Send all; where the other side stops listening, it may have answered already: that error is returned."""
        parts = [memoryview(part) for part in request.parts]
        waiting = [memoryview(self._head(request)), *(part.cast("B") for part in parts if part.nbytes)]
        if self._is_tls:
            waiting = _records(waiting)
        try:
            while waiting:
                sock.settimeout(left_until(end))
                if self._is_tls:
                    sock.sendall(waiting.pop(0))
                    continue
                sent = sock.sendmsg(waiting[:_TOGETHER])
                while waiting and sent >= waiting[0].nbytes:
                    sent -= waiting.pop(0).nbytes
                if sent:
                    waiting[0] = waiting[0][sent:]
        except (BrokenPipeError, ConnectionResetError) as error:
            return error
        return None

    def _head(self, request: Request) -> bytes:
        """A request's head; `ValueError` where something would begin another line of it."""
        headers = dict(request.headers)
        if request.parts or request.method in ("POST", "PUT"):
            headers["Content-Length"] = str(request.length)
        if self._auth is not None:
            name, value = self._auth.pair()
            headers[name] = value
        path = self._prefix + request.path
        lines = [f"{request.method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        if " " in path or _CONTROL.search("".join(lines)) or any(map(_NO_NAME.search, headers)):
            raise ValueError("a request's head has a character that it may not have")
        lines.insert(1, self._hello)
        return "\r\n".join([*lines, "\r\n"]).encode("latin-1")

    def _answer(self, sock: socket.socket, request: Request, end: float) -> tuple[Response, bool]:
        """What came back, and whether the connection stays open after it."""
        try:
            sock.settimeout(left_until(end))
            first = sock.recv(FIRST)
        except TimeoutError as error:
            raise _SilentError from error
        head = head_of(first) if request.method != "HEAD" else None
        if head is None:
            return self._unusual(first, sock, request, end)
        self._no_redirect(head.status)
        check_length(request, head.length, self.name)
        body = bytearray(head.length)
        view, place = memoryview(body), min(len(first) - head.size, head.length)
        view[:place] = memoryview(first)[head.size : head.size + place]
        while place < head.length:
            sock.settimeout(left_until(end))
            count = sock.recv_into(view[place:])
            if not count:
                raise WireError(f"{self.name}: the answer ends after {place} of {head.length} bytes")
            place += count
        is_whole = len(first) <= head.size + head.length  # who speaks unasked is not listened to any more
        return Response(status=head.status, headers=head.headers, body=body), is_whole and not head.will_close

    def _unusual(self, first: bytes, sock: socket.socket, request: Request, end: float) -> tuple[Response, bool]:
        answer = answer_from(first, sock, end, request.method)
        try:
            self._no_redirect(answer.status)
            body = self._read(answer, request)
            headers = {name.lower(): value for name, value in answer.headers.items()}
            return Response(status=answer.status, headers=headers, body=body), not answer.will_close
        finally:
            answer.close()

    def _no_redirect(self, status: int) -> None:
        if 300 <= status < 400:
            raise RefusedError(
                f"{self.name} answers with a redirect ({status}), which is not followed: a key goes to the host it "
                "was given for alone",
                remedy="give the address that it leads to, if it is one to trust",
            )

    def _read(self, answer: http.client.HTTPResponse, request: Request) -> bytearray:
        length = answer.length
        if length is None:  # in chunks, or until the other side closes
            body = bytearray()
            while piece := answer.read(min(_PIECE, request.most + 1 - len(body))):
                body += piece
                check_length(request, len(body), self.name)
            return body
        check_length(request, length, self.name)
        body = bytearray(length)
        view, place = memoryview(body), 0
        while place < length and (count := answer.readinto(view[place:])):
            place += count
        if place < length:
            raise WireError(f"{self.name}: the answer ends after {place} of {length} bytes")
        return body


def _records(pieces: list[memoryview]) -> list[memoryview]:
    """The same bytes as TLS takes them: what is short goes together, what is long in pieces."""
    if sum(piece.nbytes for piece in pieces) <= FIRST:
        return [memoryview(b"".join(pieces))]
    return [piece[start : start + _PIECE] for piece in pieces for start in range(0, piece.nbytes, _PIECE)]


def _is_quiet(connection: http.client.HTTPConnection) -> bool:
    """Whether an idle connection is open: one that has something to read was closed, or speaks unasked."""
    try:
        return not select.select([connection.sock], [], [], 0)[0]
    except (OSError, ValueError):
        return False


def _cut(connection: http.client.HTTPConnection) -> None:
    sock = connection.sock
    try:
        if sock is not None:
            sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
