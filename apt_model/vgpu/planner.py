"""What lives where: pure arithmetic over sizes and capacities, without torch.

Blocks are used in a known order, over and over. On such a scan a fixed set of residents is optimal in bytes (evicting
what was used longest ago finds nothing again), and residents have to be spread among what is streamed: a few slots
cannot bank the time of a long resident prefix. So residents are chosen as a line is drawn on a grid, in proportion to
bytes, and so is what lies on disk among what lies in host memory.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence

from apt_model.core.errors import CapacityError
from apt_model.vgpu.units import enough, padded

# A blob below this share of a slot stays on level 1: a slot, a copy and two events for it cost more than its bytes.
_SMALL = 1 / 16
DEVICE, HOST, DISK = range(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blob:
    """Bytes that move together, in the order of their first use."""

    name: str
    nbytes: int
    in_files: bool = False
    """Whether these bytes lie in files already: on the disk they take no room."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacities:
    """Bytes of each level; None where there is no such level."""

    device: int
    host: int | None = None
    disk: int | None = None
    taken: tuple[int, int, int] = (0, 0, 0)
    """What others hold of each level already: these come on top where an error names what would do."""

    def without(self, count: int) -> "Capacities":
        """With so many bytes of host memory taken; of level 1 where that is the host's."""
        device, host, disk = self.taken
        if self.host is None:
            return dataclasses.replace(self, device=self.device - count, taken=(device + count, host, disk))
        return dataclasses.replace(self, host=self.host - count, taken=(device, host + count, disk))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Where each blob lives, and what streaming the others takes on each level."""

    homes: tuple[int, ...]
    """DEVICE, HOST or DISK of each blob."""
    slots: int
    slot_bytes: int
    staging: int
    """Places in host memory through which blobs pass from the disk."""
    staging_bytes: int
    """Of each."""
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    streamed_bytes: int
    """To level 1 in one pass over all blobs."""


def plan(
    blobs: Sequence[Blob], capacities: Capacities, *, always: int = 0, slots: int = 3, at_once: int = 1,
    staging: int = 3, cached: bool = False,
) -> Plan:  # fmt: skip
    """Place `blobs` within `capacities`.

    Args:
        blobs: in the order of their use.
        capacities: in bytes.
        always: bytes on level 1 that are not streamed at all (buffers, parameters of no block).
        slots: places on level 1 for what is streamed; fewer where there is no room, but not below `at_once`.
        at_once: most blobs that one block needs at the same time.
        staging: places in host memory for what comes from the disk; fewer where there is no room.
        cached: whether level 1 is all slots, at least `slots` where there is room, in place of residents.

    Raises:
        CapacityError: a level is too small; says the least that would do.
    """
    sizes = [padded(blob.nbytes) for blob in blobs]
    if always + sum(sizes) <= capacities.device:
        return _made(sizes, [DEVICE] * len(sizes), always, 0, 0)
    fault: CapacityError | None = None
    for fewer in range(max(slots, at_once), at_once - 1, -1):  # each leaves more residents, and less for levels below
        try:
            return _streamed(
                blobs, sizes, capacities, always=always, slots=fewer, at_once=at_once, staging=staging, cached=cached
            )  # fmt: skip
        except CapacityError as error:  # noqa: PERF203 - of a few slots
            fault = error
    assert fault is not None
    try:
        raise fault
    finally:
        del fault  # whose frames know this one


def _streamed(
    blobs: Sequence[Blob], sizes: list[int], capacities: Capacities, *, always: int, slots: int, at_once: int,
    staging: int, cached: bool,
) -> Plan:  # fmt: skip
    """A plan in which not everything stays on level 1."""
    homes, count, slot = _residents(
        blobs, sizes, capacities, always=always, slots=slots, at_once=at_once, cached=cached
    )
    streamed = [i for i, home in enumerate(homes) if home != DEVICE]
    need = sum(sizes[i] for i in streamed)
    on_disk, places = streamed, 0
    if capacities.host is not None:
        on_disk, places = _below(sizes, streamed, capacities, staging)
    elif capacities.disk is None:
        raise CapacityError(
            f"the model takes {enough(always + sum(sizes))}, and the only level has room for "
            f"{enough(capacities.device)}",
            remedy=f"give level 1 at least {enough(always + sum(sizes) + capacities.taken[DEVICE])}, or add a level "
            "below it",
        )
    for i in on_disk:
        homes[i] = DISK
    on_disk_bytes = sum(sizes[i] for i in on_disk if not blobs[i].in_files)
    if capacities.disk is not None and on_disk_bytes > capacities.disk:
        raise CapacityError(
            f"{enough(need)} are streamed, {enough(on_disk_bytes)} of them from the disk, which has room for "
            f"{enough(capacities.disk)}",
            remedy=f"give the disk at least {enough(on_disk_bytes + capacities.taken[DISK])}, or the levels above "
            "it more",
        )
    made = _made(sizes, homes, always, count, slot, staging=places)
    return dataclasses.replace(made, disk_bytes=on_disk_bytes)


def _residents(
    blobs: Sequence[Blob], sizes: list[int], capacities: Capacities, *, always: int, slots: int, at_once: int,
    cached: bool,
) -> tuple[list[int], int, int]:  # fmt: skip
    """Homes (DEVICE or HOST), how many slots there are, and their size."""
    capacity = capacities.device
    largest = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    total = sum(sizes)
    # How many slots are missing and what is streamed, how many of the largest stay, and the slots.
    best: tuple[tuple[int, int], int, int] | None = None
    kept = 0
    for stay in range(len(largest)):
        slot = sizes[largest[stay]]
        left = capacity - always - kept
        count = min(slots, left // slot if slot else slots, len(largest) - stay)
        if count >= min(at_once, len(largest) - stay) and count > 0:
            streamed = total - kept - max(0, left - count * slot)
            # Fewer slots than asked for are a last resort: copies then wait for what computes.
            rank = (slots - count if len(largest) - stay > count else 0, streamed)
            if best is None or rank < best[0]:
                best = (rank, stay, count)
        kept += slot
    if best is None:
        staying = itertools.accumulate((sizes[i] for i in largest), initial=0)
        least = always + min(total, *(stay + at_once * sizes[i] for stay, i in zip(staying, largest, strict=False)))
        name = blobs[largest[0]].name
        raise CapacityError(
            f"level 1 has room for {enough(capacity)}: with {enough(always)} that always stay there and {at_once} of "
            f"the largest blocks at once ({name}, {enough(sizes[largest[0]])}) it would take {enough(least)}",
            remedy=f"give level 1 at least {enough(least + capacities.taken[DEVICE])}",
        )
    _, stay, count = best
    slot = sizes[largest[stay]]
    homes = [HOST] * len(sizes)
    for i in largest[:stay]:
        homes[i] = DEVICE
    left = capacity - always - count * slot - sum(sizes[i] for i in largest[:stay])
    for i in reversed(largest):
        if homes[i] != DEVICE and sizes[i] <= slot * _SMALL and sizes[i] <= left:
            homes[i] = DEVICE
            left -= sizes[i]
    others = [i for i in range(len(sizes)) if homes[i] != DEVICE]
    if cached:
        return homes, min(count + (left // slot if slot else 0), len(others)), slot
    for i in spread(others, sizes, left):
        homes[i] = DEVICE
    return homes, count, slot


def _below(sizes: list[int], streamed: list[int], capacities: Capacities, staging: int) -> tuple[list[int], int]:
    """Which of `streamed` lie on disk, and how many places of staging there are."""
    need, host, taken = sum(sizes[i] for i in streamed), capacities.host, capacities.taken[HOST]
    assert host is not None
    if need <= host:
        return [], 0
    if capacities.disk is None:
        raise CapacityError(
            f"{enough(need)} are streamed from host memory, which has room for {enough(host)}",
            remedy=f"give the cpu level at least {enough(need + taken)}, level 1 more, or add an ssd level",
        )
    largest = max(sizes[i] for i in streamed)
    places = min(staging, host // largest)
    if places == 0:
        raise CapacityError(
            f"host memory has room for {enough(host)}, and a block passes through it from the disk: {enough(largest)}",
            remedy=f"give the cpu level at least {enough(largest + taken)}",
        )
    while True:
        stay = set(spread(streamed, sizes, host - places * largest))
        on_disk = [i for i in streamed if i not in stay]
        if places == 1 or sum(sizes[i] for i in on_disk) <= capacities.disk:
            return on_disk, places
        places -= 1  # as a place takes host memory that a block could have


def spread(which: Sequence[int], sizes: Sequence[int], capacity: int) -> list[int]:
    """Of `which`, in order, those that stay within `capacity`: evenly by bytes, and then whatever still fits."""
    total = sum(sizes[i] for i in which)
    if total <= capacity or not which:
        return list(which)
    chosen: list[int] = []
    left = capacity
    # As many as would fit of the average size, in the middle of equal parts of all the bytes.
    count = max(capacity, 0) * len(which) // max(total, 1)
    ends = list(itertools.accumulate(sizes[i] for i in which))
    for part in range(count):
        i = which[bisect.bisect_right(ends, (2 * part + 1) * total // (2 * count))]
        if i not in chosen and sizes[i] <= left:
            chosen.append(i)
            left -= sizes[i]
    for i in sorted(set(which) - set(chosen), key=lambda i: -sizes[i]):
        if sizes[i] <= left:
            chosen.append(i)
            left -= sizes[i]
    return sorted(chosen)


def _made(sizes: list[int], homes: list[int], always: int, slots: int, slot: int, *, staging: int = 0) -> Plan:
    by_home = [sum(size for size, home in zip(sizes, homes, strict=True) if home == level) for level in range(3)]
    on_disk = [size for size, home in zip(sizes, homes, strict=True) if home == DISK]
    place = max(on_disk, default=0) if staging else 0
    return Plan(
        homes=tuple(homes),
        slots=slots,
        slot_bytes=slot,
        staging=staging,
        staging_bytes=place,
        device_bytes=always + by_home[DEVICE] + slots * slot,
        host_bytes=by_home[HOST] + staging * place,
        disk_bytes=by_home[DISK],
        streamed_bytes=by_home[HOST] + by_home[DISK],
    )
