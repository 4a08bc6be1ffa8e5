"""What the server bounds, and whom it serves."""

import dataclasses
import re
from dataclasses import dataclass

from apt_model.cloud.server.key import Key, host_of, is_loopback
from apt_model.cloud.wire import Limits
from apt_model.core.errors import ConfigError
from apt_model.core.options import require

MIB = 1 << 20
_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Every bound of the server. What is beyond is refused before memory is taken for it."""

    key: Key | None = None
    """None: only clients on this machine are served."""
    open_to_all: bool = False
    """Without a key, serve others too."""
    max_body: int = 64 * MIB
    """Bytes of a request, and of an answer."""
    max_json: int = 4 * MIB
    """Bytes of a request without binary tensors, whose numbers take many times their text once they are parsed."""
    max_inflight: int = 8
    """Forwards that wait or run at once."""
    max_reading: int = 32
    """Bodies that arrive at once; of these the one that has been silent longest makes room."""
    body_seconds: float = 10.0
    """For a body to arrive, and a second more for every `pace` bytes."""
    pace: int = MIB
    silent_seconds: float = 5.0
    """Between two pieces of a body."""
    max_cached: int = 32 * MIB
    """Bytes of requests and answers kept, so that a repeated one is not computed again."""
    allow_upload: bool = False
    max_store: int = 1 << 30
    """Bytes of uploaded weights on disk."""
    workers: int = 2
    """Threads that compute."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                require(value > 0 or field.name == "max_cached", f"serve.{field.name}", "above 0", value)

    @property
    def limits(self) -> Limits:
        """Of a message; its JSON describes at most 16 tensors and needs little."""
        return Limits(body_bytes=self.max_body, json_bytes=64 << 10)

    def serves(self, client: str | None, host: str) -> bool:
        """Without a key: whether client and the name it calls us by are this machine's (a web page may rebind one)."""
        return self.open_to_all or (is_loopback(client) and is_loopback(host_of(host)))


def check_public(host: str, config: ServerConfig) -> None:
    """Raise `ConfigError` where others could reach a server that asks for no key."""
    if config.key is None and not config.open_to_all and not is_loopback(host):
        raise ConfigError(
            f"--host {host} is reached by others, and there is no key",
            remedy="export SERVE_KEY=... and --token-env SERVE_KEY; or --insecure behind a gateway that asks for one",
        )


def bytes_of(text: str, option: str) -> int:
    """A size such as '64MiB', '12MB' or '1048576'."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ConfigError(f"{option}: expected a size such as 64MiB or 12MB, got {text!r}")
    return int(float(match[1]) * unit)
