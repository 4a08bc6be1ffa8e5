import contextlib
import errno
import gc
import itertools
import logging
import random
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_model.core.errors import CapacityError, DeviceError, InputError
from apt_model.core.system.cpu import CpuDevice
from apt_model.core.system.cuda import CudaDevice
from apt_model.core.system.host_memory import HostMemory
from apt_model.vgpu import arena as home
from apt_model.vgpu import host_pages
from apt_model.vgpu.arena import DevicePin, HostArena

MIB = 2**20
PAGE = 4096
on_linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc/self/smaps")


class Books:
    """A pin that keeps what it was asked, and takes no range twice."""

    def __init__(self, refuse=None):
        self.ranges, self.asked, self.refuse = {}, 0, refuse

    def register(self, address, nbytes):
        self.asked += 1
        if self.refuse is not None:
            return self.refuse()
        assert all(address + nbytes <= at or at + size <= address for at, size in self.ranges.items())
        self.ranges[address] = nbytes
        return True

    def unregister(self, address):
        del self.ranges[address]

    def holds(self, region):
        """Whether the region lies in one range."""
        return any(at <= region.address and region.address + region.nbytes <= at + n for at, n in self.ranges.items())


def refused():
    raise DeviceError("cudaErrorNotPermitted")


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr(home, "_SEGMENT", 2 * MIB)


def mapped(address):
    """The fields of /proc/self/smaps of the mapping that holds `address`, or None."""
    found = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()
        if "-" in head[0] and not head[0].endswith(":"):
            begin, end = (int(each, 16) for each in head[0].split("-"))
            if found is not None:
                break
            found = {} if begin <= address < end else None
        elif found is not None:
            found[head[0]] = head[1:]
    return found


# --- against a model

