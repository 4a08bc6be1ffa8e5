"""The head of an HTTP/1.1 answer, read by hand where it is of the usual form; `http.client` reads all others.

Of the usual form is one that came whole, says how long its body is, once, and has nothing that two readers could
understand differently. What came is handed on, so that whoever reads it next begins at its first byte.
"""

import functools
import http.client
import io
import re
import socket
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

FIRST = 1 << 16  # bytes that are read at once with a head
_MOST_HEAD = 1 << 14
_MOST_LINES = 100
_LINE = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
_BODILESS = (204, 304)


class Head(NamedTuple):
    """A head of the usual form, and the length of it in bytes."""

    status: int
    headers: Mapping[str, str]
    """By their names in lower case."""
    length: int
    """Of the body."""
    size: int
    will_close: bool


def head_of(first: bytes) -> Head | None:
    """The head that an answer begins with; None where it is not of the usual form."""
    end = first.find(b"\r\n\r\n", 0, _MOST_HEAD)
    return None if end < 0 else _read(first[:end])


@functools.lru_cache(maxsize=32)  # a server's answers to one layer differ in their date alone
def _read(text: bytes) -> Head | None:
    lines = text.split(b"\r\n")
    status = _LINE.fullmatch(lines[0])
    if status is None or len(lines) > _MOST_LINES:
        return None
    headers: dict[str, str] = {}
    for line in lines[1:]:
        found = _HEADER.fullmatch(line)
        if found is None:
            return None
        name = found[1].decode("ascii").lower()
        if name in headers:
            return None
        headers[name] = found[2].decode("latin-1").rstrip(" \t")
    code, length = int(status[1]), headers.get("content-length", "")
    told = length.isascii() and length.isdigit() and len(length) <= 18
    if not told or code in _BODILESS or "transfer-encoding" in headers:
        return None
    return Head(
        code, MappingProxyType(headers), int(length), len(text) + 4, "close" in headers.get("connection", "").lower()
    )


def answer_from(first: bytes, sock: socket.socket, end: float, method: str) -> http.client.HTTPResponse:
    """What `http.client` makes of an answer that began with `first` and is read until a moment."""
    answer = http.client.HTTPResponse(_Until(first, sock, end), method=method)  # type: ignore[arg-type]
    try:
        answer.begin()
    except BaseException:
        answer.close()
        raise
    return answer


def left_until(end: float) -> float:
    """Seconds until a moment; `TimeoutError` when it has passed."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Timed(io.RawIOBase):
    """What an answer is read from: what came of it, then a socket whose every wait ends at one moment."""

    def __init__(self, first: bytes, sock: socket.socket, end: float) -> None:
        self._first, self._sock, self._end = first, sock, end
        self._raw = sock.makefile("rb", buffering=0)  # keeps the socket open until the answer is read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._first:
            piece = self._first[: len(buffer)]
            buffer[: len(piece)] = piece
            self._first = self._first[len(piece) :]
            return len(piece)
        self._sock.settimeout(left_until(self._end))
        return self._raw.readinto(buffer) or 0

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Until:
    """Stands for a socket where `HTTPResponse` makes a file of it."""

    def __init__(self, first: bytes, sock: socket.socket, end: float) -> None:
        self._first, self._sock, self._end = first, sock, end

    def makefile(self, _: str) -> io.BufferedReader:
        return io.BufferedReader(_Timed(self._first, self._sock, self._end), FIRST)
