"""Each provider's documented rules, held by its fake, and our client behind each of them."""

import base64
import json
import logging
import re

import pytest
import torch
from clouds import CANARY, Clock, counts, reference

from apt_model.cloud.backend import OIPBackend
from apt_model.cloud.client import Client
from apt_model.cloud.fake import FakeServer
from apt_model.cloud.providers.connect import is_chat, tensors
from apt_model.cloud.providers.fakes import FakeGateway, FakeInternet, FakeMaaS, FakeQueue
from apt_model.cloud.providers.maas import MaaSBackend
from apt_model.cloud.providers.queue import QueueTransport
from apt_model.cloud.providers.table import RULES
from apt_model.cloud.secret import Secret
from apt_model.cloud.transport import Request
from apt_model.core.errors import CloudError, ConfigError, DeadlineError, MissingExtraError, RefusedError
from apt_model.optimization import CloudNPULinear

GATEWAYS = [
    ("modelarts", "bearer", "/v1/infers/0123-abcd"),
    ("modelarts", "x-auth-token", "/v2/infer/0123-abcd"),
    ("modelarts", "appcode", "/v1/infers/0123-abcd"),
    ("modelarts", "apikey", "/v2/infer/0123-abcd"),
    ("runpod", "bearer", ""),
    ("salad", "key", ""),
    ("own", "bearer", "/some/path"),
]


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "apt_model.cloud")


def behind(kind, way, prefix, server=None, key=CANARY):
    gateway = FakeGateway(kind, server or FakeServer(), key=CANARY, way=way, prefix=prefix)
    internet = FakeInternet({"host.example": gateway})
    secret = Secret(key)
    return gateway, tensors(kind, f"https://host.example{prefix}", secret, internet, name="x", way=way)


def test_every_rule_names_its_source():
    assert all(each.source and each.headers and each.capability in ("tensors", "tokens") for each in RULES.values())
    assert {RULES["modelarts"].request_bytes, RULES["runpod"].request_bytes} == {12_000_000, 30_000_000}


@pytest.mark.parametrize(("kind", "way", "prefix"), GATEWAYS)
def test_a_layer_works_behind_each_gateway(kind, way, prefix):
    _, backend = behind(kind, way, prefix)
    layer = CloudNPULinear(16, 32, cloud_backend=backend, fallback_local=False)
    with torch.no_grad():
        x = torch.randn(4, 16)
        assert torch.equal(layer(x), reference(layer, x))
    assert backend.is_available()
    assert CANARY not in repr(backend.describe()) + repr(layer)
    backend.close()


@pytest.mark.parametrize(("kind", "way", "prefix"), GATEWAYS)
def test_a_wrong_key_or_path_is_refused(kind, way, prefix):
    _, backend = behind(kind, way, prefix, key="wrong")
    assert "answers 401" in backend.health().why
    assert not backend.is_available()
    backend.close()


def test_tokens_are_cut_to_modelarts_twelve_megabytes():
    server = FakeServer(max_upload=1 << 30)
    _, backend = behind("modelarts", "bearer", "/v1/infers/a", server)
    layer = CloudNPULinear(64, 1024, cloud_backend=backend, fallback_local=False, verify=False)
    with torch.no_grad():
        x = torch.randn(5000, 64)
        torch.testing.assert_close(layer(x), reference(layer, x))
    assert sum(each[1].endswith("/infer") for each in server.requests) == 2  # 20 MB come back
    big = CloudNPULinear(2048, 2048, cloud_backend=backend, fallback_local=False)
    with pytest.raises(RefusedError, match=r"the weights are \d+ bytes, 12000000 pass") as caught:
        big.push_weights()
    assert "serve --weights" in str(caught.value)
    backend.close()


@pytest.mark.parametrize(
    ("kind", "takes", "status"), [("modelarts", 41, 504), ("salad", 101, 524), ("runpod", 331, 504)]
)
def test_a_gateway_that_gave_up_waiting_is_left_alone(kind, takes, status):
    gateway, backend = behind(kind, None, "")
    layer = CloudNPULinear(4, 4, cloud_backend=backend)
    x = torch.randn(2, 4)
    with torch.no_grad():
        layer(x)
        gateway.takes = takes
        assert torch.equal(layer(x), reference(layer, x))
    assert counts(layer) == (1, 1, 0)
    assert layer.get_stats()["breaker"] == ["open"]
    response = gateway.answer("GET", "/v2", {gateway.header[0].lower(): gateway.header[1] + CANARY}, b"")
    assert response.status == status
    backend.close()


def test_a_gateways_limits_hold():
    gateway, backend = behind("runpod", None, "")
    headers = {"authorization": f"Bearer {CANARY}"}
    assert gateway.answer("POST", "/v2/x", headers, bytes(30_000_001)).status == 413
    assert gateway.answer("GET", "/ping", headers, b"").status == 200
    gateway.server.ready = False
    assert gateway.answer("GET", "/ping", headers, b"").status == 204
    backend.close()


def test_a_way_that_a_provider_has_not_is_refused():
    with pytest.raises(ConfigError, match="bearer, x-auth-token, appcode, apikey"):
        tensors("modelarts", "https://h", Secret("k"), FakeInternet({}), name="x", way="basic")


# --- RunPod's queue


def queued(clock=None, **options):
    queue = FakeQueue(FakeServer(), key=CANARY, **({"clock": clock} if clock else {}), **options)
    internet = FakeInternet({"api.runpod.ai": queue})
    from apt_model.cloud.secret import Auth

    inner = internet("https://api.runpod.ai/v2/abc123", Auth("Authorization", Secret(CANARY), "Bearer "))
    return queue, QueueTransport(inner, sleep=lambda _: None)


