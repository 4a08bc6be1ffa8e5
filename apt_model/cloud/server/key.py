"""Who may ask: a key that is compared in constant time and shown nowhere; without one, only this machine."""

import functools
import hmac
import ipaddress
from collections.abc import Iterable

_SCHEME = b"bearer "


class Key:
    """A secret; its repr and its text do not show it."""

    __slots__ = ("_secret",)

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    def __repr__(self) -> str:
        return "Key(...)"

    def opens(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether `Authorization: Bearer` or `X-Auth-Token` holds it; headers meant for a gateway are passed over."""
        found = False
        for name, value in headers:
            given = b""
            if name == b"authorization" and value[: len(_SCHEME)].lower() == _SCHEME:
                given = value[len(_SCHEME) :].strip()
            elif name == b"x-auth-token":
                given = value.strip()
            found |= hmac.compare_digest(given, self._secret)
        return found


@functools.lru_cache(maxsize=256)
def is_loopback(host: str | None) -> bool:
    """Whether this names the machine itself."""
    if host is None:
        return False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def host_of(header: str) -> str:
    """The host of a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]
