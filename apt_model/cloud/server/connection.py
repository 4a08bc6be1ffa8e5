"""A connection of uvicorn's within bounds, on which what is short takes the short way.

uvicorn bounds neither a request's head nor the number of connections, and hands a request over in some ten steps, which
take longer than a short forward's product. A forward that comes whole, in one piece, is answered in one step here
(`Application.at_once`); all others go uvicorn's way, and so does one that is refused.
"""

import asyncio
import contextlib
import importlib
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from apt_model.cloud.server.answers import Answer
from apt_model.cloud.server.app import Application
from apt_model.cloud.server.exchange import BODY_INTO
from apt_model.cloud.server.heads import JSON_LENGTH, Headers
from apt_model.core.errors import MissingExtraError

MAX_CONNECTIONS = 512
HEADER_BYTES = 32 << 10
HEADER_SECONDS = 10.0
_SHORT = 1 << 16
_SHORT_DIGITS = 5  # of a body's length, which is below 100 kB then


def protocol(app: Application) -> type[asyncio.Protocol]:
    """HTTP by uvicorn over httptools, which itself bounds neither a request's head nor the number of connections."""
    base: Any = imported("uvicorn.protocols.http.httptools_impl").HttpToolsProtocol

    class Bounded(base):  # type: ignore[misc]
        parser: Any
        heard = 0.0
        """When a request's head began, or 0 between requests and within a body."""
        head = 0
        short: bytes | None = None
        """What came of the body of what may be a short forward."""
        named: Headers
        """The headers of that."""

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(_Together(transport, self.promised))
            # asyncio sets it on connections of its own listening sockets alone; without it an answer in two writes
            # waits for the client's acknowledgement, 40 ms.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.heard = time.monotonic()
            if len(self.connections) > MAX_CONNECTIONS:
                self.close_with(b"429 Too Many Requests", b"retry-after: 1\r\n")

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            # What leads back to here is taken away: thousands would wait for the collector of cycles.
            self.transport.forget()
            if self.scope is not None:
                self.scope.pop("extensions", None)

        def data_received(self, data: bytes) -> None:
            if self.heard:
                self.head += len(data)
            super().data_received(data)
            if self.short is not None:  # it has not come whole
                self.go_on()
            if self.heard and self.head > HEADER_BYTES and not self.transport.is_closing():
                self.close_with(b"431 Request Header Fields Too Large")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope["extensions"] = {BODY_INTO: self.body_into}
            self.heard = self.heard or time.monotonic()

        def on_headers_complete(self) -> None:
            self.heard, self.head = 0.0, 0
            if self.is_short():
                self.short = b""
            else:
                super().on_headers_complete()

        def is_short(self) -> bool:
            """Whether it may be a short forward, with nothing before it on this connection."""
            if (self.cycle is not None and not self.cycle.response_complete) or self.flow.write_paused:
                return False
            if self.parser.get_method() != b"POST" or not self.url.endswith(b"/infer") or b"?" in self.url:
                return False
            self.named = Headers(self.headers)
            length = self.named.get(b"content-length")
            if not length.isdigit() or len(length) > _SHORT_DIGITS or self.expect_100_continue:
                return False
            return self.parser.get_http_version() == "1.1" and bool(self.parser.should_keep_alive())

        def on_body(self, body: bytes) -> None:
            if self.short is not None:
                self.short += body
                return
            if not self.cycle.body:
                self.cycle.body = b""  # what is added to it stays as it is, and so do bytes that are made of that
            super().on_body(body)

        def on_message_complete(self) -> None:
            if self.short is not None:
                body, self.short = self.short, None
                client = self.client[0] if self.client else None
                if app.at_once(self.url.decode("latin-1"), self.named, client, body, self.send_at_once):
                    self.on_response_complete()
                    return
                self.short = body
                self.go_on()
            super().on_message_complete()

        def go_on(self) -> None:
            """What was looked at as a short forward goes the usual way."""
            body, self.short = self.short, None
            super().on_headers_complete()
            if body:
                self.on_body(body)

        def body_into(self, buffer: memoryview, on_bytes: Callable[[], None]) -> "_Filler":
            """Read the body that is coming into memory of its length, without a copy between and a step a piece."""
            come = memoryview(self.cycle.body)
            buffer[: len(come)] = come
            filler = _Filler(self, buffer, len(come), on_bytes)
            self.cycle.body = b""
            if self.cycle.more_body:
                self.transport.set_protocol(filler)
                if not self.cycle.disconnected:
                    self.cycle.message_event.clear()
            return filler

        def body_filled(self) -> None:
            """The body is there; what follows is for a parser that has not waited for it."""
            self.transport.set_protocol(self)
            self.parser = type(self.parser)(self)
            with contextlib.suppress(AttributeError):  # as uvicorn does it
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.on_message_complete()

        def send_at_once(self, answer: Answer) -> None:
            """Write it at once, as uvicorn would."""
            parts, length = answer
            total = sum([len(part) for part in parts])
            head = [b"HTTP/1.1 200 OK\r\n"]
            for name, value in self.server_state.default_headers:
                head += [name, b": ", value, b"\r\n"]
            head.append(
                b"content-length: %d\r\n%s: %d\r\ncontent-type: application/octet-stream\r\n\r\n"
                % (total, JSON_LENGTH, length)
            )
            self.transport.write(b"".join([*head, *parts]))

        def on_response_complete(self) -> None:
            self.transport.flush()
            super().on_response_complete()

        def promised(self) -> int:
            """Bytes that an answer's head has told of, and that were not written yet."""
            return 0 if self.cycle is None else int(self.cycle.expected_content_length)

        def close_with(self, status: bytes, header: bytes = b"") -> None:
            self.transport.write(
                b"HTTP/1.1 " + status + b"\r\n" + header + b"connection: close\r\ncontent-length: 0\r\n\r\n"
            )
            self.transport.close()

    return Bounded


