"""Servers that are not ours: JSON in place of binary tensors, a name in place of a version, and no repository."""

import json
from contextlib import contextmanager

import pytest
import torch
from clouds import counts, in_process, reference

from apt_model.cloud.backend import OIPBackend
from apt_model.cloud.client import Client, Retry
from apt_model.cloud.dialect import Dialect
from apt_model.cloud.fake import Answer, FakeServer, asgi, in_json, refusal
from apt_model.cloud.tensors import Weights
from apt_model.cloud.transport import InProcess
from apt_model.core.errors import CloudError, RefusedError, WireError
from apt_model.optimization import CloudNPULinear


class Plain:
    """Another's server: JSON alone. `versions` false refuses every version in a path with 501, as KServe's does."""

    def __init__(self, layer, *, versions=True, datatype="FP32", change=lambda answer: answer):
        self.layer, self.versions, self.datatype, self.change = layer.float(), versions, datatype, change
        self.requests, self.up = [], True

    def answer(self, method, path, headers, body):
        self.requests.append((method, path, body))
        if not self.up:
            return Answer(200, fault="refuse")
        if path == "/v2":
            return in_json({"name": "plain", "version": "1", "extensions": []})
        if path == "/v2/health/ready":
            return Answer(200)
        *model, call = path.removeprefix("/v2/models/").split("/")
        if "versions" in model and not self.versions:
            return refusal(501, "no versions here")
        held = ["apt-linear", "versions", self.version] if self.versions else [f"apt-linear-{self.version}"]
        if method not in ("GET", "POST") or model != held:
            return refusal(404, "unknown")
        return Answer(200) if call == "ready" else self.infer(headers, json.loads(body))

    def infer(self, headers, message):
        assert headers["content-type"] == "application/json"
        assert "inference-header-content-length" not in headers
        (x,) = message["inputs"]
        assert (x["name"], x["datatype"], set(x)) == ("x", "FP32", {"name", "datatype", "shape", "data"})
        y = self.layer(torch.tensor(x["data"]).view(x["shape"])).detach()
        output = {"name": "y", "datatype": self.datatype, "shape": list(y.shape), "data": y.tolist()}
        return in_json(self.change({"model_name": "m", "id": message["id"], "outputs": [output]}))


class Bytes(FakeServer):
    """Another's server with binary tensors, such as Triton: no limits of ours, no repository."""

    def answer(self, method, path, headers, body):
        if path == "/v2":
            self.requests.append((method, path, headers, 0))
            return in_json({"name": "bytes", "version": "2", "extensions": ["binary_tensor_data"]})
        held = [f"/v2/models/{model}/versions/{version}/ready" for model, version in self.held]
        if path.startswith("/v2/models") and path.endswith("/ready"):
            return Answer(200) if path in held else refusal(404, "unknown")
        assert "repository" not in path
        return super().answer(method, path, headers, body)


@contextmanager
def connected(dtype=torch.float32, **options):
    """A layer on such a server, and the server."""
    layer = torch.nn.Linear(8, 6, dtype=dtype)
    version = Weights(kind="linear", config={}, tensors=layer.state_dict()).version
    plain = Plain(torch.nn.Linear(8, 6), **options)
    plain.version = version
    plain.layer.load_state_dict(layer.state_dict())
    transport = InProcess(asgi(plain))
    backend = OIPBackend([transport], client=Client([transport], retry=Retry(first=0.001)))
    try:
        yield CloudNPULinear.from_linear(layer, cloud_backend=backend, fallback_local=False), plain, backend
    finally:
        backend.close()


