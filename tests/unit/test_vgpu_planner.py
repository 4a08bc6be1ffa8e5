"""What a plan promises for all sizes and capacities, and what the order of blocks teaches."""

import itertools
import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from apt_model.core.errors import CapacityError
from apt_model.vgpu.planner import DEVICE, DISK, HOST, Blob, Capacities, plan, spread
from apt_model.vgpu.predictor import Predictor
from apt_model.vgpu.units import PAGE, padded

MB = 10**6
SIZES = st.lists(st.integers(1, 40 * MB) | st.sampled_from([1, PAGE, PAGE + 1, MB, 10 * MB]), min_size=1, max_size=24)
CAPACITY = st.integers(0, 300 * MB)
LEVELS = st.sampled_from(["alone", "host", "disk", "both"])
OPTIONS = {"slots": st.integers(1, 6), "staging": st.integers(1, 4), "always": st.sampled_from([0, PAGE, 10 * MB])}
thorough = settings(max_examples=300, deadline=None)


def blobs(sizes):
    return [Blob(name=f"block {i}", nbytes=size) for i, size in enumerate(sizes)]


def capacities(levels, device, host, disk):
    below = {"alone": {}, "host": {"host": host}, "disk": {"disk": disk}, "both": {"host": host, "disk": disk}}
    return Capacities(device=device, **below[levels])


def check(sizes, given_, made, options, at_once):
    """A plan keeps within its capacities, and all that it says is so."""
    at = {level: [padded(size) for size, home in zip(sizes, made.homes, strict=True) if home == level]
          for level in (DEVICE, HOST, DISK)}  # fmt: skip
    assert len(made.homes) == len(sizes)
    assert set(made.homes) <= {DEVICE, HOST, DISK}
    streamed = at[HOST] + at[DISK]
    assert made.device_bytes == options["always"] + sum(at[DEVICE]) + made.slots * made.slot_bytes <= given_.device
    assert made.host_bytes == sum(at[HOST]) + made.staging * made.staging_bytes <= (given_.host or 0)
    assert made.disk_bytes == sum(at[DISK]) <= (given_.disk or 0)
    assert made.streamed_bytes == sum(streamed)
    if not streamed:
        assert (made.slots, made.staging) == (0, 0)
        return
    assert made.slot_bytes >= max(streamed)
    assert min(at_once, len(streamed)) <= made.slots <= max(options["slots"], at_once)
    if at[DISK] and given_.host is not None:
        assert 1 <= made.staging <= options["staging"]
        assert made.staging_bytes >= max(at[DISK])


def least(error):
    """Which level's least an error names, and the bytes."""
    level, amount = re.fullmatch(
        r"give (level 1|the cpu level|the disk) at least ([\d,.]+) MB.*", error.remedy, re.DOTALL
    ).groups()
    return {"level 1": "device", "the cpu level": "host", "the disk": "disk"}[level], float(
        amount.replace(",", "")
    ) * MB


def planned(sizes, given_, at_once, options):
    """The plan, or the error in its place."""
    try:
        return plan(blobs(sizes), given_, at_once=at_once, **options)
    except CapacityError as error:
        return error


@given(sizes=SIZES, device=CAPACITY, host=CAPACITY, disk=CAPACITY, levels=LEVELS, at_once=st.integers(1, 3), **OPTIONS)
@thorough
def test_capacities_are_kept_and_every_blob_has_a_home(*, sizes, device, host, disk, levels, at_once, **options):
    at_once = min(at_once, len(sizes))
    given_ = capacities(levels, device, host, disk)
    made = planned(sizes, given_, at_once, options)
    if isinstance(made, CapacityError):
        assert options["always"] + sum(map(padded, sizes)) > device
        assert "MB" in made.remedy or "level below" in made.remedy
    else:
        check(sizes, given_, made, options, at_once)


@given(sizes=SIZES, device=CAPACITY, host=CAPACITY, disk=CAPACITY, levels=st.sampled_from(["host", "disk", "both"]),
       at_once=st.integers(1, 3), **OPTIONS)  # fmt: skip
