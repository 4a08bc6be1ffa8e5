"""The smallest capacities with which a model can be streamed, found by asking for plans. Pure."""

from collections.abc import Callable

from apt_model.core.errors import CapacityError
from apt_model.vgpu.layout import lay_out
from apt_model.vgpu.planner import Capacities
from apt_model.vgpu.tree import Node
from apt_model.vgpu.units import PAGE, padded


def least_device(root: Node, buffers: int, slots: int) -> int:
    """Bytes of level 1 with which a plan is found where the levels below hold everything."""
    below = 2 * root.nbytes + buffers + PAGE
    return _least(below, lambda room: _plan(root, buffers, Capacities(device=room, host=2 * below), slots))


def least_host(root: Node, buffers: int, slots: int, *, device: int, disk: int | None) -> int:
    """Bytes of host memory that do with `device` bytes of level 1, and a disk; 0 where nothing is streamed.

    Raises:
        CapacityError: no host memory would do.
    """
    if _plan(root, buffers, Capacities(device=device, host=0), slots):
        return 0
    most = 2 * root.nbytes + PAGE
    lay_out(root, buffers, Capacities(device=device, host=most, disk=disk), slots)
    return _least(most, lambda room: _plan(root, buffers, Capacities(device=device, host=room, disk=disk), slots))


def _plan(root: Node, buffers: int, capacities: Capacities, slots: int) -> bool:
    try:
        lay_out(root, buffers, capacities, slots)
    except CapacityError:
        return False
    return True


def _least(most: int, fits: Callable[[int], bool]) -> int:
    """Whole pages, of which one less does not do; `most` bytes do."""
    low, high = 0, padded(most) // PAGE
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle * PAGE) else (middle, high)
    return high * PAGE
