"""What a direct launch passes to the driver is what Triton's launcher would pass, for every kernel; no GPU needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")
SCRIPT = Path(__file__).with_name("direct_launches.py")


def test_both_pass_the_same(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *cases, last = done.stdout.splitlines()
    assert last.startswith("the same, with Triton")
    assert [sum(line.startswith(kind) for line in cases) for kind in ("Decode", "Tile", "Packed", "Shuffled")] == [
        5, 6, 4, 5,
    ]  # fmt: skip
