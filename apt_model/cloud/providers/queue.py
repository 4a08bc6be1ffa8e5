"""RunPod's queue as a transport: a request travels in a job's JSON, its body in base64, and its answer is fetched.

A job is {"input": {"method", "path", "headers", "body"}} and its output {"status", "headers", "body"}, both bodies in
base64; the worker hands the request to the server beside it. `/run` and `/status`, never `/runsync`, whose job is lost
with the connection (a result of `/run` is kept).
"""

import base64
import binascii
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from apt_model.cloud.refusals import parsed
from apt_model.cloud.transport import Request, Response, Transport
from apt_model.core.errors import CloudError, DeadlineError, WireError

_FIRST, _LONGEST = 0.02, 1.0  # seconds between two questions
_ID = re.compile(r"[A-Za-z0-9-]{1,100}")
_ENDED = ("FAILED", "CANCELLED", "TIMED_OUT")


class QueueTransport:
    """Requests as jobs.

    Args:
        transport: to https://api.runpod.ai/v2/ENDPOINT, with the key.
        sleep: waits.
    """

    def __init__(self, transport: Transport, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.name = transport.name
        self._transport = transport
        self._sleep = sleep

    def send(self, request: Request, *, timeout: float, late: float | None = None) -> Response:  # noqa: ARG002 - a job
        """As `Transport.send`; a job whose time is over is cancelled, and none is late: it waits for its turn."""
        end = time.monotonic() + timeout
        body = base64.b64encode(b"".join(request.parts)).decode()
        asked = {"method": request.method, "path": request.path, "headers": dict(request.headers), "body": body}
        text = json.dumps({"input": asked, "policy": {"ttl": max(int(timeout * 1000), 10_000)}}).encode()
        job = self._ask("POST", "/run", timeout, parts=(text,))
        if isinstance(job, Response):
            return job
        name = job.get("id")
        if not isinstance(name, str) or not _ID.fullmatch(name):
            raise WireError(f"{self.name}: expected the id of a job, got none")
        most = request.most * 4 // 3 + request.most // 8 + (1 << 16)
        wait = _FIRST
        while True:
            left = end - time.monotonic()
            if left <= wait:
                self._cancel(name)
                raise DeadlineError(f"{self.name}: the job was not done within {timeout:.3g} s")
            found = self._ask("GET", f"/status/{name}", left, most=most)
            if isinstance(found, Response):
                return found
            if found.get("status") == "COMPLETED":
                return self._answer(found.get("output"))
            if found.get("status") in _ENDED:
                raise CloudError(f"{self.name}: the job ended as {found['status']}")
            self._sleep(wait)
            wait = min(2 * wait, _LONGEST)

    def redact(self, text: str) -> str:
        """As `Transport.redact`."""
        return self._transport.redact(text)

    def close(self) -> None:
        """As `Transport.close`."""
        self._transport.close()

    def _ask(
        self, method: str, path: str, timeout: float, *, parts: tuple[bytes, ...] = (), most: int = 1 << 16
    ) -> Mapping[str, Any] | Response:
        """The queue's object; its answer as it is where it refuses."""
        headers = {"Content-Type": "application/json"} if parts else {}
        request = Request(method=method, path=path, headers=headers, parts=parts, most=most)
        response = self._transport.send(request, timeout=timeout)
        if response.status == 404:  # of the queue's, not the server's: no such endpoint, or a result that has expired
            raise CloudError(
                f"{self.name}: {path.split('/')[1]} is not found: a wrong id, or a result that has expired"
            )
        if response.status >= 300:
            return response
        return parsed(response, self.name)

    def _answer(self, output: Any) -> Response:
        try:
            status, headers = int(output["status"]), {str(k).lower(): str(v) for k, v in output["headers"].items()}
            body = bytearray(base64.b64decode(output["body"], validate=True))
        except (TypeError, KeyError, ValueError, AttributeError, binascii.Error):
            raise WireError(f"{self.name}: expected a job's output of status, headers and body") from None
        return Response(status=status, headers=headers, body=body)

    def _cancel(self, name: str) -> None:
        try:
            self._ask("POST", f"/cancel/{name}", 1.0, parts=(b"{}",))
        except CloudError:
            return  # it ends by its own time to live