@example(sizes=[3000] * 8, device=8000, host=MB, disk=0, levels="host", at_once=1, slots=3, staging=1, always=0)
@example(sizes=[MB, 10 * MB], device=MB, host=99 * MB, disk=0, levels="host", at_once=2, slots=3, staging=1, always=0)
@example(sizes=[1_130_000] * 9, device=0, host=99 * MB, disk=0, levels="host", at_once=1, slots=3, staging=1, always=0)
@thorough
def test_the_least_that_an_error_names_does_and_less_does_not(*, sizes, device, host, disk, levels, at_once, **options):
    at_once = min(at_once, len(sizes))
    now = {"device": device, "host": host, "disk": disk}
    for _ in range(8):
        made = planned(sizes, capacities(levels, **now), at_once, options)
        if not isinstance(made, CapacityError):
            check(sizes, capacities(levels, **now), made, options, at_once)
            return
        level, amount = least(made)
        assert amount > now[level]
        # The amount is rounded up, to a tenth of a MB at most.
        under = {**now, level: int(amount) - 110_000}
        if under[level] > now[level]:
            again = planned(sizes, capacities(levels, **under), at_once, options)
            assert isinstance(again, CapacityError)
            assert least(again)[0] == level
        now[level] = int(amount)
    pytest.fail("what an error names is not enough")


@given(sizes=SIZES, more=st.integers(0, MB), always=st.integers(0, MB), levels=LEVELS)
@thorough
def test_what_fits_is_not_streamed(sizes, more, always, levels):
    made = plan(blobs(sizes), capacities(levels, sum(map(padded, sizes)) + always + more, 0, 0), always=always)
    assert made.homes == (DEVICE,) * len(sizes)
    assert (made.slots, made.streamed_bytes, made.host_bytes, made.disk_bytes) == (0, 0, 0, 0)


def runs(homes, wanted):
    """Lengths of runs around the circle, as the order comes over and over."""
    there = [home in wanted for home in homes]
    if all(there) or not any(there):
        return [len(there)] * any(there)
    start = there.index(False)
    turned = there[start:] + there[:start]
    return [len(list(group)) for value, group in itertools.groupby(turned) if value]


