"""A trace read back with Perfetto's own classes: every block once a pass, slices in order, bytes those of `stats`."""

import copy
import errno
import logging
import sys
import threading
from collections import Counter

import pytest
import torch
from perfetto_traces import arrived, follow_each_other, read
from torch import nn

from apt_model.core.errors import InputError, MissingExtraError, StorageError
from apt_model.optimization import VGPUStack
from apt_model.vgpu.places import Stage
from apt_model.vgpu.recorder import Slice, edges, in_turn

WIDTH, DEPTH = 64, 8
X = torch.ones(2, WIDTH)
ROOM = 20480 / 1e6  # MB that a block takes
LAYOUTS = {
    "host": [(5, "cpu"), (20, "cpu")],
    "disk": [(4, "cpu"), (4, "cpu"), (20, "ssd")],
    "no host": [(4, "cpu"), (20, "ssd")],
    "resident": [(20, "cpu")],
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(WIDTH, WIDTH), nn.ReLU()

    def forward(self, x):
        return self.act(self.linear(x))


def tower(depth=DEPTH):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(depth))).eval()


def stack_of(layout):
    levels = [{"capacity_mb": blocks * ROOM, "device": kind} for blocks, kind in LAYOUTS[layout]]
    return VGPUStack({"levels": levels})


def run(model, passes=1):
    with torch.no_grad():
        for _ in range(passes):
            model(X)


def bytes_in(stack):
    return [level["bytes_in"] for level in stack.stats()["levels"]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_block_runs_once_a_pass_and_what_comes_is_what_stats_count(layout, tmp_path):
    model, passes = tower(), 4
    path = tmp_path / "x.pftrace"
    with stack_of(layout) as stack:
        stack.attach(model)
        run(model, 2)
        for attached in stack._models.values():
            if attached.streaming is not None:
                for each in (*attached.places._stages, *attached.places.all):  # of reads only whole ones are shown
                    attached.places._settle(each.read if isinstance(each, Stage) else each.pending)
        before = bytes_in(stack)
        with stack.trace(path):
            run(model, passes)
            stack.detach(model)  # until what was under way is there
        moved = [now - then for now, then in zip(bytes_in(stack), before, strict=True)]
        slices, counters = read(path)
        assert arrived(slices, stack) == moved
        blocks = slices["blocks run"]
        assert [each.name for each in blocks] == [str(i) for i in range(DEPTH)] * passes
        assert all(follow_each_other(lane) for lane in slices.values())
        assert all(
            each.name in map(str, range(DEPTH)) for name in slices if "to level" in name for each in slices[name]
        )
        for number, level in enumerate(stack.levels, 1):
            values = counters[f"level {number} ({level.config.device}): bytes held"]
            assert values[-1] == level.used == 0
            assert max(values) <= level.capacity
            assert values[0] > 0


def test_what_comes_to_level_1_comes_before_its_block_runs(tmp_path):
    model = tower()
    with stack_of("host") as stack:
        stack.attach(model)
        with stack.trace(tmp_path / "x.pftrace"):
            run(model, 3)
        slices, _ = read(tmp_path / "x.pftrace")
    came = Counter(each.name for each in slices["to level 1 (cpu)"])
    assert set(came.values()) == {3}
    assert len(came) == DEPTH - 2
    for name in came:  # they take turns
        ends = [(each.end, "came") for each in slices["to level 1 (cpu)"] if each.name == name]
        begins = [(each.begin, "ran") for each in slices["blocks run"] if each.name == name]
        told = [what for _, what in sorted(ends + begins)]
        assert told in (["came", "ran"] * 3, ["ran", "came"] * 3)
    for copy_ in slices["to level 1 (cpu)"]:  # which the caller makes here, and no block's time holds
        assert not any(each.begin < copy_.end and copy_.begin < each.end for each in slices["blocks run"])


def test_waits_for_the_disk_are_those_that_stats_count(tmp_path, monkeypatch):
    from apt_model.vgpu.disk_files import DirectFile

    def late(file, view, offset, own=DirectFile.read):
        threading.Event().wait(0.02)
        own(file, view, offset)

    monkeypatch.setattr(DirectFile, "read", late)
    model = tower()
    with stack_of("no host") as stack:
        stack.attach(model)
        before = stack.stats()["stall_ms"]
        with stack.trace(tmp_path / "x.pftrace"):
            run(model, 3)
        stalled = stack.stats()["stall_ms"] - before
        slices, _ = read(tmp_path / "x.pftrace")
    waits = slices["blocks wait"]
    assert waits
    shown = sum(each.end - each.begin for each in waits) / 1e6
    assert shown == pytest.approx(stalled, abs=0.02 * DEPTH * 3)  # those below 20 us are not shown
    assert {each.name for each in slices["the host waits"]} >= {f"disk: {each.name}" for each in waits}
    for wait in waits:  # a wait is no part of a block's time
        assert not any(run_.begin < wait.end and wait.begin < run_.end for run_ in slices["blocks run"])


def test_after_an_exception_what_was_recorded_is_written_and_blocks_are_shown_right_afterwards(tmp_path):
    model = tower()
    fails = model[5].act.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    path = tmp_path / "x.pftrace"
    with stack_of("host") as stack:
        stack.attach(model)
        with pytest.raises(KeyboardInterrupt), stack.trace(path):
            run(model)
        slices, _ = read(path)
        assert [each.name for each in slices["blocks run"]] == list("01234")
        with stack.trace(path):
            with pytest.raises(KeyboardInterrupt):
                run(model)
            fails.remove()
            run(model)
        slices, _ = read(path)
        assert [each.name for each in slices["blocks run"]] == [*"01234", *"01234567"]
        assert follow_each_other(slices["blocks run"])


def test_a_block_that_raises_is_shown(tmp_path):
    model = tower()
    model[3].act.register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("no")))
    with stack_of("host") as stack:
        stack.attach(model)
        with pytest.raises(ValueError, match="no"), stack.trace(tmp_path / "x.pftrace"):
            run(model)
    slices, _ = read(tmp_path / "x.pftrace")
    assert [each.name for each in slices["blocks run"]] == list("0123")


