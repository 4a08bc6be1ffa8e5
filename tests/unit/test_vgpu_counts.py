"""What a level is said to have taken and given is what passed there, byte for byte; rates are bytes over their time."""

import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from apt_model.core.errors import StorageError
from apt_model.optimization import VGPUStack
from apt_model.vgpu import traffic
from apt_model.vgpu.clock import Clock
from apt_model.vgpu.traffic import Span, Traffic

WIDTH, DEPTH = 64, 8
X = torch.ones(2, WIDTH)
BLOCK = WIDTH * WIDTH * 4 + WIDTH * 4
HOST, DISK = ["cpu", "cpu"], ["cpu", "cpu", "ssd"]


def tower():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(DEPTH))).eval()


def stack_of(kinds, *blocks):
    """A stack whose levels have room for so many blocks."""
    levels = [{"capacity_mb": count * 20480 / 1e6, "device": kind} for kind, count in zip(kinds, blocks, strict=True)]
    return VGPUStack({"levels": levels})


def counts(stack):
    return [(level["bytes_in"], level["bytes_out"]) for level in stack.stats()["levels"]]


def run(model, passes):
    with torch.no_grad():
        for _ in range(passes):
            model(X)


@pytest.mark.parametrize("passes", [1, 5])
def test_from_host_memory_every_pass_copies_what_is_streamed(passes):
    model = tower()
    with stack_of(HOST, 5, 20) as stack:
        stack.attach(model)
        streamed = DEPTH - 2  # three slots, and two residents
        at_first = counts(stack)
        assert at_first == [((2 + 3) * BLOCK, 0), (streamed * BLOCK, 3 * BLOCK)]  # three are on their way
        run(model, passes)
        moved = passes * streamed * BLOCK
        assert counts(stack) == [(at_first[0][0] + moved, 0), (streamed * BLOCK, 3 * BLOCK + moved)]
        stack.detach(model)  # which copies from each level what lives there
        assert counts(stack)[0] == (at_first[0][0] + moved, 2 * BLOCK)
        assert counts(stack)[1] == (streamed * BLOCK, (3 + streamed) * BLOCK + moved)


def test_from_disk_what_is_read_is_what_comes_to_the_host_and_what_is_copied_there_goes_to_level_1():
    model, passes = tower(), 5
    with stack_of(DISK, 3, 3, 20) as stack:
        stack.attach(model)
        run(model, passes)
        attached = stack._models[id(model)]
        assert set(attached.layout.plan.homes) == {2}
        attached.streaming.close()
        (first_in, first_out), (host_in, host_out), (disk_in, disk_out) = counts(stack)
        assert first_out == 0
        assert disk_in == DEPTH * BLOCK
        assert host_in == disk_out
        assert first_in == host_out
        # A slot whose next block is late keeps the one that it has, which may be found there again.
        assert passes * (DEPTH - 3) * BLOCK <= first_in <= (passes * DEPTH + 3) * BLOCK
        assert first_in <= host_in <= first_in + 3 * BLOCK  # what the stages have read ahead


def test_blocks_that_are_read_where_a_folder_has_them_are_counted_and_nothing_is_written(tmp_path):
    model, passes = tower(), 5
    with torch.no_grad():
        expected = model(X)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with stack_of(DISK, 3, 5, 20) as stack:
        stack.attach(model, weights=tmp_path)
        attached = stack._models[id(model)]
        assert any(stack._memory.store.is_foreign(attached._key(number)) for number in range(DEPTH))
        with torch.no_grad():
            for _ in range(passes):
                assert torch.equal(model(X), expected)
        attached.streaming.close()
        (first_in, _), (host_in, host_out), (disk_in, disk_out) = counts(stack)
        in_memory = sum(home == 1 for home in attached.layout.plan.homes)
        assert disk_in == 0
        assert host_in == disk_out + in_memory * BLOCK
        assert first_in == host_out >= passes * (DEPTH - 3) * BLOCK
        assert stack._memory.store.reads._under_way == 0


