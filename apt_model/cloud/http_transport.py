"""HTTP/1.1 to one endpoint: a pool of connections that stay open, bodies that are never copied, bounded answers.

TLS is verified, plain HTTP goes to this machine alone, no redirect is followed, and the time given is that of the whole
exchange, however slowly the other side speaks.
"""

import collections
import http.client
import io
import ipaddress
import os
import select
import socket
import ssl
import time
from typing import Any
from urllib.parse import urlsplit

from apt_model.cloud.secret import Auth
from apt_model.cloud.transport import Request, Response, check_length
from apt_model.core.errors import CloudError, ConfigError, DeadlineError, RefusedError, WireError

_IDLE = 30.0  # seconds after which a connection is not trusted to be open any more
_KEPT = 16
_PIECE = 1 << 20  # what is written to TLS at once, so that the deadline is seen between
_NAMES = "give the address that the certificate is for, or have one issued for this name"
_CERTIFICATES = {62: _NAMES, 64: _NAMES, 9: "see that this machine's clock is right", 10: "renew it, or set the clock"}
"""What to do, by OpenSSL's number: another host's name or address, not yet valid, expired."""
_GONE = (ConnectionError, http.client.RemoteDisconnected)


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
        self._host, self._port, self._is_tls, self._prefix = _parsed(url)
        self.name = _address(self._is_tls, self._host, self._port) + self._prefix
        self._auth = auth
        self._connect_timeout = connect_timeout
        self._context = context
        # Appending to and popping from a deque needs no lock, so that none can be held while the process forks.
        self._idle: collections.deque[tuple[int, float, http.client.HTTPConnection]] = collections.deque()
        self._busy: set[http.client.HTTPConnection] = set()
        self._closed = False

    def send(self, request: Request, *, timeout: float) -> Response:
        """As `Transport.send`. A connection that was closed while it lay idle is replaced, once, without an error."""
        if self._closed:
            raise CloudError(f"{self.name} is closed")
        end = time.monotonic() + timeout
        connection, is_used = self._taken()
        try:
            return self._exchange(connection or self._connected(end, timeout), request, end)
        except _GONE as error:
            if not is_used or self._closed:
                raise CloudError(f"{self.name} went away: {_words(error)}") from error
        except TimeoutError as error:
            raise DeadlineError(f"{self.name}: no answer within {timeout:.3g} s") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._mapped(error) from error
        try:
            return self._exchange(self._connected(end, timeout), request, end)
        except TimeoutError as error:
            raise DeadlineError(f"{self.name}: no answer within {timeout:.3g} s") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._mapped(error) from error

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

    def _connected(self, end: float, timeout: float) -> http.client.HTTPConnection:
        left = end - time.monotonic()
        if left <= 0:
            raise DeadlineError(f"{self.name}: no answer within {timeout:.3g} s")
        limit = min(left, self._connect_timeout)
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
            kind = DeadlineError if limit == left else CloudError
            raise kind(f"{self.name}: no connection within {limit:.3g} s") from error
        except OSError as error:
            connection.close()
            raise self._mapped(error) from error
        return connection

    def _exchange(self, connection: http.client.HTTPConnection, request: Request, end: float) -> Response:
        self._busy.add(connection)
        keep = False
        try:
            sock: socket.socket = connection.sock
            sock.settimeout(_left(end))
            broken = self._write(connection, request, end)
            connection.response_class = _answers_until(end)
            try:
                answer = connection.getresponse()
            except (OSError, http.client.HTTPException):
                if broken is not None:
                    raise broken from None
                raise
            if 300 <= answer.status < 400:
                raise RefusedError(
                    f"{self.name} answers with a redirect ({answer.status}), which is not followed: a key goes to the "
                    "host it was given for alone",
                    remedy="give the address that it leads to, if it is one to trust",
                )
            body = self._read(answer, request)
            keep = broken is None and not answer.will_close and not self._closed
            headers = {name.lower(): value for name, value in answer.headers.items()}
            return Response(status=answer.status, headers=headers, body=body)
        finally:
            self._busy.discard(connection)
            if keep and len(self._idle) < _KEPT:
                self._idle.append((os.getpid(), time.monotonic(), connection))
                if self._closed:
                    self.close()
            else:
                connection.close()

    def _write(self, connection: http.client.HTTPConnection, request: Request, end: float) -> OSError | None:
        """Send all; where the other side stops listening, it may have answered already: that error is returned."""
        connection.putrequest(request.method, self._prefix + request.path)
        if request.parts or request.method in ("POST", "PUT"):
            connection.putheader("Content-Length", str(request.length))
        for name, value in request.headers.items():
            connection.putheader(name, value)
        if self._auth is not None:
            connection.putheader(*self._auth.pair())
        try:
            connection.endheaders()
            for part in request.parts:
                view = memoryview(part).cast("B") if memoryview(part).nbytes else memoryview(b"")
                step = _PIECE if self._is_tls else max(view.nbytes, 1)
                for start in range(0, view.nbytes, step):
                    connection.sock.settimeout(_left(end))
                    connection.sock.sendall(view[start : start + step])
        except (BrokenPipeError, ConnectionResetError) as error:
            return error
        return None

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
        answer.close()
        return body

    def _mapped(self, error: Exception) -> CloudError:
        if isinstance(error, ssl.SSLCertVerificationError):
            return RefusedError(
                f"{self.name}: its certificate cannot be trusted: {error.verify_message}",
                remedy=_CERTIFICATES.get(
                    error.verify_code,
                    "see that the address is right; the certificate of a private authority goes into a file that "
                    "SSL_CERT_FILE names",
                ),
            )
        if isinstance(error, http.client.HTTPException | ValueError):
            return WireError(f"{self.name}: what it answers is no HTTP: {type(error).__name__}")
        return CloudError(f"{self.name} cannot be reached: {_words(error)}")


