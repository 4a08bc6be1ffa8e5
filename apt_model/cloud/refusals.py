"""What an answer that is not one of success says: whether to ask again, after how long, and in which words."""

import json
import math
from collections.abc import Mapping
from typing import Any

from apt_model.cloud.transport import Response, Transport
from apt_model.core.errors import CloudError, RefusedError, WireError

BUSY = (204, 408, 425, 429, 503)
"""Answers of a server that is alive and may do it later; RunPod's workers say 204 while they load."""
NEVER = 501
"""Not implemented: the one of the server's errors that is its last word."""
_LONGEST_WAIT = 120.0  # of what a server may ask for
_REMEDIES = {
    401: "the endpoint does not take the key: see that it is the one of this endpoint, and has not expired",
    403: "the key may not use this endpoint",
    413: "the server's or the gateway's body limit is smaller than it says: raise it (--max-body)",
}


def refusal_of(transport: Transport, response: Response) -> CloudError:
    """The error for an answer that is not one of success."""
    said = transport.redact(_said(response))
    name, status = transport.name, response.status
    words = f"{name} answers {status}{f': {said[:300]}' if said else ''}"
    if status in BUSY or (status >= 500 and status != NEVER):
        return CloudError(words)
    return RefusedError(words, remedy=_REMEDIES.get(status))


def _said(response: Response) -> str:
    """The server's words, on one line, without anything a terminal obeys."""
    try:
        found: Any = json.loads(bytes(response.body[:65536]))
        # FastAPI's servers refuse with "detail" what is no request at all.
        text = found.get("error", found.get("detail", "")) if isinstance(found, Mapping) else ""
    except (ValueError, RecursionError):
        text = bytes(response.body[:1000]).decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def named_wait(response: Response) -> float | None:
    """Seconds that the server asks for; None where it names none, or none that make sense."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(response.headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 <= seconds < math.inf:
            # What is too long to wait for ends it, by the caller's deadline.
            return seconds if seconds <= _LONGEST_WAIT else math.inf
    return None


def parsed(response: Response, who: str) -> Mapping[str, Any]:
    """An answer's JSON object; `WireError` where it is none."""
    try:
        found = json.loads(bytes(response.body))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, Mapping):
        raise WireError(f"{who}: expected a JSON object, got something else")
    return found
