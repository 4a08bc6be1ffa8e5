"""JSON heads that come again with another id: what was made of the first is kept, within a number of bytes.

A client asks for one layer again and again, and only the id changes. A head is taken for a known one where it is the
same, byte for byte, before and after an id of plain letters that stands in it once and is the message's: so that a
whole reading would give the same.
"""

import re
from typing import Generic, TypeVar

Made = TypeVar("Made")
_ID = re.compile(rb'"id":"([0-9A-Za-z.-]{1,64})"')
_PLAIN = re.compile(r"[0-9A-Za-z.-]{1,64}")
LONGEST = 2048
"""Bytes of a head that is kept."""
_MOST = 64


class Known(Generic[Made]):
    """What was made of heads, by what stands before and after their ids; forgets all when it is full."""

    def __init__(self) -> None:
        self._made: dict[tuple[bytes, bytes], Made] = {}

    def find(self, text: bytes) -> tuple[Made | None, str | None]:
        """What was made of such a head, and this one's id."""
        found = _ID.search(text) if len(text) <= LONGEST else None
        if found is None:
            return None, None
        start, end = found.span(1)
        return self._made.get((text[:start], text[end:])), text[start:end].decode()

    def keep(self, text: bytes, identity: str | None, made: Made) -> bool:
        """Remember what was made of a head whose message has that id, where that can be told from the rest of it."""
        found = _ID.search(text) if len(text) <= LONGEST else None
        if found is None or b"\\" in text or found[1].decode() != identity or text.count(found[1]) != 1:
            return False
        if len(self._made) >= _MOST:
            self._made.clear()
        self._made[text[: found.start(1)], text[found.end(1) :]] = made
        return True


class Texts:
    """Heads to be sent, by what they say beside their ids; forgets all when it is full."""

    def __init__(self) -> None:
        self._made: dict[object, tuple[bytes, bytes]] = {}

    def find(self, said: object, identity: str | None) -> bytes | None:
        """The head that says this under that id."""
        parts = self._made.get(said)
        if parts is None or identity is None or not _is_plain(identity):
            return None
        return parts[0] + identity.encode() + parts[1]

    def keep(self, said: object, identity: str | None, text: bytes) -> None:
        """Remember a head."""
        if identity is None or len(text) > LONGEST or not _is_plain(identity) or text.count(identity.encode()) != 1:
            return
        if len(self._made) >= _MOST:
            self._made.clear()
        before, _, after = text.partition(identity.encode())
        self._made[said] = (before, after)


def _is_plain(identity: str) -> bool:
    return _PLAIN.fullmatch(identity) is not None
