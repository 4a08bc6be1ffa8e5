import pytest
import torch

from apt_model.core.errors import DeviceError
from apt_model.core.system.cuda import CudaDevice
from apt_model.vgpu import arena as home
from apt_model.vgpu.arena import DevicePin, HostArena

MIB = 2**20
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def arena(monkeypatch):
    monkeypatch.setattr(home, "_SEGMENT", 32 * MIB)
    made = HostArena(256 * MIB, pin=DevicePin(CudaDevice()))
    yield made
    torch.cuda.synchronize()
    made.close()


def test_regions_are_pinned_until_the_arena_is_closed(arena):
    regions = [arena.take(20 * MIB + 5) for _ in range(3)]
    assert all(region.pinned and region.tensor.is_pinned() for region in regions)
    assert arena.pinned_bytes == arena.committed == 96 * MIB
    arena.close()
    assert not any(region.pinned or region.tensor.is_pinned() for region in regions)
    regions[0].tensor.fill_(1)


def test_joined_segments_are_pinned_as_one(arena):
    for region in [arena.take(32 * MIB) for _ in range(8)]:
        arena.give(region)
    whole = arena.take(256 * MIB)
    assert whole.tensor.is_pinned()
    whole.tensor[:: 8 * MIB] = torch.arange(32, dtype=torch.uint8)
    assert torch.equal(whole.tensor.cuda(non_blocking=True)[:: 8 * MIB].cpu(), whole.tensor[:: 8 * MIB])


def test_copies_run_by_themselves_and_are_right(arena):
    source, target = arena.take(64 * MIB), arena.take(64 * MIB)
    source.tensor.copy_(torch.randint(256, (64 * MIB,), dtype=torch.uint8))
    target.tensor.zero_()
    device, busy = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda"), torch.randn(8192, 8192, device="cuda")
    device.copy_(source.tensor)  # what a first copy sets up
    device.zero_()
    torch.cuda.synchronize()
    for _ in range(20):
        busy = busy @ busy
    device.copy_(source.tensor, non_blocking=True)
    target.tensor.copy_(device, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    assert not done.query()  # the host did not wait
    done.synchronize()
    assert torch.equal(source.tensor, target.tensor)


def test_a_refusal_is_told_and_no_kernel_is_blamed_for_it(arena):
    region = arena.take(MIB)
    for refuse in (
        lambda: CudaDevice().register_host(region.address, MIB),  # it is pinned already
        lambda: CudaDevice().unregister_host(region.address + MIB),  # nothing begins there
    ):
        with pytest.raises(DeviceError, match="pinning"):
            refuse()
        assert torch.ones(3, device="cuda").add_(1).sum().item() == 6
    assert region.tensor.is_pinned()
