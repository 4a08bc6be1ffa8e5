"""What a stack has to keep bytes in."""

import weakref
from pathlib import Path
from typing import Any, NamedTuple

from apt_model.core.errors import CapacityError
from apt_model.core.system.manager import get_device_manager
from apt_model.vgpu.arena import DevicePin, HostArena, Region
from apt_model.vgpu.clock import Clock
from apt_model.vgpu.config import DISK, HOST, VGPUConfig
from apt_model.vgpu.disk import DiskStore
from apt_model.vgpu.host_pages import free_bytes
from apt_model.vgpu.lanes import Lanes
from apt_model.vgpu.level import Level
from apt_model.vgpu.planner import Capacities
from apt_model.vgpu.units import at_most, padded, shown


class Lent(NamedTuple):
    """Host memory of a model that is gone, which somebody may still see."""

    regions: list[Region]
    seen_by: list["weakref.ref[Any]"]


class Memory(NamedTuple):
    """The levels, and what is behind each: the first has the device of `lanes`."""

    lanes: Lanes
    first: Level
    host: Level | None
    arena: HostArena | None
    disk: Level | None
    store: DiskStore | None
    lent: list[Lent]
    clock: Clock

    def sweep(self) -> None:
        """Give back host memory that nobody sees any more."""
        for each in list(self.lent):
            if not any(seen() is not None for seen in each.seen_by):
                self.lent[:] = [other for other in self.lent if other is not each]
                for region in each.regions:
                    self.give_host(region)

    def take_host(self, count: int, what: str) -> Region:
        """Whole pages of the host's memory; `CapacityError` where the level or the arena has none such."""
        assert self.host is not None
        assert self.arena is not None
        self.host.take(padded(count), what)
        try:
            return self.arena.take(padded(count))
        except BaseException:
            self.host.give(padded(count))
            raise

    def give_host(self, region: Region) -> None:
        """Undo `take_host`."""
        assert self.host is not None
        assert self.arena is not None
        self.arena.give(region)
        self.host.give(region.nbytes)

    def capacities(self) -> Capacities:
        """What each level has room for, and holds already."""
        levels = (self.first, self.host, self.disk)
        device, host, disk = (None if level is None else level.free for level in levels)
        assert device is not None
        first, second, third = (0 if level is None else level.used for level in levels)
        return Capacities(device=device, host=host, disk=disk, taken=(first, second, third))

    @property
    def levels(self) -> list[Level]:
        """Those that there are, the fastest first."""
        return [level for level in (self.first, self.host, self.disk) if level is not None]

    def close(self) -> None:
        """Give all memory and files back."""
        self.sweep()
        if self.arena is not None:
            self.arena.close()
        if self.store is not None:
            self.store.close()


def memory_of(config: VGPUConfig) -> Memory:
    """Make what a configuration asks for.

    Raises:
        CapacityError: the host has less than its levels may hold.
        DeviceError: the first device is not there.
        StorageError: the disk's folder cannot be used.
    """
    _require_host(sum(level.capacity for level in config.levels if level.device == HOST))
    first, *below = config.levels
    manager = get_device_manager(first.device)
    lanes = Lanes(manager)
    kinds = {level.device: level for level in below}
    host, disk = kinds.get(HOST), kinds.get(DISK)
    store = None if disk is None else DiskStore(None if disk.path is None else Path(disk.path), disk.capacity)
    arena = None
    if host is not None:  # a CPU reads host memory as it is
        arena = HostArena(host.capacity, pin=DevicePin(manager) if lanes.real else None)
    below_first = [None if level is None else Level(level) for level in (host, disk)]
    if below_first[1] is not None and store is not None:
        below_first[1].came, below_first[1].went = store.writes, store.reads
    return Memory(lanes, Level(first), below_first[0], arena, below_first[1], store, [], Clock(lanes))


def _require_host(asked: int) -> None:
    """Refuse capacities that the kernel would kill the process for, once they are used."""
    free = free_bytes()
    if free is not None and asked > free:
        raise CapacityError(
            f"the cpu levels may hold {shown(asked)} in all, and the machine, or the control group's memory limit, "
            f"leaves {shown(free)} free",
            remedy=f"give them at most {at_most(free)} in all (capacity_mb), or end what else holds memory",
        )