class _Timed(io.RawIOBase):
    """What an answer is read from: a socket whose every wait ends at one moment."""

    def __init__(self, sock: socket.socket, end: float) -> None:
        self._sock, self._end = sock, end
        self._raw = sock.makefile("rb", buffering=0)  # keeps the socket open until the answer is read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left(self._end))
        return self._raw.readinto(buffer) or 0

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Until:
    """Stands for a socket where `HTTPResponse` makes a file of it."""

    def __init__(self, sock: socket.socket, end: float) -> None:
        self._sock, self._end = sock, end

    def makefile(self, _: str) -> io.BufferedReader:
        return io.BufferedReader(_Timed(self._sock, self._end), 1 << 16)


def _answers_until(end: float) -> Any:
    """What makes an `HTTPResponse` that is read until a moment."""

    def make(sock: socket.socket, *, method: str | None = None) -> http.client.HTTPResponse:
        return http.client.HTTPResponse(_Until(sock, end), method=method)  # type: ignore[arg-type]

    return make


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


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


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _parsed(url: str) -> tuple[str, int, bool, str]:
    """Host, port, whether it is TLS, and the path without its last slash."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, parts, port = None, urlsplit(""), None
    if parts.scheme not in ("https", "http") or not host or any(ord(letter) <= 32 for letter in url):
        raise ConfigError(
            "expected an address like https://HOST/PATH, got something else", remedy="its value is hidden"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            f"{host}: expected an address without a user, a query and a fragment", remedy="the key is given by itself"
        )
    if parts.scheme == "http" and not is_here(host):
        raise ConfigError(f"http://{host}: plain HTTP goes to this machine alone", remedy=f"https://{host}")
    return host, port or (443 if parts.scheme == "https" else 80), parts.scheme == "https", parts.path.rstrip("/")


def is_here(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _address(is_tls: bool, host: str, port: int) -> str:
    shown = f"[{host}]" if ":" in host else host
    usual = port == (443 if is_tls else 80)
    return f"http{'s' if is_tls else ''}://{shown}{'' if usual else f':{port}'}"