class _Filler(asyncio.BufferedProtocol):
    """A connection while a body is read: the socket writes where it is wanted."""

    def __init__(self, connection: Any, buffer: memoryview, place: int, on_bytes: Callable[[], None]) -> None:
        self._connection, self._buffer, self.place, self._on_bytes = connection, buffer, place, on_bytes

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - all that is missing
        """The memory of what has not come."""
        return self._buffer[self.place :]

    def buffer_updated(self, nbytes: int) -> None:
        """So much more is there."""
        self.place += nbytes
        self._on_bytes()
        if self.place == len(self._buffer):
            self._connection.body_filled()

    def eof_received(self) -> None:
        """As the connection's, like those that follow."""
        self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """See above."""
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        """See above."""
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """See above."""
        self._connection.resume_writing()


class _Together:
    """A connection on which what is short waits for what is known to follow, so that an answer is one system call.

    Its client wakes once, then.
    """

    def __init__(self, transport: asyncio.Transport, promised: Callable[[], int]) -> None:
        self._transport, self._promised, self._held = transport, promised, b""
        self._file = transport.get_extra_info("socket").fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: Any) -> None:
        """Send it, unless it is short and the answer goes on."""
        held, self._held = self._held, b""
        if len(held) + len(data) <= _SHORT:
            data = b"".join((held, data)) if held else data
            if self._promised() > 0:
                self._held = bytes(data)
                return
        elif held:
            data = self._sent(held, data)
        self._transport.write(data)

    def _sent(self, held: bytes, data: Any) -> Any:
        """Send both, without joining them; what is left of them."""
        sent = 0
        is_free = not self._transport.get_write_buffer_size() and not self._transport.is_closing()
        if sys.platform != "win32" and is_free:
            with contextlib.suppress(OSError):  # it is full, or gone: the transport sees to both
                sent = os.writev(self._file, (held, data))
        if sent < len(held):
            self._transport.write(held[sent:])
        return memoryview(data)[max(sent - len(held), 0) :]

    def flush(self) -> None:
        """Send what nothing followed."""
        held, self._held = self._held, b""
        if held:
            self._transport.write(held)

    def forget(self) -> None:
        """The connection is gone."""
        self._held, self._promised = b"", _nothing

    def close(self) -> None:
        """As the transport's."""
        self.flush()
        self._transport.close()


def _nothing() -> int:
    return 0


def imported(name: str) -> Any:
    """A module of uvicorn's, which is optional."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = "httptools" if (error.name or "").startswith("httptools") else "uvicorn"
        raise MissingExtraError("apt-model serve", package, "serve") from error
