"""The clock's run: what it moves is what a stack moves, and its times are those of the bound."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apt_model.optimization import VGPUStack
from apt_model.vgpu.planner import DISK
from apt_model.vgpu.steady import Passes, run

SIZE, LINK, DEEP = 10**6, 10**9, 12
COPY = SIZE / LINK  # seconds


def passes(device_s, *, slots=3, count=DEEP, resident=(), **options):
    needs = [[] if i in resident else [i] for i in range(count)]
    given_ = {"host_s": [0.0] * count, "on_disk": [False] * count, "stages": 0, "link": LINK, "disk": LINK, **options}
    return Passes(needs=needs, device_s=[device_s] * count, nbytes=[SIZE] * count, slots=slots, **given_)


def test_few_tokens_wait_for_the_link_alone():
    said = run(passes(COPY / 10))
    assert said.pass_s == pytest.approx(DEEP * COPY)
    assert said.link_s == pytest.approx(DEEP * COPY)
    assert said.disk_s == 0


def test_many_tokens_wait_for_compute_alone():
    assert run(passes(COPY * 3)).pass_s == pytest.approx(DEEP * COPY * 3)


def test_what_stays_is_not_copied():
    said = run(passes(COPY / 10, resident=range(0, DEEP, 2)))
    assert said.link_s == pytest.approx(DEEP / 2 * COPY)
    assert said.pass_s == pytest.approx(DEEP / 2 * COPY, rel=0.05)


def test_residents_in_front_leave_the_link_idle():
    spread, prefix = (run(passes(COPY / 2, slots=2, resident=which)).pass_s
                      for which in (range(0, DEEP, 2), range(DEEP // 2)))  # fmt: skip
    assert prefix > 1.2 * spread


def test_as_many_slots_as_blobs_copy_nothing():
    assert run(passes(COPY, slots=DEEP)).link_s == 0


def test_one_slot_takes_turns():
    assert run(passes(COPY, slots=1)).pass_s == pytest.approx(2 * DEEP * COPY, rel=0.1)


def test_a_cpu_takes_turns():
    assert run(passes(COPY, serial=True)).pass_s == pytest.approx(2 * DEEP * COPY)


def test_the_host_bounds_what_is_small():
    said = run(passes(COPY / 100, host_s=[COPY * 2] * DEEP, hook_s=COPY))
    assert said.pass_s == pytest.approx(3 * DEEP * COPY)


@pytest.mark.parametrize("stages", [0, 1, 3])
@pytest.mark.parametrize("serial", [False, True])
def test_a_disk_that_is_slower_than_all_else_is_what_a_pass_takes(stages, serial):
    said = run(passes(COPY / 20, on_disk=[True] * DEEP, stages=stages, disk=LINK / 10, serial=serial))
    # With one stage one place is enough, and another keeps what it has.
    assert said.disk_s == pytest.approx((DEEP - (stages == 1)) * COPY * 10)
    between = 1.25 if stages == 1 else 1.12  # one stage is read and copied in turns
    assert said.disk_s * 0.999 <= said.pass_s <= said.disk_s * between
    assert said.link_s == (0 if stages == 0 else pytest.approx(said.disk_s / 10))


@given(
    device=st.floats(0, 3), host=st.floats(0, 2), slots=st.integers(1, 6), stages=st.integers(0, 3),
    on_disk=st.lists(st.booleans(), min_size=DEEP, max_size=DEEP), serial=st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_no_pass_is_faster_than_any_part_of_it_nor_slower_than_all(*, device, host, slots, stages, on_disk, serial):
    hosts = [host * COPY] * DEEP
    said = run(passes(device * COPY, slots=slots, host_s=hosts, on_disk=on_disk, stages=stages, serial=serial))
    parts = [said.link_s, said.disk_s, DEEP * device * COPY, DEEP * host * COPY]
    # Copies that are under way when a pass ends are of the one and of the other.
    assert said.pass_s >= max(parts) - slots * COPY / 3
    assert said.pass_s <= sum(parts) * 1.001 + COPY


class Tied(nn.Module):
    """Blocks of several sizes; the last one's weight is the first one's too."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64, bias=i % 3 == 0) for i in range(9))
        self.blocks[8].weight = self.blocks[0].weight

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("below", [(9,), (0.3, 9), (None, 9)])
@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("share", [0.45, 0.6, 0.8])
@pytest.mark.usefixtures("quiet_vgpu")
def test_it_moves_what_a_stack_moves(share, slots, below):
    model = Tied().eval()
    size = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    kinds = ["cpu", "ssd"] if len(below) == 2 else ["cpu"]
    levels = [{"capacity_mb": share * size, "device": "cpu"}]
    levels += [{"capacity_mb": room * size, "device": kind} for kind, room in zip(kinds, below, strict=True) if room]
    with VGPUStack({"levels": levels, "slots": slots}) as stack, torch.no_grad():
        if stack._memory.store is not None:
            read_at_once(stack._memory.store)
        layout = stack._layout(model)
        stack.attach(model)
        for _ in range(3):
            model(torch.ones(1, 64))
        before = stack.stats()["levels"][0]["bytes_in"]
        for _ in range(3):
            model(torch.ones(1, 64))
        moved = (stack.stats()["levels"][0]["bytes_in"] - before) / 3
    assert moved == pytest.approx(_moved_bytes(layout, 1e6 * LINK))
    assert moved > 0


def read_at_once(store):
    """What stages hold at the right time does not depend on when threads run then."""
    begin = store.read_async

    def now(*args, **options):
        handle = begin(*args, **options)
        handle.wait()
        return handle

    store.read_async = now


def _moved_bytes(layout, disk):
    streamed, on_disk = set(layout.streamed), [home == DISK for home in layout.plan.homes]
    said = run(
        Passes(
            needs=[[blob for blob in need if blob in streamed] for need in layout.needs],
            device_s=[1e-4] * len(layout.needs), host_s=[0.0] * len(layout.needs),
            nbytes=[blob.nbytes for blob in layout.blobs], on_disk=on_disk, slots=layout.plan.slots,
            stages=layout.plan.staging, link=LINK, disk=disk, serial=True,
        )
    )  # fmt: skip
    return said.link_s * LINK if layout.plan.staging or not any(on_disk) else said.disk_s * disk
