"""KServe's Python package on the other side: its client drives our server, and our client its server."""

import json
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clouds import counts, reference
from peer import OPEN, free_ports, needs, python_of, serving
from served import linear_file, over_http, running

from apt_model.cloud.backend import OIPBackend
from apt_model.cloud.http_transport import HttpTransport
from apt_model.cloud.tensors import Weights
from apt_model.core.errors import RefusedError
from apt_model.optimization import CloudNPULinear

pytestmark = needs("kserve")
CLIENT = """
import asyncio, sys
import httpx
import numpy as np
from kserve import InferInput, InferRequest, InferenceRESTClient, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

URL = f"http://127.0.0.1:{sys.argv[1]}"
base = np.arange(48, dtype=np.float32).reshape(3, 16) / 16


def request(kind, binary, model="model", wanted=None, **parameters):
    x = InferInput("x", [3, 16], {np.float32: "FP32", np.float16: "FP16"}[kind])
    x.set_data_from_numpy(base.astype(kind), binary_data=binary)
    outputs = None if wanted is None else [RequestedOutput("y", {"binary_data": wanted})]
    return InferRequest(model, [x], request_id="7", parameters=parameters or None, request_outputs=outputs)


async def main():
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
    assert await client.is_server_live(URL) is True
    assert await client.is_server_ready(URL) is True
    assert await client.is_model_ready(URL, "model") is True

    async def ask(name, sent, model="model"):
        got = await client.infer(URL, sent, model_name=model)
        (y,) = got.outputs
        assert (got.id, got.model_name, y.name, list(y.shape)) == ("7", "model", "y", [3, 24]), got.outputs
        print(name, y.datatype, *y.as_numpy().astype(np.float32).ravel())

    for binary in (False, True):
        for answer in (False, True):
            await ask("wish", request(np.float32, binary, binary_data_output=answer))
            await ask("output", request(np.float32, binary, wanted=answer))
    await ask("half", request(np.float16, True, binary_data_output=True))
    version = (await client._client.get(URL + "/v2/models/model")).json()["versions"][0]
    await ask("version", request(np.float32, True, binary_data_output=True), f"model/versions/{version}")
    for model, kind in (("none", "model"), ("model/versions/" + "0" * 16, "version"), ("model", "shape")):
        sent = request(np.float32, True)
        if kind == "shape":
            sent.inputs[0].shape = [1, 48]
        try:
            await client.infer(URL, sent, model_name=model)
        except httpx.HTTPStatusError as error:
            print("refused", error.response.status_code, str(error).partition(", '")[0])
    for kind, binary in (("FP16", False), ("BF16", True)):
        try:
            x = InferInput("x", [3, 16], kind)
            x.set_data_from_numpy(base.astype(np.float16), binary_data=binary)
            InferRequest("model", [x]).to_rest()
        except Exception as error:
            print("cannot", kind, type(error).__name__)
    await client.close()


asyncio.run(main())
"""
SERVER = """
import sys
import numpy as np
from kserve import InferOutput, InferResponse, Model, ModelServer


class Linear(Model):
    def __init__(self, name, path):
        super().__init__(name)
        held = np.load(path)
        self.weight, self.bias = held["weight"], held["bias"]
        self.ready = True

    def predict(self, payload, headers=None):
        x = payload.inputs[0].as_numpy()
        y = x @ self.weight.T + self.bias
        output = InferOutput("y", list(y.shape), "FP32")
        output.set_data_from_numpy(y, binary_data=payload.use_binary_outputs)
        return InferResponse(payload.id, self.name, [output], use_binary_outputs=payload.use_binary_outputs)


models = [Linear(each, f"{each}.npz") for each in sys.argv[2:]]
ModelServer(http_port=int(sys.argv[1]), enable_grpc=False).start(models)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_client_drives_our_server(tmp_path, dtype):
    """FP32 in JSON and in binary, each way apart, and FP16 in binary; what its client cannot send is asserted too."""
    tensors = linear_file(tmp_path / "a.safetensors", dtype)
    with running("--weights", tmp_path / "a.safetensors") as (_, port):
        done = subprocess.run(
            [python_of("kserve"), "-W", "ignore", "-c", CLIENT, str(port)], capture_output=True, text=True, timeout=120,
            check=False, cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [
        *["wish", "output"] * 4,
        "half",
        "version",
        *["refused"] * 3,
        *["cannot"] * 2,
    ]
    base = torch.arange(48).view(3, 16) / 16
    for _, kind, numbers in lines[:10]:
        sent = {"FP32": torch.float32, "FP16": torch.float16}[kind]
        y = F.linear(base.to(dtype), **tensors).to(sent).float()
        torch.testing.assert_close(torch.tensor([float(each) for each in numbers.split()]).view(3, 24), y)
    assert [line[1] for line in lines[:10]] == ["FP32"] * 8 + ["FP16", "FP32"]
    assert [line[1] for line in lines[10:13]] == ["404", "404", "400"]
    assert all(len(line[2]) > 10 for line in lines[10:13])  # our words reach its user
    assert [line[1:] for line in lines[13:]] == [["FP16", "InvalidInput"], ["BF16", "InferenceError"]]


def version_of(layer):
    return Weights(kind="linear", config={}, tensors=layer.state_dict()).version


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """KServe's ModelServer with a linear in each type, under the digest of its weights; the layers, and the port."""
    folder = tmp_path_factory.mktemp("kserve")
    layers = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layers[dtype] = layer = torch.nn.Linear(24, 16, dtype=dtype)
        np.savez(
            folder / f"apt-linear-{version_of(layer)}.npz", weight=layer.weight.detach().float(),
            bias=layer.bias.detach().float(),
        )  # fmt: skip
    (port,) = free_ports(1)
    (folder / "linear_server.py").write_text(SERVER)
    names = [f"apt-linear-{version_of(each)}" for each in layers.values()]
    with serving([python_of("kserve"), "linear_server.py", port, *names], port, folder=folder):
        yield port, layers


@pytest.fixture
def backend(server):
    found = OIPBackend([HttpTransport(f"http://{OPEN}:{server[0]}")])
    yield found
    found.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_our_client_drives_its_server(server, backend, dtype):
    assert backend.health().ok
    layer = CloudNPULinear.from_linear(server[1][dtype], cloud_backend=backend, fallback_local=False)
    x = torch.randn(5, 3, 24, dtype=dtype)
    torch.testing.assert_close(layer(x), reference(layer, x))
    assert counts(layer) == (1, 0, 0)
    assert "kserve" in backend.health().why


def test_its_server_has_no_versions_and_does_not_say_that_it_has_binary_tensors(server):
    """Why a model is looked for under its name with the digest, and asked in JSON."""
    port, layers = server
    about = json.loads(over_http(port, "GET", "/v2")[2])
    assert "binary_tensor_data" not in about["extensions"]
    name = f"apt-linear-{version_of(layers[torch.float32])}"
    assert over_http(port, "GET", f"/v2/models/{name}/ready")[0] == 200
    assert over_http(port, "GET", f"/v2/models/{name}/versions/1/ready")[0] == 501


def test_weights_that_its_server_does_not_hold(server, backend):
    torch.manual_seed(77)
    other = torch.nn.Linear(24, 16)
    layer = CloudNPULinear.from_linear(other, cloud_backend=backend, fallback_local=False)
    for _ in range(4):
        with pytest.raises(RefusedError, match=f"nor a model apt-linear-{version_of(other)}"):
            layer(torch.randn(2, 24))
    assert backend.client.endpoints[0].breaker.state == "closed"