@pytest.mark.parametrize("versions", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
@torch.no_grad()
def test_a_forward_in_json(versions, dtype, datatype):
    with connected(dtype, versions=versions, datatype=datatype) as (layer, plain, backend):
        for rows in (1, 5):
            x = torch.randn(rows, 8, dtype=dtype)
            torch.testing.assert_close(layer(x), reference(layer, x))
        assert counts(layer) == (2, 0, 0)
        asked = [path for _, path, _ in plain.requests]
        assert len([path for path in asked if path.endswith("/infer")]) == 2
        assert len(asked) == 4 + 1 + versions  # /v2, ready, where it is, and two forwards
        assert not [path for path in asked if "repository" in path]
        assert backend.health().why == "plain 1, in JSON: it does not say that it has binary_tensor_data"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_forward_in_bytes_on_another_server(dtype):
    fake = Bytes()
    layer = torch.nn.Linear(8, 6, dtype=dtype)
    with in_process(fake) as backend:
        made = CloudNPULinear.from_linear(layer, cloud_backend=backend, fallback_local=False)
        x = torch.randn(3, 8, dtype=dtype)
        with pytest.raises(RefusedError, match="neither version"):
            made(x)
        fake.hold(Weights(kind="linear", config={}, tensors=layer.state_dict()))
        assert torch.equal(made(x), reference(layer, x))
        path, headers = fake.requests[-1][1:3]
        assert path.endswith("/infer")
        assert int(headers["inference-header-content-length"]) + x.nbytes == fake.requests[-1][3]
        strange = CloudNPULinear.from_linear(layer, cloud_backend=backend, fallback_local=False, wire="int8g64")
        with pytest.raises(RefusedError, match="does not know wire"):
            strange(x)


@torch.no_grad()
def test_every_number_comes_through_json_as_it_was():
    x = torch.cat([torch.randn(2002), torch.tensor([0.0, -0.0, 1e-45, 3.4e38, -1.1754944e-38, 1 / 3])])
    with connected(torch.float32) as (layer, plain, _):
        for name in ("weight", "bias"):
            getattr(plain.layer, name).zero_()
        layer.verify = False
        seen = []
        plain.infer = lambda headers, message: (seen.append(message), Plain.infer(plain, headers, message))[1]
        layer(x.view(-1, 8))
        sent = torch.tensor(seen[0]["inputs"][0]["data"])
        assert torch.equal(sent.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: {**a, "id": "another"}, "another request's"),
        (lambda a: {**a, "outputs": []}, "'y' as FP32"),
        (lambda a: {**a, "outputs": [{**a["outputs"][0], "shape": [6, 2]}]}, r"'y' as FP32 \[2, 6\]"),
        (lambda a: {**a, "outputs": [{**a["outputs"][0], "datatype": "INT64", "data": [1] * 12}]}, "got INT64"),
        (lambda a: {**a, "outputs": [{**a["outputs"][0], "data": [None] * 12}]}, "expected elements of FP32"),
        (lambda a: {**a, "outputs": [{**a["outputs"][0], "data": ["1"] * 12}]}, "expected elements of FP32"),
        (lambda a: {**a, "more": "x" * (1 << 20)}, "at most"),
    ],
)
def test_an_answer_that_is_another_one(change, said):
    with connected(change=change) as (layer, _, _), pytest.raises(WireError, match=said):
        layer(torch.randn(2, 8))


@pytest.mark.parametrize("versions", [True, False])
def test_weights_that_are_not_there(versions):
    with connected(versions=versions) as (layer, plain, backend):
        plain.version = "0" * 16
        for _ in range(4):
            with pytest.raises(
                RefusedError, match=r"neither version \w{16} of apt-linear nor a model apt-linear-\w{16}"
            ):
                layer(torch.randn(2, 8))
        assert backend.client.endpoints[0].breaker.state == "closed"
        assert not [path for method, path, _ in plain.requests if method == "PUT" or path.endswith("/infer")]


def test_weights_that_go_away_are_looked_for_again():
    with connected() as (layer, plain, _):
        layer(torch.randn(2, 8))
        kept, plain.version = plain.version, "0" * 16
        with pytest.raises(RefusedError):
            layer(torch.randn(2, 8))
        plain.version, plain.versions = kept, False
        layer(torch.randn(2, 8))
        assert plain.requests[-1][1] == f"/v2/models/apt-linear-{kept}/infer"


def test_a_server_that_was_away_at_first_is_still_spoken_to_in_json():
    with connected() as (layer, plain, backend):
        plain.up = False
        assert not backend.health().ok
        with pytest.raises(CloudError):
            layer(torch.randn(2, 8))
        plain.up = True
        for endpoint in backend.client.endpoints:
            endpoint.breaker.success()
        layer(torch.randn(2, 8))
        assert counts(layer) == (1, 0, 1)


def test_what_metadata_says():
    binary, limits = ["binary_tensor_data", "x"], {"max_body": 1}
    assert Dialect.of({"extensions": binary, "limits": limits}) == Dialect(binary=True, own=True)
    assert Dialect.of({"extensions": binary}) == Dialect(binary=True, own=False)
    for strange in (None, [], "binary_tensor_data", {"binary_tensor_data": 1}, 7):
        assert Dialect.of({"extensions": strange, "limits": limits}) == Dialect(binary=False, own=False)
