"""A request's path and headers, looked at before anything of its body is."""

from collections.abc import Sequence

from apt_model.cloud.server.config import ServerConfig
from apt_model.cloud.server.refusal import Refusal
from apt_model.cloud.wire import HEADER_LENGTH

DEADLINE = b"x-apt-deadline-ms"
JSON_LENGTH = HEADER_LENGTH.lower().encode()
_LENGTH = b"content-length"
_LARGEST_NUMBER = 16  # digits


class Headers:
    """Headers by their names in lower case; of several alike the last one counts."""

    def __init__(self, raw: Sequence[tuple[bytes, bytes]]) -> None:
        self.raw = raw
        self._values = dict(raw)

    def get(self, name: bytes, default: bytes = b"") -> bytes:
        """One of them."""
        return self._values.get(name, default)

    def number(self, name: bytes) -> int | None:
        """One that is a whole number, or None without it. `Refusal` where it is something else."""
        text = self._values.get(name)
        if text is None:
            return None
        if not text.isdigit() or len(text) > _LARGEST_NUMBER:
            raise Refusal(400, f"expected {name.decode().title()} to be a whole number")
        return int(text)

    def length(self, most: int) -> int:
        """The body's length. `Refusal` where it is not said, or above `most`."""
        length = self.number(_LENGTH)
        if length is None or b"transfer-encoding" in self._values:
            raise Refusal(411, "expected a Content-Length")
        if length > most:
            raise Refusal(413, f"expected a body of at most {most} bytes, got {length}")
        if self.get(b"content-encoding", b"identity") != b"identity":
            raise Refusal(415, "expected a body without Content-Encoding")
        return length

    def coming(self) -> int | None:
        """Bytes of a body that the client is sending anyway; None where nobody knows."""
        length = self.get(_LENGTH, b"0")
        known = length.isdigit() and len(length) <= _LARGEST_NUMBER
        if not known or b"expect" in self._values or b"transfer-encoding" in self._values:
            return None
        return int(length)


def asked(parts: Sequence[str]) -> tuple[str, str | None, str]:
    """Model, version and call of a path's NAME[/versions/VERSION][/ready|/infer]; `Refusal` where it is another."""
    name, rest, version = parts[0], parts[1:], None
    if len(rest) > 1 and rest[0] == "versions":
        version, rest = rest[1], rest[2:]
    call = rest[0] if len(rest) == 1 else ""
    if len(rest) > 1 or call not in ("", "ready", "infer"):
        raise Refusal(404, "there is no such path")
    return name, version, call


def admit(config: ServerConfig, headers: Headers, client: str | None) -> None:
    """Raise `Refusal` where this client is not served."""
    if config.key is not None:
        if not config.key.opens(headers.raw):
            raise Refusal(401, "expected the key in Authorization: Bearer or X-Auth-Token")
    elif not config.serves(client, headers.get(b"host", b"localhost").decode("latin-1")):
        raise Refusal(403, "without a key only this machine is served, under its own name")
