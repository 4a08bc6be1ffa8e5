"""An endpoint's address: https to anywhere, http to this machine alone, and nothing secret in it."""

import ipaddress
from urllib.parse import urlsplit

from apt_model.core.errors import ConfigError


def parsed(url: str) -> tuple[str, int, bool, str]:
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


def shown(is_tls: bool, host: str, port: int) -> str:
    """The same address, for messages."""
    name = f"[{host}]" if ":" in host else host
    usual = port == (443 if is_tls else 80)
    return f"http{'s' if is_tls else ''}://{name}{'' if usual else f':{port}'}"
