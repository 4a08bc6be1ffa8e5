"""The worker of deploy/runpod: a job's request reaches a real server, through the fake of RunPod's queue."""

import base64
import importlib.util
import json
import sys
import types

import pytest
import torch
from clouds import CANARY
from served import ROOT, running

from apt_model.cloud.backend import OIPBackend
from apt_model.cloud.fake import Answer
from apt_model.cloud.providers.fakes import FakeInternet, FakeQueue
from apt_model.cloud.providers.queue import QueueTransport
from apt_model.cloud.providers.table import RULES
from apt_model.cloud.secret import Auth, Secret
from apt_model.optimization import CloudNPULinear

KEY = "of-the-container-" + "7" * 32


@pytest.fixture
def worker(monkeypatch):
    """The script, with the server's key; it has no server yet."""
    monkeypatch.setenv("SERVE_KEY", KEY)
    monkeypatch.setenv("PORT", "1")
    spec = importlib.util.spec_from_file_location("queue_worker", ROOT / "deploy" / "runpod" / "queue_worker.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Handled:
    """What a worker's handler answers, to the fake of the queue."""

    def __init__(self, worker):
        self.worker, self.asked = worker, []

    def answer(self, method, path, headers, body):
        job = {"method": method, "path": path, "headers": dict(headers), "body": base64.b64encode(body).decode()}
        self.asked.append(json.dumps(job))
        found = json.loads(json.dumps(self.worker.handler({"id": "job", "input": job})))
        return Answer(found["status"], base64.b64decode(found["body"]), found["headers"])


def test_a_layer_computes_on_a_real_server_behind_the_queue(worker, monkeypatch):
    with running("--allow-upload", "--token-env", "SERVE_KEY", env={"SERVE_KEY": KEY}) as (_, port):
        monkeypatch.setattr(worker, "PORT", port)
        handled = Handled(worker)
        inner = FakeInternet({"api.runpod.ai": FakeQueue(handled, key=CANARY)})(
            "https://api.runpod.ai/v2/abc123", Auth("Authorization", Secret(CANARY), "Bearer ")
        )
        backend = OIPBackend([QueueTransport(inner, sleep=lambda _: None)], rules=RULES["runpod-queue"])
        layer = CloudNPULinear(16, 32, cloud_backend=backend, fallback_local=False)
        x = torch.randn(5, 16)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
        assert layer.get_stats()["cloud_calls"] == 1
        backend.close()
    # Neither key is in a job: RunPod's is in the queue's header, the server's in the container.
    assert not any(CANARY in each or KEY in each for each in handled.asked)
    assert any("/infer" in each for each in handled.asked)


def test_a_worker_without_its_server_says_so(worker):
    found = worker.handler({"input": {"method": "GET", "path": "/v2"}})
    assert found["status"] == 503
    assert found["headers"] == {"Retry-After": "1"}
    assert "ConnectionRefusedError" in base64.b64decode(found["body"]).decode()


@pytest.mark.parametrize(
    "asked",
    [
        None, "text", {}, {"method": "GET"}, {"method": "PATCH", "path": "/v2"}, {"method": "GET", "path": "/metrics"},
        {"method": "GET", "path": "/v2", "body": "no base64!"}, {"method": "GET", "path": "/v2\r\nX: y"},
        {"method": "GET", "path": "/v2", "headers": ["a"]}, {"method": "GET", "path": 5},
        {"method": ["GET"], "path": ""},
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused(worker, asked, monkeypatch):
    monkeypatch.setattr(worker, "ask", lambda *_: pytest.fail("it was handed on"))
    found = worker.handler({"input": asked})
    assert found["status"] == 400
    assert "expected" in json.loads(base64.b64decode(found["body"]))["error"]


def test_headers_of_the_connection_are_left_behind(worker, monkeypatch):
    seen = {}
    monkeypatch.setattr(worker, "ask", lambda *asked: seen.update(headers=asked[2]) or worker.told(200, {}, b""))
    headers = {"Content-Type": "a/b", "Authorization": "Bearer x", "Host": "evil", "Transfer-Encoding": "chunked"}
    worker.handler({"input": {"method": "GET", "path": "/v2", "headers": headers}})
    assert seen["headers"] == {"content-type": "a/b"}


def test_it_starts_the_server_and_takes_jobs(worker, monkeypatch, tmp_path):
    started = []
    runpod = types.SimpleNamespace(serverless=types.SimpleNamespace(start=started.append))
    monkeypatch.setitem(sys.modules, "runpod", runpod)
    monkeypatch.setattr(sys, "argv", ["queue_worker.py", "--max-body", "7MB"])
    (tmp_path / "apt-start").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\nsleep 30\n')
    (tmp_path / "apt-start").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(worker, "wait", lambda server: (server.kill(), server.wait()))
    worker.main()
    (said,) = started
    assert set(said) == {"handler", "concurrency_modifier"}
    assert said["concurrency_modifier"](1) == worker.JOBS


def test_a_server_that_ends_ends_the_worker(worker):
    ended = types.SimpleNamespace(poll=lambda: 3, returncode=3)
    with pytest.raises(SystemExit, match="ended with 3"):
        worker.wait(ended)
