"""FSDP2 shards a model in 4 bits over two processes, and nobody can tell from the numbers: `sharded_run.py` looks."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
LIMIT_S = 60
LOOPBACK = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)

pytestmark = [
    pytest.mark.skipif(LOOPBACK is None, reason="gloo is told of its loopback on Linux and macOS"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed"),
]


@pytest.mark.parametrize("checks", ["training", "state reading", "mixed_precision order"])
def test_two_processes(checks, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE.parents[1]),
        "GLOO_SOCKET_IFNAME": LOOPBACK,
    }
    script = str(HERE / "sharded_run.py")
    said = [tmp_path / f"process-{rank}.txt" for rank in (0, 1)]
    processes = []
    try:
        for rank, path in enumerate(said):
            with path.open("wb") as file:
                command = [sys.executable, script, str(rank), str(tmp_path), *checks.split()]
                processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end and any(each.poll() is None for each in processes):
            time.sleep(0.05)
        codes = [each.poll() for each in processes]  # None: it did not end
    finally:
        for each in processes:
            each.kill()
            each.wait()
    assert codes == [0, 0], "\n".join(
        [f"exit codes {codes}", *(f"--- {path.stem}\n{path.read_text(errors='replace')}" for path in said)]
    )
