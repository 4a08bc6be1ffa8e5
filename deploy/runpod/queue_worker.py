"""A worker of RunPod's queue: hands a job's request to `apt-model serve` beside it, in the same container.

A job's input is {"method", "path", "headers", "body"}, its output {"status", "headers", "body"}, both bodies in base64;
`apt_model.cloud` sends and takes these. The server's key never leaves the container: RunPod's own key guards the queue.

Documentation-tested, not account-tested (docs.runpod.io: handler functions and concurrent handlers, as of 2026-08).
"""

import asyncio
import base64
import binascii
import http.client
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

PORT, KEY = int(os.environ.get("PORT", "8080")), os.environ.get("SERVE_KEY", "")
SECONDS = float(os.environ.get("JOB_SECONDS", "300"))
JOBS = int(os.environ.get("JOBS", "8"))
"""At a time: as many as the server takes by itself (`--max-inflight`)."""
METHODS = ("GET", "POST", "PUT", "DELETE")
# Of a request and of an answer, those that say something of the body; the connection's are its own.
HEADERS = ("content-type", "inference-header-content-length", "retry-after")


def handler(job: Mapping[str, Any]) -> dict[str, Any]:
    """One job. What is no request is answered as the server would: 400, with the reason."""
    asked = job.get("input")
    try:
        method, path = asked["method"], asked["path"]  # type: ignore[index]
        headers = {str(name).lower(): str(value) for name, value in asked.get("headers", {}).items()}  # type: ignore[union-attr]
        body = base64.b64decode(asked.get("body", ""), validate=True)  # type: ignore[union-attr]
    except (KeyError, TypeError, AttributeError, ValueError, binascii.Error):
        return refused("expected an input of method, path, headers and body, the body in base64")
    if method not in METHODS or not isinstance(path, str) or not path.isascii() or not path.startswith("/v2"):
        return refused(f"expected a path under /v2 and one of {', '.join(METHODS)}")
    if any(ord(each) <= 32 for each in path):
        return refused("expected a path without spaces")
    return ask(method, path, {name: value for name, value in headers.items() if name in HEADERS}, body)


def ask(method: str, path: str, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """The server's answer; 503 where it gives none."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=SECONDS)
    try:
        connection.request(method, path, body or None, {**headers, "Authorization": f"Bearer {KEY}"})
        answer = connection.getresponse()
        return told(answer.status, dict(answer.headers.items()), answer.read())
    except (OSError, http.client.HTTPException) as error:
        return told(503, {"Retry-After": "1"}, f'{{"error": "the server beside it: {type(error).__name__}"}}'.encode())
    finally:
        connection.close()


def told(status: int, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """A job's output."""
    kept = {name: value for name, value in headers.items() if name.lower() in HEADERS}
    return {"status": status, "headers": kept, "body": base64.b64encode(body).decode()}


def refused(why: str) -> dict[str, Any]:
    """An output that says what was expected."""
    return told(400, {"Content-Type": "application/json"}, f'{{"error": "{why}"}}'.encode())


def wait(server: "subprocess.Popen[bytes]") -> None:
    """Until the server is ready; ends the container where it ends."""
    while ask("GET", "/v2/health/ready", {}, b"")["status"] != 200:
        if server.poll() is not None:
            sys.exit(f"apt-model serve ended with {server.returncode}")
        time.sleep(0.2)


def main() -> None:
    """Start the server, then take jobs."""
    import runpod  # noqa: PLC0415 - of the image; the handler is tested without it

    server = subprocess.Popen(["apt-start", *sys.argv[1:]])  # noqa: S603, S607 - the image's own
    wait(server)

    async def several(job: Mapping[str, Any]) -> dict[str, Any]:
        if server.poll() is not None:
            os._exit(1)  # a worker without its server is of no use: RunPod starts another
        return await asyncio.to_thread(handler, job)

    runpod.serverless.start({"handler": several, "concurrency_modifier": lambda _: JOBS})


if __name__ == "__main__":
    main()
