"""Answers that were given, so that a repeated request is not computed twice. A forward is pure, so they stay right.

What is computed in less time than its answer would be looked for is not kept.
"""

import asyncio
from collections import OrderedDict
from typing import NamedTuple

from apt_model.cloud.wire import Buffer

Answer = tuple[list[Buffer], int]
"""The parts of a body, and the length of its JSON."""


class _Entry(NamedTuple):
    body: memoryview
    answer: "asyncio.Future[Answer]"
    nbytes: int


class Answers:
    """Requests with their answers, oldest first, within a number of bytes.

    An id is a client's own choice and two may choose alike: an answer is given again only where the whole request is
    the same, byte for byte.
    """

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._entries: OrderedDict[tuple[str, ...], _Entry] = OrderedDict()

    def find(self, key: tuple[str, ...], body: memoryview) -> "asyncio.Future[Answer] | None":
        """The answer to the same request, which may still be computed."""
        entry = self._entries.get(key)
        return entry.answer if entry is not None and entry.body == body else None

    def begin(self, key: tuple[str, ...], body: memoryview, answer: "asyncio.Future[Answer]") -> None:
        """Remember that this is being computed."""
        if body.nbytes * 2 > self._most:
            return
        self._forget(key)
        self._entries[key] = entry = _Entry(body, answer, body.nbytes)
        self._held += entry.nbytes
        answer.add_done_callback(lambda done: self._settle(key, entry, done))
        self._shrink()

    def _settle(self, key: tuple[str, ...], entry: _Entry, done: "asyncio.Future[Answer]") -> None:
        if self._entries.get(key) is not entry:
            return
        self._forget(key)
        if done.cancelled() or done.exception() is not None:
            return  # a failure is not kept
        nbytes = entry.nbytes + sum(memoryview(part).nbytes for part in done.result()[0])
        self._entries[key] = entry._replace(nbytes=nbytes)
        self._held += nbytes
        self._shrink()

    def _forget(self, key: tuple[str, ...]) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._held -= entry.nbytes

    def _shrink(self) -> None:
        while self._held > self._most:
            self._forget(next(iter(self._entries)))