def test_from_disk_straight_to_level_1():
    model, passes = tower(), 4
    with stack_of(["cpu", "ssd"], 3, 20) as stack:
        stack.attach(model)
        run(model, passes)
        assert counts(stack) == [((passes * DEPTH + 3) * BLOCK, 0), (DEPTH * BLOCK, (passes * DEPTH + 3) * BLOCK)]


def test_what_is_written_to_a_weight_goes_back_to_where_it_lives():
    model = tower()
    with stack_of(HOST, 3, 20) as stack:
        stack.attach(model)
        before = counts(stack)
        with torch.no_grad():
            model[6][0].weight.zero_()
        assert counts(stack)[0][1] == before[0][1] + BLOCK
        assert counts(stack)[1][0] == before[1][0] + BLOCK


def test_a_read_that_fails_brought_nothing():
    model = tower()
    stack = stack_of(DISK, 3, 3, 20)
    stack.attach(model)
    run(model, 2)
    store = stack._memory.store
    path, _ = store.place_of("model-0-6", 0)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="altered"):
        run(model, 2)
    stack._models[id(model)].streaming.close()
    (first_in, _), (host_in, host_out), (_, disk_out) = counts(stack)
    assert first_in == host_out
    assert host_in == disk_out
    assert host_in % BLOCK == 0
    for each in (stack._memory.host.came, store.reads):
        assert each._under_way == 0
        assert each._arrived == each.bytes
    stack.close(restore=False)


def test_tensors_by_name():
    kilo = torch.zeros(4096, dtype=torch.uint8)
    with stack_of(DISK, 0.2, 0.2, 20) as stack:  # a page, a page, and the rest
        for key in "abc":
            stack.put(key, kilo)  # each pushes those before it down
        assert counts(stack) == [(3 * 4096, 2 * 4096), (2 * 4096, 4096), (4096, 0)]
        stack.get("c")
        assert counts(stack) == [(3 * 4096, 2 * 4096), (2 * 4096, 4096), (4096, 0)]
        stack.get("b")  # up from the host: c goes down, and as b keeps its place until then, to the disk
        assert counts(stack) == [(4 * 4096, 3 * 4096), (2 * 4096, 2 * 4096), (2 * 4096, 0)]
        assert all(level["gbps"] > 0 for level in stack.stats()["levels"])


def test_a_rate_is_none_before_anything_came_and_then_the_bytes_over_their_time():
    model = tower()
    with stack_of(DISK, 3, 3, 20) as stack:
        stack.attach(model)
        assert stack.stats()["levels"][2]["gbps"] > 0  # was written
        run(model, 3)
        stack._models[id(model)].streaming.close()
        for level, stats in zip(stack.levels, stack.stats()["levels"], strict=True):
            assert stats["gbps"] == pytest.approx(level.came._arrived / level.came.seconds / 1e9)
    with stack_of(HOST, 40, 40) as stack:
        stack.attach(model)
        run(model, 2)
        assert [level["gbps"] for level in stack.stats()["levels"]] == [None, None]


@pytest.fixture
def at(monkeypatch):
    """Set the time, in ns."""
    now = [0]
    monkeypatch.setattr(traffic.time, "perf_counter_ns", lambda: now[0])
    return lambda ns: now.__setitem__(0, ns)


def test_of_transfers_side_by_side_the_time_is_that_in_which_any_is_under_way(at):
    came, shown = Traffic(), []
    came.watch = lambda *said: shown.append(said)
    at(100)
    first = came.start("a", 30)
    at(110)
    second = came.start("b", 50)
    assert (came.bytes, came.gbps) == (80, None)
    at(120)
    first.end()
    first.end()
    assert came.gbps == 30 / 20
    at(140)
    second.end()
    at(500)
    third = came.start("c", 1000)
    assert came.bytes == 1080
    at(510)
    third.end(OSError())
    assert (came.bytes, came.seconds, came.gbps) == (80, 50e-9, 80 / 50)
    came.count(7)
    came.took("d", 7, Span(10e-9, 1, 11))
    assert (came.bytes, came.gbps) == (87, 87 / 60)
    assert shown == [("a", 30, 100, 120), ("b", 50, 110, 140), ("d", 7, 1, 11)]


