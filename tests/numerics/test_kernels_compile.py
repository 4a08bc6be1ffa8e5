"""Every kernel compiles, without a GPU, for the GPUs that this project is written for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942"])
def test_every_kernel_compiles(target, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    some = [] if target == "cuda:90" else ["--some"]  # all of the GPUs that the kernels were tuned on
    done = subprocess.run(
        [sys.executable, SCRIPT, target, *some], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("step_kernel", "quantize_kernel", "unpack_kernel"))
    assert ("decode_kernel" in done.stdout) == target.startswith("cuda")
    assert ("rows_kernel" in done.stdout) == (target in ("cuda:90", "cuda:100", "cuda:120"))
    assert ("tile_kernel" in done.stdout) == (target == "cuda:90")
