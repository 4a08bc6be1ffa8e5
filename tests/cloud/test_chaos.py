"""Forwards while a server refuses, hangs, truncates, flips bits and forgets: every answer right, every count exact."""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from clouds import counts, reference

from apt_model.cloud.backend import OIPBackend
from apt_model.cloud.breaker import Breaker
from apt_model.cloud.client import Client, Retry
from apt_model.cloud.fake import FakeServer, seeded_faults
from apt_model.cloud.fake_http import serving
from apt_model.cloud.http_transport import HttpTransport
from apt_model.optimization import CloudNPULinear

FORWARDS, THREADS = 240, 4
ROOT = Path(__file__).parents[2]


def eager():
    """A breaker that comes back at once, so that faults keep coming."""
    return Breaker(first=0.02, longest=0.05)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("wire", ["exact", "int8g64"])
def test_nothing_is_lost(seed, wire, caplog):
    caplog.set_level(logging.ERROR, "apt_model.cloud")
    fake = FakeServer(fault=seeded_faults(seed, 0.25), max_inflight=3)
    with serving(fake) as served:
        transport = HttpTransport(served.url)
        client = Client([transport], retry=Retry(first=0.002, longest=0.01), breaker=eager)
        backend = OIPBackend([transport], client=client)
        layer = CloudNPULinear(64, 96, cloud_backend=backend, deadline_s=0.15, wire=wire)
        wrong, bound = [], 1e-5 if wire == "exact" else 0.2

        def work(number):
            for step in range(FORWARDS // THREADS):
                x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1000 * number + step))
                with torch.no_grad():
                    worst = float((layer(x) - reference(layer, x)).abs().max())
                if not worst < bound:
                    wrong.append((number, step, worst))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        cloud, local, raised = counts(layer)
        stats = layer.get_stats()
        backend.close()
        assert not wrong
        assert (cloud + local, raised) == (FORWARDS, 0)
        assert cloud > FORWARDS // 10
        assert stats["cloud_errors"] == local
        assert len(stats["errors"]) > 1
        assert transport.open_connections == 0


def test_a_replica_takes_over_when_a_server_is_killed():
    fakes = FakeServer(), FakeServer()
    with serving(fakes[0]) as first, serving(fakes[1]) as second:
        backend = OIPBackend([HttpTransport(first.url), HttpTransport(second.url)])
        layer = CloudNPULinear(8, 8, cloud_backend=backend, fallback_local=False)
        with torch.no_grad():
            for number in range(20):
                if number == 7:
                    first.close()
                x = torch.randn(2, 8)
                assert torch.allclose(layer(x), reference(layer, x), atol=1e-5)
        assert counts(layer) == (20, 0, 0)
        assert layer.get_stats()["breaker"] == ["open", "closed"]
        backend.close()


def test_the_long_runs_command_in_short(tmp_path):
    """Real servers, killed, stopped and started again; `benchmarks/cloud/chaos.py` runs it with 10 000 forwards."""
    done = subprocess.run(
        [sys.executable, "benchmarks/cloud/chaos.py", "--forwards", "150", "--kills", "0", "--seed", "3"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    one, replicas, threads = (json.loads(line) for line in done.stdout.splitlines())
    assert one["right"] == replicas["right"] == threads["right"] == 150
    assert one["bit_equal"] > 140
    assert one["kills"] > 0
    assert one["cloud_calls"] > 75
