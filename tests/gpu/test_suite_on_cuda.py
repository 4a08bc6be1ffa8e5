"""The suite of `tests/devices/test_suite.py`, as it is, on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_suite_passes(tmp_path):
    # It is a run of its own, whatever runs this one: pytest-xdist's settings are not for it.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/devices/test_suite.py"]
    done = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'suite'}"],
        cwd=ROOT, env={**inherited, "APT_SUITE_DEVICE": "cuda"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