def test_a_layer_works_through_the_queue():
    queue, transport = queued()
    backend = OIPBackend([transport], rules=RULES["runpod-queue"], client=Client([transport]))
    layer = CloudNPULinear(16, 32, cloud_backend=backend, fallback_local=False)
    with torch.no_grad():
        x = torch.randn(4, 16)
        assert torch.equal(layer(x), reference(layer, x))
    assert len(queue.runs) > 3
    backend.close()


def test_a_job_that_is_late_is_cancelled():
    queue, transport = queued(polls=10**9)
    transport._sleep = lambda _: None
    with pytest.raises(DeadlineError, match="was not done within"):
        transport.send(Request(method="GET", path="/v2"), timeout=0.3)
    assert queue.cancelled == {"job-1"}
    transport.close()


def test_a_job_that_failed_and_a_result_that_expired():
    clock = Clock()
    queue, transport = queued(clock=clock)
    ask = Request(method="GET", path="/v2")
    answer = queue.server.answer
    queue.server.answer = lambda *args: answer(*args)._replace(fault="refuse")
    with pytest.raises(CloudError, match="ended as FAILED"):
        transport.send(ask, timeout=5)
    transport._sleep = lambda _: setattr(clock, "now", clock.now + 1801)
    with pytest.raises(CloudError, match="has expired"):
        transport.send(ask, timeout=5)
    transport.close()


def test_the_queues_own_rules():
    clock = Clock()
    queue, transport = queued(clock=clock)
    headers = {"authorization": f"Bearer {CANARY}"}
    job = json.dumps({"input": {"method": "GET", "path": "/v2", "headers": {}, "body": ""}}).encode()
    assert queue.answer("POST", "/v2/abc123/run", {}, job).status == 401
    assert queue.answer("POST", "/v2/other/run", headers, job).status == 404
    assert queue.answer("POST", "/v2/abc123/run", headers, b"\x00binary").status == 400
    assert queue.answer("POST", "/v2/abc123/run", headers, bytes(10_000_001)).status == 413
    codes = [queue.answer("POST", "/v2/abc123/run", headers, job).status for _ in range(1001)]
    assert codes.index(429) == 1000
    assert transport.send(Request(method="GET", path="/v2"), timeout=5).status == 429
    clock.now += 10
    assert queue.answer("POST", "/v2/abc123/run", headers, job).status == 200
    states = [json.loads(queue.answer("GET", "/v2/abc123/status/job-1001", headers, b"").body) for _ in range(3)]
    assert [each["status"] for each in states] == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    assert base64.b64decode(states[2]["output"]["body"]).startswith(b'{"name"')
    transport.close()


# --- MaaS


class Chat:
    """The part of OpenAI's client that is used, on a fake of MaaS."""

    def __init__(self, fake, **made):
        self.fake, self.made = fake, made
        self.chat = self.completions = self

    def create(self, **asked):
        headers = {"authorization": f"Bearer {self.made['api_key']}"}
        path = re.sub("^https://[^/]*", "", self.made["base_url"]) + "/chat/completions"
        found = self.fake.answer("POST", path, headers, json.dumps(asked).encode())
        if found.status != 200:
            error = RuntimeError(f"status {found.status} for key {self.made['api_key']}")
            error.status_code = found.status
            raise error
        from types import SimpleNamespace

        text = json.loads(found.body)["choices"][0]["message"]["content"]
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=text))])

    def close(self):
        pass


def maas(model="deepseek-r1", key=CANARY):
    fake = FakeMaaS(key=CANARY)
    secret = Secret(key)
    from apt_model.cloud.secret import Auth

    transport = FakeInternet({"api.modelarts-maas.com": fake})(
        "https://api.modelarts-maas.com/v1", Auth("Authorization", secret, "Bearer ")
    )
    return MaaSBackend(
        "https://api.modelarts-maas.com/v1", secret, model, transport, client=lambda **made: Chat(fake, **made)
    )


def test_maas_chats_and_runs_no_layer():
    backend = maas()
    assert backend.capabilities == {"tokens"}
    assert backend.is_available()
    assert backend.chat("hello") == "you said: hello"
    assert CANARY not in repr(backend) + repr(backend.describe())
    with pytest.raises(ConfigError, match="cannot run a layer"):
        CloudNPULinear(4, 4, cloud_backend=backend, fallback_local=False)
    backend.close()


def test_maas_errors_are_ours_and_quote_no_key():
    backend = maas(model="another")
    with pytest.raises(RefusedError, match="answers 404") as caught:
        backend.chat("hello")
    assert CANARY not in str(caught.value)
    assert caught.value.__suppress_context__
    backend.close()
    backend = maas(key="wrong")
    assert backend.health().why == "it does not take the key (401)"
    backend.close()


def test_without_openais_package_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "openai", None)
    backend = maas()
    backend._client = None
    with pytest.raises(MissingExtraError, match=r"apt-transformer\[cloud\]"):
        backend.chat("hello")
    backend.close()


@pytest.mark.parametrize(
    ("url", "chat"),
    [
        ("https://api.modelarts-maas.com/v1/chat/completions", True),
        ("https://api.modelarts-maas.com", True),
        ("https://api-ap-southeast-1.modelarts-maas.com/openai/v1", True),
        ("https://x.example/openai/v1/", True),
        ("http://127.0.0.1:8000/v1/chat/completions", True),
        ("https://id.apig.cn-north-4.huaweicloudapis.com/v1/infers/abc", False),
        ("https://modelarts-maas.com.evil.example/v1", False),
        ("https://[", False),
    ],
)
def test_an_address_is_told_apart(url, chat):
    assert is_chat(url) == chat