def test_models_that_come_and_go_and_copies_that_are_nobodys(tmp_path):
    first, second = tower(), tower(3)
    with stack_of("disk") as stack:
        with stack.trace(tmp_path / "x.pftrace"):
            stack.attach(first)
            run(first)
            copied = copy.deepcopy(first)
            stack.detach(first)
            run(first)
            run(copied)
            stack.attach(second)
            run(second)
        run(second)
        slices, counters = read(tmp_path / "x.pftrace")
    assert [each.name for each in slices["blocks run"]] == [*"01234567", *"012"]
    held = counters["level 1 (cpu): bytes held"]
    assert held[0] == 0
    assert len(held) == 4


def test_two_threads_have_a_lane_each(tmp_path):
    models = [tower(), tower()]
    levels = [{"capacity_mb": 10 * ROOM, "device": "cpu"}, {"capacity_mb": 40 * ROOM, "device": "cpu"}]
    with VGPUStack({"levels": levels, "slots": 2}) as stack:
        for model in models:
            stack.attach(model)
        together = threading.Barrier(2)

        def work(model):
            together.wait()
            run(model, 5)

        with stack.trace(tmp_path / "x.pftrace"):
            threads = [threading.Thread(target=work, args=(model,)) for model in models]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    slices, _ = read(tmp_path / "x.pftrace")
    for lane in ("blocks run", "blocks run (thread 2)"):
        assert [each.name for each in slices[lane]] == [*"01234567"] * 5
        assert follow_each_other(slices[lane])


def test_a_block_within_a_block(tmp_path):
    model = tower(2)
    inner = model[1]
    model[0].forward = lambda x: inner(x) + model[0].linear(x)
    with stack_of("resident") as stack:
        stack.attach(model)
        with stack.trace(tmp_path / "x.pftrace"):
            model[0](X)
    slices, _ = read(tmp_path / "x.pftrace")
    assert [(each.name, each.depth) for each in slices["blocks run"]] == [("1", 1), ("0", 0)]


