"""The benchmark and the calibration on a GPU: right numbers, GPU time, shares that can be, nothing left behind."""

import dataclasses
import gc
import json
import subprocess
import sys
import time

import pytest
import torch

from apt_model.core.system import get_device_manager
from apt_model.core.system.timing import Stopwatch
from apt_model.optimization.bench import link
from apt_model.optimization.bench.run import bench, sizes_of
from apt_model.optimization.calibration import calibrate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_command_runs_on_a_gpu():
    args = [sys.executable, "-m", "apt_model", "bench", "--small", "--device", "cuda", "--format", "json"]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    values = json.loads(done.stdout)
    assert values["machine"]["device"]["name"] == torch.cuda.get_device_name()
    assert {row["status"] for row in values["rows"]} == {"measured"}
    assert {row["part"] for row in values["rows"]} == {"linear", "attention", "link", "disk"}


def test_everything_is_measured_and_nothing_beats_its_ceiling_by_much(tmp_path):
    device = get_device_manager("cuda:0")
    sizes = dataclasses.replace(sizes_of(device), shapes=((4096, 4096),), counts=(1, 4096), written=16 << 20)
    begin = time.perf_counter()
    report = bench(device, folder=tmp_path, sizes=sizes)
    print(f"{time.perf_counter() - begin:.1f} s: {report}")
    assert report.wrong == []
    assert all(row.status == "measured" for row in report.rows if row.what != "scores written out")
    # Copies and products are the ceilings themselves, in other sizes.
    assert all(0 < row.share < 1.25 for row in report.rows if row.share is not None and row.part != "disk")
    assert list(tmp_path.iterdir()) == []
    rates = {row.what: row.rate for row in report.rows if row.part == "link"}
    assert rates["host to device, pinned"] > rates["host to device, pageable"]


def test_gpu_time_leaves_the_host_out():
    """A tiny kernel's launch costs the host more than the GPU takes for it."""
    device = get_device_manager("cuda:0")
    watch, x = Stopwatch(device, 0.05), torch.zeros(64, device="cuda")
    with torch.inference_mode():
        assert 0 < watch.gpu([lambda: x.add_(1)]) < watch.wall(lambda: x.add_(1))


def test_memory_is_given_back():
    """After a first run, which leaves cuBLAS the workspaces of the streams that were used."""
    device = get_device_manager("cuda:0")
    held = []
    for _ in range(3):
        bench(device, small=True)
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[0]


def test_a_calibration_has_all_facts():
    found = calibrate(get_device_manager("cuda:0"), again=True)
    warm = calibrate(get_device_manager("cuda:0"), again=True)
    print(found, warm)
    assert dict(warm.why) == {}
    assert warm.link_gbps > 1
    assert link.NO_LINK not in found.why.values()
