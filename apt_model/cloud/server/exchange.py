"""One request and its answer over ASGI: headers looked at, a body read within its bounds and its time."""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from apt_model.cloud.server.reading import Reading
from apt_model.cloud.server.refusal import Refusal
from apt_model.cloud.wire import HEADER_LENGTH, Buffer

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
DEADLINE = "X-Apt-Deadline-Ms"
_JOINED = 1 << 16  # parts below this are sent as one
_DROPPED = 1 << 20  # bytes of a refused body that are read before the answer
_HEARD_OUT = 1 << 28  # and after it
_DROP_SECONDS = 1.0
_TOO_SLOW = 408
_LARGEST_NUMBER = 16  # digits


class Gone(Exception):  # noqa: N818 - nobody is left to tell
    """The client has closed its connection."""


class Exchange:
    """A request, and the means to answer it once.

    Args:
        scope, receive, send: as ASGI has them.
        is_last: asked at the answer: whether the connection ends with it.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, is_last: Callable[[], bool]) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.raw_headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self.raw_headers}
        client = scope.get("client")
        self.client: str | None = client[0] if client else None
        self.status = 0
        self.sent = 0
        self._receive, self._send, self._is_last = receive, send, is_last
        self._whole = False  # the body has been read

    def number(self, header: str) -> int | None:
        """A header that is a whole number, or None without it. `Refusal` where it is something else."""
        text = self.headers.get(header.lower())
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) <= _LARGEST_NUMBER):
            raise Refusal(400, f"expected {header} to be a whole number")
        return int(text)

    def length(self, most: int) -> int:
        """The body's length. `Refusal` where it is not said, or above `most`."""
        length = self.number("Content-Length")
        if length is None or "transfer-encoding" in self.headers:
            raise Refusal(411, "expected a Content-Length")
        if length > most:
            raise Refusal(413, f"expected a body of at most {most} bytes, got {length}")
        if self.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "expected a body without Content-Encoding")
        return length

    def json_length(self) -> int | None:
        """Of `Inference-Header-Content-Length`."""
        return self.number(HEADER_LENGTH)

    async def pieces(self, reading: Reading, take: Callable[[bytes], Awaitable[None] | None], length: int) -> None:
        """Hand every piece of the body to `take`.

        Raises:
            Refusal: it came too slowly, or is longer or shorter than it said.
            Gone: the client left.
        """
        got = 0
        try:
            while not self._whole:
                message = await self._receive()
                if message["type"] != "http.request":
                    raise Gone
                piece = message.get("body", b"")
                got += len(piece)
                if got > length:
                    break
                reading.last = time.monotonic()
                if piece and (waiting := take(piece)) is not None:
                    await waiting
                self._whole = not message.get("more_body", False)
        except asyncio.CancelledError:
            if reading.end():
                raise Refusal(408, str(reading.cut_by)) from None
            raise
        finally:
            reading.end()
        if got != length:
            raise Refusal(400, f"expected a body of {length} bytes, as Content-Length says, got {got}")

    async def respond(
        self, status: int, parts: Sequence[Buffer] = (), kind: bytes = b"application/json",
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:  # fmt: skip
        """Send the answer. A client that has not sent its whole body is heard out for a moment, then cut off."""
        total = sum(memoryview(part).nbytes for part in parts)
        self.status, self.sent = status, total
        coming = 0 if self._whole or self.method in ("GET", "HEAD", "DELETE") else self._coming()
        if coming and coming <= _DROPPED and status != _TOO_SLOW:
            await self._drop()  # and the connection stays
        named = [(b"content-length", str(total).encode()), *headers]
        if total:
            named.append((b"content-type", kind))
        cut = coming > 0 and not self._whole
        if cut or self._is_last():
            named.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": status, "headers": named})
        if total <= _JOINED:
            parts = [b"".join(parts)]
        for number, part in enumerate(parts, start=1):
            more = cut or number < len(parts)
            await self._send({"type": "http.response.body", "body": part, "more_body": more})
        if cut:
            # Closing on what a client is still sending resets the connection, often before it has read the answer.
            if coming <= _HEARD_OUT and status != _TOO_SLOW:
                await self._drop()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def respond_json(self, value: Any, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Send an object."""
        await self.respond(status, [json.dumps(value, separators=(",", ":")).encode()], headers=headers)

    async def refuse(self, refusal: Refusal) -> None:
        """Send a no."""
        await self.respond_json({"error": refusal.text}, refusal.status, refusal.headers)

    def _coming(self) -> int:
        """Bytes of a body that the client is sending anyway; beyond all bounds where nobody knows."""
        length = self.headers.get("content-length", "0")
        known = length.isascii() and length.isdigit() and len(length) <= _LARGEST_NUMBER
        if not known or "expect" in self.headers or "transfer-encoding" in self.headers:
            return _HEARD_OUT + 1
        return int(length)

    async def _drop(self) -> None:
        """Read and drop the body, for a moment."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._drop_all(), _DROP_SECONDS)

    async def _drop_all(self) -> None:
        while not self._whole:
            message = await self._receive()
            if message["type"] != "http.request":
                return
            self._whole = not message.get("more_body", False)
