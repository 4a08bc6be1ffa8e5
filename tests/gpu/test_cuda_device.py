import os

import pytest
import torch

import apt_model.optimization.vb_global as vb
from apt_model.core.errors import DeviceError
from apt_model.core.system import get_device, get_device_manager
from apt_model.optimization import banner

MIB = 2**20
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _disabled(monkeypatch):
    monkeypatch.delenv("APT_DEVICE", raising=False)
    vb.disable()
    yield
    vb.disable()


def test_it_is_found_and_one_too_many_is_not():
    assert get_device() == torch.device("cuda")
    assert get_device_manager().get_accelerator_type() == "cuda"
    count = torch.cuda.device_count()
    assert get_device(f"cuda:{count - 1}").index == count - 1
    with pytest.raises(DeviceError, match="there is no such number here"):
        get_device(f"cuda:{count}")


@pytest.mark.skipif(
    int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1,
    reason="needs the GPU's memory to itself: run this file without -n",
)
@pytest.mark.parametrize("spec", ["auto", "cuda:0"])
def test_memory_is_what_torch_and_the_driver_say(spec):
    device = get_device_manager(spec)
    device.empty_cache()
    device.reset_peak_memory()
    before, free, reserved = device.memory_allocated(), device.free_memory(), torch.cuda.memory_reserved()
    held = torch.empty(256 * MIB, dtype=torch.uint8, device=device.device)
    assert device.memory_allocated() - before == held.nbytes
    assert free - device.free_memory() == pytest.approx(held.nbytes, rel=0.1)
    del held
    # What the allocator keeps counts as free, before and after it is given back.
    assert device.free_memory() == pytest.approx(free, abs=32 * MIB)
    assert torch.cuda.memory_reserved() >= reserved + 256 * MIB
    device.empty_cache()
    assert torch.cuda.memory_reserved() == reserved
    assert device.free_memory() == pytest.approx(free, abs=32 * MIB)
    assert device.peak_memory() >= before + 256 * MIB
    device.reset_peak_memory()
    assert device.peak_memory() == device.memory_allocated()
    assert device.free_memory() < device.total_memory()


def test_synchronize_waits():
    device = get_device_manager()
    work = torch.randn(4096, 4096, device=device.device)
    done = torch.cuda.Event()
    for _ in range(50):
        work = work @ work
    done.record()
    device.synchronize()
    assert done.query()


def test_seeding_repeats_what_is_drawn_on_the_device():
    device = get_device_manager()
    device.manual_seed(3)
    first = torch.rand(4, device=device.device)
    device.manual_seed(3)
    assert torch.equal(torch.rand(4, device=device.device), first)


def test_bf16_as_torch_sees_it():
    assert get_device_manager().supports_bf16() == torch.cuda.is_bf16_supported(including_emulation=False)


def test_the_banner_speaks_of_the_gpu(capfd):
    vb.enable(verbose=True)
    text = capfd.readouterr().err
    properties = torch.cuda.get_device_properties(0)
    assert f"cuda: {properties.name}, {banner.gibibytes(properties.total_memory)} memory" in text
    assert "kernels switched on: cudnn, flash, math, memory-efficient" in text
    assert "no accelerator" not in text
