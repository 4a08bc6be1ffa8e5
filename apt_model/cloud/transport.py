"""The boundary to another machine: one method, with foreign errors mapped where they enter."""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from apt_model.cloud.secret import Auth
from apt_model.cloud.wire import Buffer
from apt_model.core.errors import CloudError, DeadlineError, LateError, WireError

OVERHEAD = 1 << 16
"""Bytes an answer may have beside its tensors."""


_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Request(NamedTuple):
    """What is asked; the key is no part of it, the transport adds it."""

    method: str
    path: str
    """Below the endpoint's own path, beginning with a slash."""
    headers: Mapping[str, str] = _NO_HEADERS
    parts: Sequence[Buffer] = ()
    """The body, in pieces that are sent one after another."""
    most: int = OVERHEAD
    """Bytes that the answer's body may have."""

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return sum([memoryview(part).nbytes for part in self.parts])


@dataclass(frozen=True, kw_only=True)
class Response:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    """By their names in lower case."""
    body: bytearray = field(repr=False)


class Transport(Protocol):
    """Sends one request and returns its answer, whatever its status is."""

    name: str
    """Of the endpoint, for messages: its address, without a key."""

    def send(self, request: Request, *, timeout: float, late: float | None = None) -> Response:
        """Send, and read the answer, in `timeout` seconds together.

        Args:
            request: what is asked.
            timeout: seconds.
            late: seconds after which a caller has something better to do than to wait; None waits to the end. A
                transport whose answers come when they come need not heed it.

        Raises:
            LateError: there is no answer after `late` seconds.
            DeadlineError: the time is over.
            CloudError: the endpoint was not reached, or went away.
            RefusedError: it cannot be trusted, or points elsewhere.
            WireError: what it answered is no HTTP, or more than may be.
        """

    def redact(self, text: str) -> str:
        """`text` without the key."""

    def close(self) -> None:
        """Let go of connections and threads; a request afterwards is an error."""


def check_length(request: Request, length: int, name: str) -> None:
    """`WireError` where an answer is longer than `request` allows."""
    if length > request.most:
        raise WireError(f"{name}: expected an answer of at most {request.most} bytes, got {length}")


Application = Callable[..., Awaitable[None]]


class InProcess:
    """An ASGI application in this process, on a thread of its own: the same requests without a network.

    Args:
        application: ASGI 3.
        auth: the header with the key.
        name: for messages.
        prefix: of every request's path, without a slash at its end.
    """

    def __init__(
        self, application: Application, *, auth: Auth | None = None, name: str = "in-process", prefix: str = ""
    ) -> None:
        self.name = name
        self._prefix = prefix
        self._application = application
        self._auth = auth
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def send(self, request: Request, *, timeout: float, late: float | None = None) -> Response:
        """As `Transport.send`."""
        headers = {**request.headers, **dict([self._auth.pair()] if self._auth else [])}
        loop = self._running()
        waiting = asyncio.run_coroutine_threadsafe(asyncio.wait_for(self._ask(request, headers), timeout), loop)
        if late is not None and concurrent.futures.wait([waiting], late).not_done:
            raise LateError(f"{self.name}: no answer within {late:.3g} s yet", partial(self._rest, waiting, timeout))
        return self._result(waiting, timeout)

    def _rest(self, waiting: "concurrent.futures.Future[Response]", timeout: float) -> Response:
        if waiting.cancel():
            raise CloudError(f"{self.name}: given up")
        return self._result(waiting, timeout)

    def _result(self, waiting: "concurrent.futures.Future[Response]", timeout: float) -> Response:
        try:
            return waiting.result()
        except (TimeoutError, asyncio.TimeoutError):  # two classes until Python 3.11
            raise DeadlineError(f"{self.name}: no answer within {timeout:.3g} s") from None
        except CloudError:
            raise
        except Exception as error:
            raise CloudError(f"{self.name}: the application failed: {type(error).__name__}") from error

    def redact(self, text: str) -> str:
        """As `Transport.redact`."""
        return self._auth.redact(text) if self._auth else text

    def close(self) -> None:
        """As `Transport.close`."""
        with self._lock:
            loop, thread, self._loop, self._thread, self._closed = self._loop, self._thread, None, None, True
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise CloudError(f"{self.name} is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_run, args=(self._loop,), name=f"apt-cloud {self.name}", daemon=True
                )
                self._thread.start()
            return self._loop

    async def _ask(self, request: Request, headers: Mapping[str, str]) -> Response:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": request.method,
            "scheme": "http", "path": self._prefix + request.path,
            "raw_path": (self._prefix + request.path).encode(), "query_string": b"",
            "root_path": "", "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 0),
            "headers": [
                (b"content-length", str(request.length).encode()),
                *((name.lower().encode(), value.encode()) for name, value in headers.items()),
            ],
        }  # fmt: skip
        pieces = _pieces(request.parts)
        started: dict[str, Any] = {}
        body = bytearray()

        async def receive() -> dict[str, Any]:
            return next(pieces, {"type": "http.disconnect"})

        async def send(event: dict[str, Any]) -> None:
            if event["type"] == "http.response.start":
                started.update(event)
            else:
                body.extend(event.get("body", b""))
                check_length(request, len(body), self.name)

        await self._application(scope, receive, send)
        if not started:
            raise CloudError(f"{self.name}: the application went away without an answer")
        found = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in started.get("headers", ())}
        if found.get("content-length", str(len(body))) != str(len(body)):
            raise WireError(f"{self.name}: the answer ends after {len(body)} of {found['content-length']} bytes")
        return Response(status=started["status"], headers=found, body=body)


def _pieces(parts: Sequence[Buffer]) -> Iterator[dict[str, Any]]:
    for number, part in enumerate(parts or (b"",)):
        yield {"type": "http.request", "body": bytes(part), "more_body": number + 1 < len(parts)}


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        with contextlib.suppress(Exception):
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()
