"""What is predicted for a GPU: its rates, probes that keep within the levels, and a pass bound by the link."""

import statistics
import time

import pytest
import torch
from torch import nn

from apt_model.core.system import get_device_manager
from apt_model.optimization import VGPUStack
from apt_model.vgpu import machine, rates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDE, DEEP = 4096, 12


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("APT_PLAN_CACHE", str(tmp_path / "cache"))


def test_rates_are_those_of_a_gpu(tmp_path):
    begin = time.perf_counter()
    found = machine.measure(get_device_manager("cuda:0"), ["BF16"])
    print(f"measured in {time.perf_counter() - begin:.1f} s: {found}")
    assert found.kind == "gpu"
    assert torch.cuda.get_device_name() in found.device
    rows, tflops = zip(*found.products["BF16"], strict=True)
    assert rows[0] == 1
    assert tflops[-1] > 10 * tflops[0]
    assert found.fp4_products[0][0] == 1
    assert None not in (found.link_gbps, found.disk_gbps, found.memory_gbps, found.attention_tflops, found.launch_s)
    assert found.memory_gbps > found.link_gbps
    assert rates.read(rates.keep(found, tmp_path / "rates.json")) == found


def test_probes_of_a_plan_keep_within_the_levels():
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    levels = [{"capacity_mb": 5, "device": "cuda:0"}, {"capacity_mb": 40, "device": "cpu"}]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with VGPUStack({"levels": levels}) as stack:
        said = stack.plan(model, 4)
        assert said.pass_s > 0
        held = torch.cuda.max_memory_allocated() - before
        workspace = 64 << 20  # of cuBLAS, which no level has
        assert held <= 5e6 + workspace
        assert [level["used_mb"] for level in stack.stats()["levels"]] == [0, 0]
        for level in stack.stats()["levels"]:
            assert level["peak_mb"] <= level["capacity_mb"]


def test_a_pass_is_bound_by_what_is_said():
    """Counts decide: that the link is the bound, and that the bytes are those; the time is printed."""
    model = nn.Sequential(*(nn.Linear(WIDE, WIDE, bias=False) for _ in range(DEEP))).bfloat16()
    size = sum(parameter.nbytes for parameter in model.parameters())
    levels = [{"capacity_mb": 0.5 * size / 1e6, "device": "cuda:0"}, {"capacity_mb": 2 * size / 1e6, "device": "cpu"}]
    x = torch.randn(1, WIDE, device="cuda", dtype=torch.bfloat16)
    with VGPUStack({"levels": levels}) as stack, torch.no_grad():
        said = stack.plan(model, 1)
        assert said.bound == "link"
        assert said.pass_s >= said.link_s * 0.999
        stack.attach(model)
        times = []
        for _ in range(6):
            begin = time.perf_counter()
            model(x)
            torch.cuda.current_stream().synchronize()
            times.append(time.perf_counter() - begin)
        before = stack.stats()["levels"][0]["bytes_in"]
        for _ in range(4):
            model(x)
        moved = (stack.stats()["levels"][0]["bytes_in"] - before) / 4
        assert moved == pytest.approx(said.streamed_mb * 1e6, rel=0.02)
        print(f"said {said.pass_s:.5f} s, took {statistics.median(times[2:]):.5f} s")
