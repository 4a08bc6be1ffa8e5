"""One request and its answer over ASGI: headers looked at, a body read within its bounds and its time."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from apt_model.cloud.server.heads import Headers
from apt_model.cloud.server.reading import Reading
from apt_model.cloud.server.refusal import Refusal
from apt_model.cloud.wire import Buffer

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
BODY_INTO = "apt.body_into"
"""An extension of ASGI that our connections have: called with memory of the body's length and with what is to be called
when some of it came, it has the body read there, and returns what says how much that is (`place`). The next message
about the body comes when it is whole, and has no bytes."""
_JOINED = 1 << 16  # parts below this are sent as one
_DROPPED = 1 << 20  # bytes of a refused body that are read before the answer
_HEARD_OUT = 1 << 28  # and after it
_DROP_SECONDS = 1.0
_TOO_SLOW = 408


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
        self.headers = Headers(scope["headers"])
        client = scope.get("client")
        self.client: str | None = client[0] if client else None
        self.status = 0
        self.sent = 0
        self._receive, self._send, self._is_last = receive, send, is_last
        self._into = scope.get("extensions", {}).get(BODY_INTO)
        self._whole = False  # the body has been read

    async def read_into(self, reading: Reading, buffer: memoryview, ahead: Callable[[int], None]) -> None:
        """Read the body into memory of its length.

        Args:
            reading: of the body.
            buffer: for it.
            ahead: told how many bytes came first, where more follow: something may be done before they are there.

        Raises:
            Refusal, Gone: as `pieces`.
        """
        place, length = 0, len(buffer)
        filler = self._into(buffer, reading.heard) if self._into is not None and length > _JOINED else None
        if filler is not None:
            ahead(filler.place)

        def take(piece: bytes) -> None:
            nonlocal place
            buffer[place : place + len(piece)] = piece
            place += len(piece)

        await self.pieces(reading, take, length, None if filler is None else lambda: filler.place)

    async def pieces(
        self, reading: Reading, take: Callable[[bytes], Awaitable[None] | None], length: int,
        filled: Callable[[], int] | None = None,
    ) -> None:  # fmt: skip
        """Hand every piece of the body to `take`; where it goes elsewhere, `filled` says how many bytes are there.

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
                reading.heard()
                got = got if filled is None else filled()
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
        coming: int | None = 0
        if not self._whole and self.method not in ("GET", "HEAD", "DELETE"):
            coming = self.headers.coming()
        if coming is None:
            coming = _HEARD_OUT + 1
        if coming and coming <= _DROPPED and status != _TOO_SLOW:
            await self._drop()  # and the connection stays
        named = [(b"content-length", b"%d" % total), *headers]
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