class Event:
    """As a device's: over when it is told, at a time in ms."""

    made = 0

    def __init__(self):
        Event.made += 1
        self.ms = None

    def record(self, stream):
        self.ms = stream.now
        self.stream = stream

    def query(self):
        return self.stream.done >= self.ms

    def synchronize(self):
        self.stream.done = max(self.stream.done, self.ms)

    def elapsed_time(self, other):
        assert self.query()
        assert other.query()
        return other.ms - self.ms


class Stream:
    now = done = 0.0


class Device:
    streams = True

    def __init__(self):
        Event.made = 0
        self.stream = Stream()

    def event(self, *, timed=False):
        assert timed
        return Event()

    def compute(self):
        return self.stream

    def synchronize(self):
        self.stream.done = self.stream.now


def test_a_devices_times_are_told_in_order_once_they_are_past_and_events_are_used_again():
    device, told = Device(), []
    clock, stream = Clock(device), device.stream
    for i in range(1, 601):
        begin = clock.mark(stream)
        stream.now += 2.0
        clock.between(begin, clock.mark(stream), lambda span, i=i: told.append((i, span)))
        if i == 3:
            clock.poll()
            assert told == []
            stream.done = 4.0
            clock.poll()
            assert told == [(1, Span(2e-3, 0, 0)), (2, Span(2e-3, 0, 0))]
        stream.done = max(stream.done, stream.now - 8.0)
    assert [i for i, _ in told] == list(range(1, len(told) + 1))
    assert Event.made < 1100  # 512 pairs wait, and then are used again
    clock.settle()
    assert len(told) == 600
    for _ in range(1000):
        clock.between(clock.mark(stream), clock.mark(stream), lambda _: None)
    assert Event.made < 1100


def test_a_devices_times_by_the_hosts_clock():
    device, told = Device(), []
    clock, stream = Clock(device), device.stream
    stream.now = 50.0
    clock.refer()
    begin = clock.mark(stream)
    stream.now = 53.0
    clock.between(begin, clock.mark(stream), told.append)
    clock.settle()
    assert told[0].seconds == pytest.approx(3e-3)
    assert told[0].end_ns - told[0].begin_ns == 3_000_000
    assert told[0].begin_ns == clock._reference[1]
    clock.forget()
    clock.between(clock.mark(stream), clock.mark(stream), told.append)
    clock.settle()
    assert told[1] == Span(0.0, 0, 0)


@pytest.mark.parametrize("kinds", [HOST, DISK])
def test_stats_from_another_thread_while_the_model_runs(kinds):
    model, over, seen, faults = tower(), threading.Event(), [], []
    with stack_of(kinds, 3, *([3, 20] if kinds is DISK else [20])) as stack:

        def look():
            try:
                while not over.is_set():
                    seen.append(counts(stack))
            except BaseException as error:  # noqa: BLE001 - told below
                faults.append(error)

        thread = threading.Thread(target=look)
        thread.start()
        stack.attach(model)
        run(model, 30)
        stack.detach(model)
        over.set()
        thread.join()
        last = counts(stack)
    assert not faults
    assert len(seen) > 10
    for level in range(len(kinds)):
        for way in range(2):
            values = [each[level][way] for each in seen]
            assert values == sorted(values)
            assert values[-1] <= last[level][way]


def test_stats_are_told_while_the_stack_is_busy():
    """No lock that a long `attach` or `put` holds is waited for."""
    with stack_of(HOST, 3, 20) as stack:
        stack.attach(tower())
        told = []
        with stack._lock, stack._models[next(iter(stack._models))].streaming._lock:
            thread = threading.Thread(target=lambda: told.append(stack.stats()), daemon=True)
            thread.start()
            thread.join(30)
            assert told
