"""The suite of `test_suite.py`, as it is, on the device that tests build, under the names of two vendors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "backend"))

import built_device  # noqa: E402


def environment_of(kind):
    try:
        return built_device.environment(kind, APT_SUITE_DEVICE=kind)
    except built_device.NoCompilerError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", ["npu", "hpu"])
def test_the_suite_passes(kind, tmp_path):
    environment = environment_of(kind)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "tests/devices/test_suite.py",
    ]
    done = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'suite'}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


@pytest.mark.parametrize("kind", ["cpu", "npu"])
def test_the_script_that_shows_a_device(kind):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if kind == "cpu" else environment_of(kind)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "training/test_npu_integration.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"on {kind}. All checks hold." in done.stdout
