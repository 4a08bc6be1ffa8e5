"""Our client on our server: uploads by content, forward, backward, both wires, blocks, and a wrong key."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clouds import CANARY, bearer, counts, reference
from served import application

from apt_model.cloud.backend import OIPBackend
from apt_model.cloud.remote_block import RemoteBlock
from apt_model.cloud.server.key import Key
from apt_model.cloud.transport import InProcess
from apt_model.optimization import CloudNPULinear

ROOT = Path(__file__).parents[2]
KEY = CANARY * 2


@pytest.fixture
def backend(tmp_path):
    transport = InProcess(application(tmp_path, store=True, key=Key(KEY)), auth=bearer(KEY))
    made = OIPBackend([transport])
    yield made
    made.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("wire", ["exact", "int8g64"])
def test_a_layer(backend, dtype, wire):
    layer = CloudNPULinear(100, 70, cloud_backend=backend, fallback_local=False, wire=wire, dtype=dtype)
    x = torch.randn(5, 3, 100, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.float().square().sum().backward()
    error = (y.detach() - reference(layer, x)).float().norm() / y.detach().float().norm()
    assert float(error) <= (1e-6 if wire == "exact" else 0.02)
    assert counts(layer) == (1, 0, 0)
    stats = layer.get_stats()
    assert (stats["backward_cloud"], stats["retries"]) == (1, 0)
    assert CloudNPULinear.from_linear(layer, cloud_backend=backend).push_weights() == 0


def test_a_block(backend):
    up, down = torch.nn.Linear(8, 20), torch.nn.Linear(20, 8)
    tensors = {f"{name}.{key}": value for name, layer in (("up", up), ("down", down)) for key, value in
               layer.state_dict().items()}  # fmt: skip
    block = RemoteBlock("mlp", {"activation": "gelu"}, tensors, cloud_backend=backend)
    x = torch.randn(4, 8, requires_grad=True)
    y = block(x)
    y.sum().backward()
    found, x.grad = x.grad, None
    local = down(torch.nn.functional.gelu(up(x)))
    local.sum().backward()
    torch.testing.assert_close(y, local)
    torch.testing.assert_close(found, x.grad)


def test_a_wrong_key(tmp_path):
    transport = InProcess(application(tmp_path, store=True, key=Key(KEY)), auth=bearer("x" * 32))
    backend = OIPBackend([transport])
    assert "answers 401" in backend.health().why
    backend.close()


def test_the_script_of_the_mission_runs_alone():
    done = subprocess.run(
        [sys.executable, "training/test_cloud_npu.py"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All checks hold." in done.stdout