def test_nothing_is_left_of_a_trace(tmp_path):
    model = tower()
    with stack_of("disk") as stack:
        stack.attach(model)

        def hooks():
            return [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()]

        before = hooks()
        with stack.trace(str(tmp_path / "x.pftrace")):
            assert hooks() != before
        assert hooks() == before
        assert stack._memory.clock.waits is None
        assert all(level.came.watch is None and level.watch is None for level in stack.levels)
        assert [each.name for each in tmp_path.iterdir()] == ["x.pftrace"]


def test_a_stack_that_is_closed_within(tmp_path):
    model = tower()
    stack = stack_of("disk")
    stack.attach(model)
    with stack.trace(tmp_path / "x.pftrace"):
        run(model)
        stack.close()
    slices, _ = read(tmp_path / "x.pftrace")
    assert len(slices["blocks run"]) == DEPTH


def test_what_cannot_be_traced(tmp_path, monkeypatch):
    with stack_of("host") as stack:
        with pytest.raises(InputError, match=r"gone is no folder"), stack.trace(tmp_path / "gone" / "x.pftrace"):
            pytest.fail("it began")
        with pytest.raises(InputError, match="is a folder"), stack.trace(tmp_path):
            pytest.fail("it began")
        again = pytest.raises(InputError, match="already")
        with stack.trace(tmp_path / "x.pftrace"), again, stack.trace(tmp_path / "y.pftrace"):
            pytest.fail("it began")
        assert [each.name for each in tmp_path.iterdir()] == ["x.pftrace"]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "perfetto.trace_builder.proto_builder", None)
            with pytest.raises(MissingExtraError, match=r"apt-transformer\[trace\]"), stack.trace(tmp_path / "z"):
                pytest.fail("it began")
        with stack.trace(tmp_path / "x.pftrace"):  # and none of these is in the way of another
            pass
    with pytest.raises(InputError, match="closed"), stack.trace(tmp_path / "x.pftrace"):
        pytest.fail("it began")


def test_a_disk_that_is_full_at_the_end(tmp_path, monkeypatch, caplog):
    from apt_model.vgpu import trace

    def full(_path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trace, "atomic_file", full)
    with stack_of("host") as stack:
        with pytest.raises(StorageError, match="No space left"), stack.trace(tmp_path / "x.pftrace"):
            pass
        with caplog.at_level(logging.WARNING), pytest.raises(ZeroDivisionError), stack.trace(tmp_path / "x.pftrace"):
            _ = 1 / 0
        assert "No space left" in caplog.text
        assert list(tmp_path.iterdir()) == []


def test_a_compiled_model_shows_the_blocks_that_are_streamed(tmp_path):
    model = tower()
    with stack_of("host") as stack:
        stack.attach(model)
        compiled = torch.compile(model, backend="eager")
        run(compiled, 2)
        with stack.trace(tmp_path / "x.pftrace"):
            run(compiled)
    slices, _ = read(tmp_path / "x.pftrace")
    shown = [each.name for each in slices["blocks run"]]
    assert len(shown) == len(set(shown)) >= DEPTH - 2


def test_arrivals_side_by_side_follow_each_other_and_lose_no_byte():
    queue = [Slice(0, 10, "a", {"bytes": 1}), Slice(1, 30, "b", {"bytes": 2}), Slice(40, 50, "c", {"bytes": 4})]
    assert in_turn([queue[1], queue[0], queue[2]]) == [
        Slice(0, 10, "a", {"bytes": 1}),
        Slice(10, 30, "b", {"bytes": 2, "queued_ns": 9}),
        Slice(40, 50, "c", {"bytes": 4}),
    ]


def test_slices_nest_and_those_that_cross_are_cut():
    given = [Slice(5, 20, "late", {}), Slice(0, 4, "in", {}), Slice(0, 10, "outer", {}), Slice(20, 20, "none", {})]
    assert [(each.at_ns, each.name) for each in edges(given)] == [
        (0, "outer"), (0, "in"), (4, None), (5, "late"), (10, None), (10, None), (20, "none"), (20, None),
    ]  # fmt: skip
