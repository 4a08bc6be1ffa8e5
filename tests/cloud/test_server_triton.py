"""Another's client of the same protocol, NVIDIA's, drives the server: FP32, FP16, BF16 and JSON."""

import importlib.util
import subprocess
import sys

import pytest
from served import linear_file, running

CLIENT = """
import sys
import ml_dtypes
import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient(f"127.0.0.1:{sys.argv[1]}")
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("model")
assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
about = client.get_model_metadata("model")
assert about["inputs"][0]["shape"] == [-1, 16], about
version = about["versions"][0]
kinds = {"FP32": np.float32, "FP16": np.float16, "BF16": ml_dtypes.bfloat16}
base = np.arange(48, dtype=np.float32).reshape(3, 16) / 16
for name, kind in kinds.items():
    x = triton.InferInput("x", [3, 16], name)
    x.set_data_from_numpy(base.astype(kind))
    for wanted in (None, [triton.InferRequestedOutput("y", binary_data=True)]):
        got = client.infer("model", [x], model_version=version, outputs=wanted, request_id="1")
        y = got.as_numpy("y").astype(np.float32)
        assert y.shape == (3, 24)
        print(name, *y.ravel()[:4])
plain = triton.InferInput("x", [3, 16], "FP32")
plain.set_data_from_numpy(base, binary_data=False)
got = client.infer("model", [plain], outputs=[triton.InferRequestedOutput("y", binary_data=False)])
print("JSON", *got.as_numpy("y").ravel()[:4])
try:
    client.infer("model", [x], model_version="0" * 16)
except triton.InferenceServerException as error:
    print("refused", error.status(), error.message())
"""


@pytest.mark.skipif(importlib.util.find_spec("tritonclient") is None, reason="tritonclient[http] is not installed")
def test_tritonclient(tmp_path):
    import torch
    import torch.nn.functional as F

    tensors = linear_file(tmp_path / "a.safetensors")
    with running("--weights", tmp_path / "a.safetensors") as (_, port):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CLIENT, str(port)], capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["FP32", "FP32", "FP16", "FP16", "BF16", "BF16", "JSON", "refused"]
    base = torch.arange(48).view(3, 16) / 16
    kinds = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16, "JSON": torch.float32}
    for name, *numbers in lines[:-1]:
        y = F.linear(base.to(kinds[name]).float(), **tensors).to(kinds[name]).float()
        torch.testing.assert_close(torch.tensor([float(each) for each in numbers]), y.ravel()[:4])
    assert lines[-1][1] == "404"
