"""An answer that is a no: a status and a text."""

from apt_model.core.errors import AptError, CapacityError, StorageError

BUSY_SECONDS = 1


class Refusal(Exception):  # noqa: N818 - it is an answer
    """What the client is told instead of a result.

    Args:
        status: of HTTP.
        text: what was expected and what came; holds nothing secret.
        retry_after: seconds until asking again makes sense; None where it does not.
        allow: the methods that the path takes, with 405.
    """

    def __init__(self, status: int, text: str, *, retry_after: int | None = None, allow: str | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.retry_after, self.allow = status, text, retry_after, allow

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Those that go with it."""
        found = []
        if self.retry_after is not None:
            found.append((b"retry-after", str(self.retry_after).encode()))
        if self.allow is not None:
            found.append((b"allow", self.allow.encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        return found


def refusal_of(error: AptError) -> Refusal:
    """What one of our own errors is to a client: its mistake, unless this machine ran out of something."""
    text = " ".join(part for part in (error.message, error.remedy) if part)[:600]
    if isinstance(error, CapacityError | StorageError):
        return Refusal(503, text, retry_after=BUSY_SECONDS)
    return Refusal(400, text)


def busy(text: str) -> Refusal:
    """Too much at once."""
    return Refusal(429, text, retry_after=BUSY_SECONDS)