SIZES = st.one_of(st.integers(1, 3 * PAGE), st.integers(1, 3 * MIB), st.sampled_from([PAGE, 2 * MIB, 7 * MIB]))


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.sampled_from([8 * MIB, 9 * MIB + 3 * PAGE + 5]),
    segment=st.sampled_from([2 * MIB, 4 * MIB, 256 * MIB]),
    steps=st.lists(st.one_of(SIZES, st.floats(0, 0.99)), max_size=40),
)
def test_regions_keep_their_bytes_and_never_exceed_the_capacity(capacity, segment, steps):
    with mock.patch.object(home, "_SEGMENT", segment):
        books = Books()
        arena = HostArena(capacity, pin=books)
        held, used, peak = [], 0, 0
        for number, step in enumerate(steps):
            if isinstance(step, float):  # which one to give
                if held:
                    region, mark = held.pop(int(step * len(held)))
                    assert torch.all(region.tensor == mark)
                    arena.give(region)
                    used -= -(-region.nbytes // PAGE) * PAGE
            else:
                try:
                    region = arena.take(step)
                except CapacityError:
                    assert held, "the whole of an empty arena can be taken"
                else:
                    assert (region.nbytes, region.tensor.shape, region.tensor.dtype) == (step, (step,), torch.uint8)
                    assert region.address == region.tensor.data_ptr()
                    assert region.address % PAGE == 0
                    region.tensor.fill_(number)
                    held.append((region, number))
                    used += -(-step // PAGE) * PAGE
            peak = max(peak, used)
            assert (arena.used, arena.peak) == (used, peak)
            assert used <= arena.committed <= arena.capacity <= capacity
            assert sum(books.ranges.values()) == arena.committed == arena.pinned_bytes
            places = sorted((each.address, each.address + each.nbytes) for each, _ in held)
            assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
            assert all(each.pinned and books.holds(each) for each, _ in held)
        assert all(torch.all(region.tensor == mark) for region, mark in held)
        for region, _ in held:
            arena.give(region)
        assert all(part.free == [(part.start, part.size)] for part in arena._segments)
        whole = arena.take(arena.capacity)
        assert books.holds(whole)
        assert arena.used == arena.committed == arena.capacity
        arena.close()
        assert not books.ranges


def test_threads_take_and_give_at_once(small_segments):
    arena, failures = HostArena(32 * MIB, threads=2), []

    def work(seed):
        draw = random.Random(seed)
        with contextlib.suppress(CapacityError):
            for _ in range(100):
                held = [arena.take(draw.randrange(1, MIB)) for _ in range(3)]
                for region in held:
                    region.tensor.fill_(seed)
                failures.extend(seed for region in held if not torch.all(region.tensor == seed))
                for region in held:
                    arena.give(region)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert arena.used == 0
    assert 0 < arena.peak <= arena.committed <= arena.capacity
    arena.take(arena.capacity)


# --- what is committed, and when


def test_nothing_is_committed_before_it_is_needed():
    arena = HostArena(2**40, pin=(books := Books()))
    assert (arena.capacity, arena.committed, arena.used, books.asked) == (2**40, 0, 0, 0)
    arena.take(1)
    assert arena.committed == arena.pinned_bytes == 256 * MIB


@pytest.mark.parametrize("populate", [host_pages._POPULATE, None])
@on_linux
def test_what_is_prepared_is_there_and_is_not_prepared_again(monkeypatch, populate):
    monkeypatch.setattr(host_pages, "_POPULATE", populate)
    monkeypatch.setattr(home, "_PREPARED", 32 * MIB)
    monkeypatch.setattr(home, "_SEGMENT", 2 * MIB)
    arena, before = HostArena(128 * MIB, pin=(books := Books())), HostMemory().resident()
    arena.prepare(96 * MIB + 1)
    assert arena.committed == 98 * MIB
    assert HostMemory().resident() - before == pytest.approx(98 * MIB, rel=0.1)
    assert sorted(books.ranges.values()) == [2 * MIB, 32 * MIB, 32 * MIB, 32 * MIB]
    arena.prepare(98 * MIB)
    region = arena.take(20 * MIB)
    assert arena.committed == 98 * MIB
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in mapped(region.address)["VmFlags:"]  # huge pages are asked for
    with pytest.raises(CapacityError, match=r"capacity 134.2 MB"):
        arena.prepare(128 * MIB + 1)


def test_free_neighbours_are_joined_and_taken_ones_are_not(small_segments):
    arena = HostArena(8 * MIB, pin=(books := Books()))
    first, second, third = (arena.take(2 * MIB) for _ in range(3))
    assert sorted(books.ranges.values()) == [2 * MIB] * 3
    arena.give(first)
    arena.give(third)
    second.tensor.fill_(7)
    large = arena.take(4 * MIB)  # the third, with what was not committed yet
    assert large.address == third.address
    assert books.ranges == {first.address: 2 * MIB, second.address: 2 * MIB, third.address: 4 * MIB}
    with pytest.raises(CapacityError):
        arena.take(2 * MIB + 1)
    assert torch.all(second.tensor == 7)


def test_a_refusal_says_what_was_asked_what_is_free_and_the_largest_piece(small_segments):
    arena = HostArena(8_000_000)
    held = [arena.take(2_000_000) for _ in range(3)]
    arena.give(held[1])
    with pytest.raises(CapacityError, match=r"3.0 MB asked, 4.0 MB free, the largest piece 2.1 MB, capacity 8.0 MB"):
        arena.take(3_000_000)
    with pytest.raises(CapacityError, match=r"largest piece 2.1 MB"):
        arena.take(9_000_000)
    assert arena.take(2_000_000).address == held[1].address


# --- what the machine refuses


def test_more_than_the_machine_has_free_is_not_committed(monkeypatch):
    arena = HostArena(64 * MIB)
    free = 10 * MIB
    monkeypatch.setattr(HostMemory, "free", lambda _: free)
    with pytest.raises(CapacityError, match=r"21.0 MB more to commit.*control group.*leaves 10.5 MB"):
        arena.take(20 * MIB)
    with pytest.raises(CapacityError, match=r"67.1 MB more to commit"):
        arena.prepare(64 * MIB)
    assert arena.committed == arena.used == 0
    arena.take(5 * MIB)  # not a whole segment, as that is more than there is
    assert arena.committed == 5 * MIB
    free = None  # the system does not say
    arena.take(20 * MIB)
    assert arena.committed == 64 * MIB


def test_pages_that_do_not_come_leave_the_arena_as_it_was(monkeypatch, small_segments):
    arena = HostArena(16 * MIB, pin=(books := Books()))
    arena.take(MIB).tensor.fill_(5)
    advise, dropped = host_pages._advise, []

    def short(advice, address, size):
        if advice == 4:
            dropped.append(size)
        return errno.ENOMEM if advice == 23 else advise(advice, address, size)

    for name, stand_in in {"_advise": short, "_POPULATE": 23, "_DONT_NEED": 4}.items():
        monkeypatch.setattr(host_pages, name, stand_in)
    with pytest.raises(CapacityError, match=r"gives no 4.2 MB more: Cannot allocate memory"):
        arena.take(4 * MIB)
    assert (arena.committed, arena.used, sum(books.ranges.values())) == (2 * MIB, MIB, 2 * MIB)
    assert dropped == [4 * MIB]  # what had come of it
    arena.take(MIB)
    monkeypatch.undo()
    arena.take(4 * MIB).tensor.fill_(6)


def test_no_address_space_is_a_capacity_error():
    with pytest.raises(CapacityError, match="no address space"):
        HostArena(2**60)


@pytest.mark.parametrize("capacity", [0, -1, PAGE - 1])
def test_an_arena_has_a_page(capacity):
    with pytest.raises(InputError, match="at least a page"):
        HostArena(capacity)


@pytest.mark.parametrize(
    ("refuse", "reason"), [(refused, "cudaErrorNotPermitted"), (lambda: False, "the device pins no memory")]
)
def test_without_pinning_everything_works_and_it_is_said_once(caplog, small_segments, refuse, reason):
    arena = HostArena(8 * MIB, pin=(books := Books(refuse)))
    with caplog.at_level(logging.WARNING, logger="apt_model"):
        regions = [arena.take(2 * MIB) for _ in range(3)]
    assert [record.getMessage() for record in caplog.records] == [
        f"host arena: 2.1 MB stay pageable, and copies slower: {reason}"
    ]
    assert books.asked == 3
    assert not any(region.pinned for region in regions)
    assert arena.pinned_bytes == 0
    regions[0].tensor.fill_(1)
    arena.close()


def test_the_processor_pins_nothing():
    device = CpuDevice()
    assert not device.supports("register_host")
    assert not device.supports("unregister_host")
    assert device.unregister_host(PAGE) is None
    assert not HostArena(MIB, pin=DevicePin(device)).take(1).pinned


@pytest.mark.parametrize("index", [None, 1])
def test_a_gpu_pins_through_the_runtime_and_says_why_not(monkeypatch, index):
    said, calls, blamed = [0], [], []
    runtime = type("Runtime", (), {
        "cudaHostRegister": lambda *given: calls.append(given) or said[0],
        "cudaHostUnregister": lambda *given: calls.append(given) or said[0],
        "cudaGetErrorString": lambda code: f"error {code}",
    })  # fmt: skip
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *_, device: blamed.append(device) or torch.zeros(1))
    pin = DevicePin(CudaDevice(index))
    assert pin.register(PAGE, 2 * PAGE)
    pin.unregister(PAGE)
    assert calls == [(PAGE, 2 * PAGE, 1), (PAGE,)]
    assert not blamed
    said[0] = 712
    with pytest.raises(DeviceError, match=r"cuda(:1)?: pinning 8192 bytes: error 712"):
        pin.register(PAGE, 2 * PAGE)
    with pytest.raises(DeviceError, match="unpinning: error 712"):
        pin.unregister(PAGE)
    assert len(blamed) == 2


# --- giving back and closing


def test_a_region_is_given_back_once_and_where_it_was_taken():
    arena, other = HostArena(MIB), HostArena(MIB)
    region = arena.take(1)
    with pytest.raises(InputError, match="is another arena's"):
        other.give(region)
    arena.give(region)
    with pytest.raises(InputError, match="was given back before"):
        arena.give(region)
    for nothing in (0, -1):
        with pytest.raises(InputError, match="above 0"):
            arena.take(nothing)
    assert arena.used == other.used == 0


@on_linux
def test_a_tensor_outlives_the_arena_and_the_memory_goes_with_it():
    arena = HostArena(MIB, pin=(books := Books()))
    region = arena.take(100)
    view, address = region.tensor[10:].view(torch.int16), region.address
    view.fill_(3)
    assert "dc" in mapped(address)["VmFlags:"]  # pinned, it is not for forked processes
    arena.close()
    arena.close()
    assert not books.ranges
    assert not region.pinned
    assert (arena.committed, arena.pinned_bytes) == (0, 0)
    with pytest.raises(InputError, match="closed"):
        arena.take(1)
    with pytest.raises(InputError, match="closed"):
        arena.prepare(1)
    arena.give(region)
    assert arena.used == 0
    del arena, region
    gc.collect()
    assert "dc" not in mapped(address)["VmFlags:"]
    view += 1
    assert torch.all(view == 4)
    del view
    held = mapped(address)
    assert held is None or "hg" not in held["VmFlags:"]


def test_a_forgotten_arena_is_unpinned_and_its_tensors_stay():
    arena = HostArena(MIB, pin=(books := Books()))
    region = arena.take(100)
    tensor = region.tensor.fill_(9)
    assert books.ranges
    del arena
    gc.collect()
    assert not books.ranges
    assert not region.pinned
    assert torch.all(tensor == 9)


def test_a_driver_that_fails_to_let_go_stops_nothing(caplog, monkeypatch, small_segments):
    arena = HostArena(4 * MIB, pin=(books := Books()))
    for _ in range(2):
        arena.take(2 * MIB)
    monkeypatch.setattr(books, "unregister", lambda _: refused())
    with caplog.at_level(logging.WARNING, logger="apt_model"):
        arena.close()
    assert len(caplog.records) == 2
    assert "stay pinned: cudaErrorNotPermitted" in caplog.text


def test_a_forked_process_leaves_the_registrations_alone(monkeypatch):
    arena = HostArena(MIB, pin=(books := Books()))
    arena.take(1)
    with monkeypatch.context() as forked:
        forked.setattr(home.os, "getpid", lambda: -1)
        arena.close()
    assert len(books.ranges) == 1


@pytest.mark.parametrize("capacity", [100 * MIB, 100 * MIB + 3 * PAGE])
def test_pieces_longer_than_a_segment_fill_an_arena_to_its_last_page(capacity, monkeypatch):
    monkeypatch.setattr(home, "_SEGMENT", 4 * MIB)
    arena = HostArena(capacity, threads=1)
    sizes = [4 * MIB + 5 * PAGE] * (capacity // (4 * MIB + 5 * PAGE))
    sizes.append(capacity - sum(sizes))
    regions = [arena.take(size) for size in sizes if size]
    assert arena.used == arena.committed == capacity
    assert len({region.address for region in regions}) == len(regions)
    arena.close()
