"""Our client drives Seldon's MLServer, which has no binary tensors: JSON, negotiated by what its metadata says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clouds import connected, counts, reference
from peer import OPEN, free_ports, needs, python_of, serving
from served import over_http, request

from apt_model.cloud.tensors import Weights
from apt_model.core.errors import IntegrityError, RefusedError
from apt_model.optimization import CloudNPULinear

pytestmark = needs("mlserver")
WIDE, OUT = 24, 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RUNTIME = """
import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Linear(MLModel):
    async def load(self):
        held = np.load(self.settings.parameters.uri)
        self.weight, self.bias = held["weight"], held["bias"]
        return True

    async def predict(self, payload):
        x = self.decode(payload.inputs[0], default_codec=NumpyCodec)
        y = NumpyCodec.encode_output("y", x @ self.weight.T + self.bias)
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=[y])
"""


def linear(dtype, seed):
    torch.manual_seed(seed)
    return torch.nn.Linear(WIDE, OUT, dtype=dtype)


def version_of(layer):
    return Weights(kind="linear", config={}, tensors=layer.state_dict()).version


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """MLServer with a linear in each type, and one whose bias is not the one that its version stands for."""
    folder = tmp_path_factory.mktemp("mlserver")
    (folder / "linear_runtime.py").write_text(RUNTIME)
    for number, layer in enumerate([*(linear(dtype, 0) for dtype in DTYPES), linear(torch.float32, 9)]):
        place = folder / f"model{number}"
        place.mkdir()
        wrong = float(number == len(DTYPES))
        np.savez(
            place / "weights.npz", weight=layer.weight.detach().float(), bias=layer.bias.detach().float() + wrong
        )  # fmt: skip
        settings = {
            "name": "apt-linear", "implementation": "linear_runtime.Linear",
            "parameters": {"version": version_of(layer), "uri": str(place / "weights.npz")},
        }  # fmt: skip
        (place / "model-settings.json").write_text(json.dumps(settings))
    found, grpc = free_ports(2)
    settings = {"host": OPEN, "http_port": found, "grpc_port": grpc, "metrics_endpoint": None, "parallel_workers": 0}
    (folder / "settings.json").write_text(json.dumps(settings))
    with serving([python_of("mlserver").with_name("mlserver"), "start", folder], found, folder=folder):
        yield found


def test_it_refuses_binary_tensors_and_does_not_say_that_it_has_them(port):
    """The reason for JSON: where this fails, MLServer has learned the extension."""
    body, headers = request({"x": torch.zeros(2, WIDE)})
    path = f"/v2/models/apt-linear/versions/{version_of(linear(torch.float32, 0))}/infer"
    assert over_http(port, "POST", path, body, headers)[0] == 422
    assert json.loads(over_http(port, "GET", "/v2")[2])["extensions"] == []


def test_the_description_that_we_keep_is_the_one_that_it_ships():
    (shipped,) = (python_of("mlserver").parents[1] / "lib").glob("*/site-packages/mlserver/rest/openapi/dataplane.json")
    assert shipped.read_bytes() == (Path(__file__).parent / "peers" / "dataplane.json").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_forward(port, dtype):
    with connected(port) as backend:
        assert backend.health().ok
        assert "mlserver 1.7.1, in JSON" in backend.health().why
        layer = CloudNPULinear.from_linear(linear(dtype, 0), cloud_backend=backend, fallback_local=False)
        x = torch.randn(5, 3, WIDE, dtype=dtype)
        with torch.no_grad():
            y = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, reference(layer, x))
        assert counts(layer) == (1, 0, 0)
        assert layer.get_stats()["bytes_pushed"] == 0


def test_many_tokens_are_cut_by_what_their_numbers_take_in_json(port, monkeypatch):
    with connected(port) as backend:
        layer = CloudNPULinear.from_linear(linear(torch.float32, 0), cloud_backend=backend, fallback_local=False)
        monkeypatch.setattr(backend, "limits", lambda: (20_000, 20_000))
        asked = []
        send = backend.client.endpoints[0].transport.send
        monkeypatch.setattr(
            backend.client.endpoints[0].transport, "send",
            lambda each, **times: (asked.append(each), send(each, **times))[1],
        )  # fmt: skip
        x = torch.randn(50, WIDE)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), reference(layer, x))
        lengths = [each.length for each in asked if each.path.endswith("/infer")]
        assert len(lengths) == 3
        assert max(lengths) < 20_000


def test_a_gradient_is_computed_here(port):
    with connected(port) as backend:
        layer = CloudNPULinear.from_linear(linear(torch.float32, 0), cloud_backend=backend)
        x = torch.randn(4, WIDE, requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(4, WIDE))
        stats = layer.get_stats()
        assert (stats["cloud_calls"], stats["backward_cloud"], stats["backward_local"]) == (1, 0, 1)


def test_weights_that_it_does_not_hold_are_named_and_not_sent(port):
    with connected(port) as backend:
        other = linear(torch.float32, 1)
        strict = CloudNPULinear.from_linear(other, cloud_backend=backend, fallback_local=False)
        with pytest.raises(RefusedError, match=f"neither version {version_of(other)} of apt-linear"):
            strict(torch.randn(2, WIDE))
        layer = CloudNPULinear.from_linear(other, cloud_backend=backend)
        x = torch.randn(2, WIDE)
        torch.testing.assert_close(layer(x), reference(layer, x))
        assert counts(layer) == (0, 1, 0)
        assert layer.get_stats()["bytes_pushed"] == 0


def test_its_wrong_numbers_are_not_believed(port):
    with connected(port) as backend:
        layer = CloudNPULinear.from_linear(linear(torch.float32, 9), cloud_backend=backend, fallback_local=False)
        with pytest.raises(IntegrityError):
            layer(torch.randn(4, WIDE))


def test_a_wire_of_our_own_is_refused(port):
    with connected(port) as backend:
        layer = CloudNPULinear.from_linear(
            linear(torch.float32, 0), cloud_backend=backend, fallback_local=False, wire="int8g64"
        )
        with pytest.raises(RefusedError, match="not apt-model serve and does not know wire"):
            layer(torch.randn(4, WIDE))


def test_what_json_does_not_have_is_computed_here(port):
    with connected(port) as backend:
        layer = CloudNPULinear.from_linear(linear(torch.float32, 0), cloud_backend=backend)
        x = torch.randn(2, WIDE)
        x[0, 0] = torch.inf
        assert torch.equal(layer(x), reference(layer, x))
        assert counts(layer) == (0, 1, 0)