@given(count=st.integers(4, 80), slots=st.integers(1, 4), room=st.integers(0, 79), more=st.integers(0, MB - 1))
@thorough
def test_residents_are_spread_evenly(count, slots, room, more):
    assume(slots + room < count)
    made = plan(
        blobs([250 * PAGE] * count), Capacities(device=(slots + room) * 250 * PAGE + more, host=10**12), slots=slots
    )
    resident = made.homes.count(DEVICE)
    streamed = count - resident
    assert resident == room
    assert made.slots == slots
    if resident:
        ideal = -(-streamed // resident)
        assert max(runs(made.homes, {HOST})) <= ideal + 1
        assert max(runs(made.homes, {DEVICE})) <= -(-resident // streamed) + 1


@given(count=st.integers(4, 60), room=st.integers(1, 59))
@thorough
def test_what_lies_on_disk_is_spread_evenly_among_what_lies_on_the_host(count, room):
    assume(room < count - 3)
    size = 250 * PAGE
    made = plan(
        blobs([size] * count), Capacities(device=2 * size, host=(room + 2) * size, disk=10**12), slots=2, staging=2
    )
    order = [home for home in made.homes if home != DEVICE]
    assert order.count(HOST) == room
    assert max(runs(order, {DISK})) <= -(-order.count(DISK) // room) + 1


@given(sizes=SIZES, device=CAPACITY, **OPTIONS)
@thorough
def test_level_1_is_used(sizes, device, **options):
    given_ = Capacities(device=device, host=10**12)
    try:
        made = plan(blobs(sizes), given_, **options)
    except CapacityError:
        return
    left = device - made.device_bytes
    if made.streamed_bytes and left > device * 0.1:
        smallest = min(padded(size) for size, home in zip(sizes, made.homes, strict=True) if home != DEVICE)
        assert smallest > left


@given(sizes=st.lists(st.integers(0, 10**9), max_size=40), capacity=st.integers(0, 10**10))
@thorough
def test_spread_stays_within_its_capacity(sizes, capacity):
    which = list(range(0, len(sizes), 2))
    chosen = spread(which, sizes, capacity)
    assert sum(sizes[i] for i in chosen) <= capacity
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(which)
    left = capacity - sum(sizes[i] for i in chosen)
    assert all(sizes[i] > left for i in set(which) - set(chosen))


def wrong(predictor, order):
    return sum(not predictor.saw(number) for number in order)


@given(order=st.permutations(range(9)), guess=st.permutations(range(9)))
@thorough
def test_any_cycle_is_learned_in_two_passes(order, guess):
    predictor = Predictor(guess)
    wrong(predictor, order * 2)
    assert wrong(predictor, order * 3) == 0
    assert list(itertools.islice(predictor.ahead(), 18)) == order * 2


def test_a_right_guess_has_no_surprises():
    predictor = Predictor(range(5))
    assert wrong(predictor, [*range(5)] * 4) == 0
    assert predictor.surprises == 0


@pytest.mark.parametrize(
    "order",
    [
        [0, 1, 2, 1, 3],
        [0, 1, 0, 2, 0, 3],
        [0, 0, 1, 1, 2, 2],
        [0, 1, 2, 3, 2, 1],
        [0, 1, 2, 3, 3, 2, 1, 0],
        [4],
        [7, 9],
    ],
    ids=str,
)
def test_blocks_used_twice_and_palindromes(order):
    predictor = Predictor(sorted(set(order)))
    wrong(predictor, order * 3)
    before = predictor.surprises
    assert wrong(predictor, order * 3) == 0
    assert predictor.surprises == before
    assert list(itertools.islice(predictor.ahead(), len(order))) == order


def test_a_change_of_order_is_learned_and_unlearned():
    predictor = Predictor(range(6))
    for order in ([*range(6)], [5, 4, 3, 2, 1, 0], [0, 2, 4], [*range(6)]):
        wrong(predictor, order * 2)
        assert wrong(predictor, order) == 0


def test_what_was_never_seen():
    assert list(itertools.islice(Predictor([]).ahead(), 3)) == []
    predictor = Predictor([])
    assert wrong(predictor, [3, 3, 3]) == 2
    assert list(itertools.islice(predictor.ahead(), 2)) == [3, 3]
    predictor = Predictor([0, 1])
    assert wrong(predictor, [8, 0, 1, 8, 0, 1, 8]) <= 3


@given(order=st.lists(st.integers(0, 5), max_size=40))
@thorough
def test_looking_ahead_changes_nothing(order):
    one, other = Predictor(range(3)), Predictor(range(3))
    for number in order:
        list(itertools.islice(one.ahead(), 7))
        assert one.saw(number) == other.saw(number)
    assert one.surprises == other.surprises


def test_the_least_of_an_only_level_has_what_others_hold():
    with pytest.raises(CapacityError) as caught:
        plan(blobs([10 * PAGE] * 3), Capacities(device=25 * PAGE, taken=(7 * PAGE, 0, 0)))
    level, amount = least(caught.value)
    assert level == "device"
    assert amount >= 37 * PAGE
    plan(blobs([10 * PAGE] * 3), Capacities(device=int(amount) - 7 * PAGE, taken=(7 * PAGE, 0, 0)))


@pytest.mark.parametrize("disk", range(3, 9))
def test_fewer_slots_where_what_they_leave_over_does_not_fit_below(disk):
    """Of eight blocks six fit to level 1: as many slots as asked for, as far as the disk has the others."""
    made = plan(blobs([PAGE] * 8), Capacities(device=6 * PAGE, disk=disk * PAGE), slots=5)
    assert made.slots == min(5, disk - 2)


@pytest.mark.parametrize("disk", range(3, 6))
def test_fewer_places_of_staging_where_what_they_push_out_does_not_fit_on_the_disk(disk):
    """Of six streamed blocks the host has four, or the fewer the more places blocks from the disk pass through."""
    made = plan(blobs([PAGE] * 7), Capacities(device=2 * PAGE, host=4 * PAGE, disk=disk * PAGE), slots=1)
    assert made.staging == disk - 2
