"""A key that is used and never shown: not in a repr, a log, an error's text, a copy or a pickle."""

from collections.abc import Callable
from typing import NoReturn

from typing_extensions import Self

from apt_model.core.errors import ConfigError

HIDDEN = "***"


class Secret:
    """A key, or a function that returns it, for those that expire. `reveal` is the only way to it."""

    __slots__ = ("_hold",)

    def __init__(self, value: str | Callable[[], str]) -> None:
        held = value.strip() if isinstance(value, str) else None
        if held is not None and not _is_printable(held):
            raise ConfigError("expected a key of printable ASCII characters, got one with others, or an empty one")
        self._hold: Callable[[], str] = (lambda: held) if held is not None else value  # type: ignore[assignment]

    def reveal(self) -> str:
        """The key itself, for the header it travels in."""
        value = self._hold()
        if not isinstance(value, str) or not _is_printable(value):
            raise ConfigError("expected the function to return a key of printable ASCII characters")
        return value

    def redact(self, text: str) -> str:
        """`text` without the key."""
        try:
            value = self.reveal()
        except Exception:  # noqa: BLE001 - a user's function: its own error is told where the key is used
            return text
        return text.replace(value, HIDDEN)

    def __repr__(self) -> str:
        return f"Secret({HIDDEN})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise ConfigError("a key is not pickled", remedy="save the state_dict, and connect again after loading")


class Auth:
    """The header that a provider wants the key in.

    Args:
        header: its name.
        secret: the key.
        prefix: what stands before the key, such as "Bearer ".
    """

    __slots__ = ("_secret", "header", "prefix")

    def __init__(self, header: str, secret: Secret, prefix: str = "") -> None:
        self.header = header
        self.prefix = prefix
        self._secret = secret

    def pair(self) -> tuple[str, str]:
        """Name and value, at the moment they are sent."""
        return self.header, self.prefix + self._secret.reveal()

    def redact(self, text: str) -> str:
        """`text` without the key."""
        return self._secret.redact(text)

    def __repr__(self) -> str:
        return f"Auth({self.header}: {self.prefix}{HIDDEN})"

    def __deepcopy__(self, memo: object) -> Self:
        return self


def _is_printable(value: str) -> bool:
    return bool(value) and all("!" <= letter <= "~" for letter in value)
