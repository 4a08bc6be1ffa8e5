"""Gateways of providers, as documented (`table.RULES`), before a fake server: what they refuse, these refuse."""

import base64
import itertools
import json
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from apt_model.cloud.fake import Answer, Answers, asgi, in_json, refusal
from apt_model.cloud.providers.table import MB, RULES
from apt_model.cloud.secret import Auth
from apt_model.cloud.transport import InProcess, Transport
from apt_model.core.errors import CloudError


class FakeGateway:
    """A gateway that hands requests on to a server behind it.

    Args:
        kind: of `RULES`.
        server: behind it.
        key: that it takes; it is not handed on.
        way: the header it must come in; None is the usual one.
        prefix: the path that stands before the server's own.
    """

    def __init__(self, kind: str, server: Answers, *, key: str, way: str | None = None, prefix: str = "") -> None:
        self.rules = RULES[kind]
        self.server, self.key, self.prefix = server, key, prefix
        self.header = self.rules.headers[way or next(iter(self.rules.headers))]
        self.takes = 0.0
        """Seconds that the server behind it is said to take; nobody waits."""

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """As `Answers.answer`."""
        name, before = self.header
        if headers.get(name.lower()) != before + self.key:
            return refusal(401, "the gateway does not take the key")
        if not path.startswith(f"{self.prefix}/"):
            return refusal(404, "no such service")
        if self.rules.request_bytes is not None and len(body) > self.rules.request_bytes:
            return refusal(413, f"a body of more than {self.rules.request_bytes} bytes")
        if self.rules.seconds is not None and self.takes > self.rules.seconds:
            return Answer(524 if self.rules is RULES["salad"] else 504, b"<html>gateway timeout</html>")
        kept = {header: value for header, value in headers.items() if header != name.lower()}
        found = self.server.answer(method, path.removeprefix(self.prefix), kept, body)
        if self.rules.reply_bytes is not None and len(found.body) > self.rules.reply_bytes:
            return Answer(502, b"<html>the answer is too large</html>")
        return found


class FakeQueue:
    """RunPod's queue: /run, /status/ID, /cancel/ID and /health below /v2/ENDPOINT.

    Args:
        server: that a worker hands requests to.
        key: that it takes.
        endpoint: its id.
        polls: how often a job is asked for before it is done.
        clock: seconds, for what expires and what is counted in 10 seconds.
    """

    def __init__(
        self,
        server: Answers,
        *,
        key: str,
        endpoint: str = "abc123",
        polls: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.server, self.key, self.prefix, self.polls, self.clock = server, key, f"/v2/{endpoint}", polls, clock
        self.jobs: dict[str, list[float]] = {}
        self.outputs: dict[str, dict[str, object]] = {}
        self.cancelled: set[str] = set()
        self.runs: list[float] = []
        self._names = itertools.count(1)

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """As `Answers.answer`."""
        if headers.get("authorization") != f"Bearer {self.key}":
            return refusal(401, "the queue does not take the key")
        match (method, path.removeprefix(self.prefix).strip("/").split("/")):
            case ("GET", ["health"]):
                return in_json({"jobs": {"completed": len(self.outputs)}, "workers": {"idle": 1}})
            case ("POST", ["run"]):
                return self._run(body)
            case ("GET", ["status", name]):
                return self._status(name)
            case ("POST", ["cancel", name]):
                self.cancelled.add(name)
                return in_json({"id": name, "status": "CANCELLED"})
        return refusal(404, "no such endpoint")

    def _run(self, body: bytes) -> Answer:
        now = self.clock()
        self.runs = [each for each in self.runs if now - each < 10]
        if len(self.runs) >= 1000:
            return refusal(429, "1000 in 10 seconds", retry_after="1")
        if len(body) > 10 * MB:
            return refusal(413, "more than 10 MB")
        try:
            asked = json.loads(body)["input"]
        except (ValueError, KeyError, TypeError):
            return refusal(400, "expected JSON with an input")
        self.runs.append(now)
        name = f"job-{next(self._names)}"
        found = self.server.answer(
            asked["method"], asked["path"], {key.lower(): value for key, value in asked["headers"].items()},
            base64.b64decode(asked["body"]),
        )  # fmt: skip
        output = {"status": found.status, "headers": dict(found.headers), "body": base64.b64encode(found.body).decode()}
        self.outputs[name] = {"id": name, "status": "FAILED" if found.fault else "COMPLETED", "output": output}
        self.jobs[name] = [now, 0]
        return in_json({"id": name, "status": "IN_QUEUE"})

    def _status(self, name: str) -> Answer:
        job = self.jobs.get(name)
        if job is None or self.clock() - job[0] > 1800:
            return refusal(404, "no such job, or its result has expired")
        if name in self.cancelled:
            return in_json({"id": name, "status": "CANCELLED"})
        job[1] += 1
        if job[1] <= self.polls:
            return in_json({"id": name, "status": "IN_QUEUE" if job[1] == 1 else "IN_PROGRESS"})
        return in_json(self.outputs[name])


class FakeMaaS:
    """Chat alone: /v1/chat/completions and /v1/models.

    Args:
        key: that it takes.
        models: names that it knows.
    """

    def __init__(self, *, key: str, models: tuple[str, ...] = ("deepseek-r1",)) -> None:
        self.key, self.models = key, models

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """As `Answers.answer`."""
        if headers.get("authorization") != f"Bearer {self.key}":
            return refusal(401, "no such key")
        if (method, path) == ("GET", "/v1/models"):
            return in_json({"data": [{"id": each} for each in self.models]})
        if (method, path) != ("POST", "/v1/chat/completions"):
            return refusal(404, "no such path")
        asked = json.loads(body)
        if asked.get("model") not in self.models:
            return refusal(404, "no such model")
        said = asked["messages"][-1]["content"]
        message = {"role": "assistant", "content": f"you said: {said}"}
        return in_json(
            {
                "id": "chat-1",
                "object": "chat.completion",
                "created": 0,
                "model": asked["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            }
        )


class FakeInternet:
    """Fakes by host; calling it with an address and a header connects, as `enable_cloud_npu(connector=...)` takes."""

    def __init__(self, hosts: Mapping[str, Answers]) -> None:
        self.hosts = hosts

    def __call__(self, url: str, auth: Auth | None) -> Transport:
        """A transport to the host of `url`; to no host at all where there is none of that name."""
        parts = urlsplit(url)
        fake = self.hosts.get(parts.netloc)
        prefix = parts.path.rstrip("/")
        return InProcess(asgi(fake or _Nowhere()), auth=auth, name=f"https://{parts.netloc}{prefix}", prefix=prefix)


class _Nowhere:
    def answer(self, *_: object) -> Answer:
        raise CloudError("there is no such host")
