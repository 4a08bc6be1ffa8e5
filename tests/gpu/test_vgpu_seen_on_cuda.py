"""What is counted, timed and traced of a model that is streamed to a GPU."""

import itertools
import time

import pytest
import torch
from perfetto_traces import arrived, follow_each_other, read
from torch import nn

from apt_model.optimization import VGPUStack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDTH, DEPTH = 1024, 8
BLOCK = WIDTH * WIDTH * 4 + WIDTH * 4
ROOM = (WIDTH * WIDTH * 4 + 4096) / 1e6  # MB that a block takes
HOST = [{"capacity_mb": 40 * ROOM, "device": "cpu"}]
DISK = [{"capacity_mb": 4 * ROOM, "device": "cpu"}, {"capacity_mb": 40 * ROOM, "device": "ssd"}]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(WIDTH, WIDTH), nn.ReLU()

    def forward(self, x):
        return self.act(self.linear(x))


def tower():
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(DEPTH))).eval()


def stack_of(below):
    return VGPUStack({"levels": [{"capacity_mb": 5 * ROOM, "device": "cuda:0"}, *below]})


def run(model, passes):
    x = torch.ones(256, WIDTH, device="cuda")
    with torch.no_grad():
        for _ in range(passes):
            model(x)


def bytes_in(stack):
    return [level["bytes_in"] for level in stack.stats()["levels"]]


def test_every_copy_is_counted_at_once_and_timed_when_it_is_past():
    model, passes = tower(), 6
    with stack_of(HOST) as stack:
        stack.attach(model)
        torch.cuda.synchronize()
        stack.stats()
        came, before = stack.levels[0].came, bytes_in(stack)[0]
        timed, seconds = came._arrived, came.seconds
        begin = time.perf_counter()
        run(model, passes)
        streamed = (DEPTH - 2) * BLOCK  # five blocks have room: three slots, and two residents
        assert bytes_in(stack)[0] - before == passes * streamed
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
        stats = stack.stats()
        assert came._arrived - timed == passes * streamed
        assert 0 < came.seconds - seconds <= wall
        assert stats["levels"][0]["gbps"] == pytest.approx(came._arrived / came.seconds / 1e9)
        assert stats["levels"][0]["hits"] + stats["levels"][0]["misses"] == passes * (DEPTH - 2)
        assert 0 <= stats["stall_ms"] <= wall * 1e3
        assert stats["levels"][1]["bytes_out"] == bytes_in(stack)[0] - 2 * BLOCK


@pytest.mark.parametrize("below", [HOST, DISK], ids=["host", "disk"])
def test_a_trace(below, tmp_path):
    model, passes, path = tower(), 4, tmp_path / "x.pftrace"
    with stack_of(below) as stack:
        stack.attach(model)
        run(model, 2)
        torch.cuda.synchronize()
        before, began = bytes_in(stack), time.perf_counter_ns()
        with stack.trace(path):
            run(model, passes)
        ended, after = time.perf_counter_ns(), bytes_in(stack)
        slices, counters = read(path)
        shown = arrived(slices, stack)
        assert shown[0] == after[0] - before[0] > 0
        ahead = 3 * BLOCK if below is DISK else 0  # reads under way at either end
        assert abs(shown[1] - (after[1] - before[1])) <= ahead
    blocks = slices["blocks run"]
    assert [each.name for each in blocks] == [str(i) for i in range(DEPTH)] * passes
    assert all(follow_each_other(lane) for lane in slices.values())
    edges = [at for lane in slices.values() for each in lane for at in (each.begin, each.end)]
    assert began <= min(edges)
    assert max(edges) <= ended + 1_000_000  # by the host's clock, to a millisecond
    assert counters["level 1 (cuda:0): bytes held"][-1] <= 5 * ROOM * 1e6
    copies = slices["to level 1 (cuda:0)"]
    for name in {each.name for each in copies}:  # a block is there before it runs, and stays until it has run
        told = sorted(
            [(each.end, "came") for each in copies if each.name == name]
            + [(each.begin, "ran") for each in blocks if each.name == name]
        )
        assert all(a != b for (_, a), (_, b) in itertools.pairwise(told))


def test_outputs_and_gradients_while_traced(tmp_path):
    model, path = tower(), tmp_path / "x.pftrace"
    x = torch.randn(4, WIDTH, device="cuda", requires_grad=True)
    dense = tower().cuda()
    dense(x).sum().backward()
    expected, x.grad = x.grad, None
    with stack_of(HOST) as stack:
        stack.attach(model)
        with stack.trace(path), stack.top():
            model(x).sum().backward()
        assert torch.equal(x.grad, expected)
    assert len(read(path)[0]["blocks run"]) == DEPTH
