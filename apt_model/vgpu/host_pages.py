"""Pages of host memory: address space first, and pages when they are asked for, by many threads and in huge pages.

Advice is Linux's; elsewhere pages come plainly, by a write to each.
"""

import ctypes
import errno
import functools
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from apt_model.core.errors import CapacityError
from apt_model.core.system.host_memory import HostMemory
from apt_model.vgpu.units import PAGE, padded, shown

HUGE_PAGE = 2**21

_PIECE = 8 * HUGE_PAGE  # what a thread brings with one call
_HOST = HostMemory()
# Python names some of these; MADV_POPULATE_WRITE is there since Linux 5.14.
_LINUX = sys.platform == "linux"
_NO_RESERVE = 0x4000 if _LINUX else 0
_HUGE, _POPULATE = (14, 23) if _LINUX else (None, None)
_DONT_NEED, _DONT_FORK, _DO_FORK = (4, 10, 11) if _LINUX else (None, None, None)


def reserve(size: int) -> tuple[mmap.mmap, int, int]:
    """Address space without memory; where in it a huge page begins that `size` bytes follow, and that address.

    The mapping is not to be closed by its name: torch keeps it alive while tensors lie in it, and closing would not
    wait for them.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    try:
        memory = mmap.mmap(-1, padded(size, HUGE_PAGE) + HUGE_PAGE, flags=flags)
    except OSError as error:
        raise CapacityError(f"host arena: no address space for {shown(size)}: {error.strerror}") from error
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    return memory, -address % HUGE_PAGE, padded(address, HUGE_PAGE)


def require_free(size: int) -> None:
    """Refuse what the machine or the container has not got, as the kernel would kill the process for it."""
    free = free_bytes()
    if free is not None and size > free:
        raise CapacityError(
            f"host arena: {shown(size)} more to commit, and the machine, or the control group's limit, leaves "
            f"{shown(free)} free",
            remedy="give the host's level less (capacity_mb), or end what else holds memory",
        )


def is_free(size: int) -> bool:
    """Whether the machine has so much, as far as it says."""
    free = free_bytes()
    return free is None or size <= free


def free_bytes() -> int | None:
    """What the machine and every control group around this process leave; None where the system does not say."""
    return _HOST.free()


def bring(address: int, size: int, threads: int) -> None:
    """Have the pages of a range there, all or, with `CapacityError`, none."""
    _advise(_HUGE, address, size)  # small pages where the kernel has no huge ones
    pieces = range(address, address + size, _PIECE)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_touch, pieces, [min(_PIECE, address + size - piece) for piece in pieces]))
    except OSError as error:
        _advise(_DONT_NEED, address, size)
        raise CapacityError(f"host arena: the system gives no {shown(size)} more: {error.strerror}") from error


def keep_from_children(address: int, size: int, *, keep: bool) -> None:
    """Leave pinned pages out of forked processes, which would get copies at once, as a device may be writing there."""
    _advise(_DONT_FORK if keep else _DO_FORK, address, size)


def default_threads() -> int:
    """One a core that this process may use, up to 16."""
    return min(16, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)


@functools.cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)  # lets other threads run during a call
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library


def _advise(advice: int | None, address: int, size: int) -> int:
    """0, or the number of the kernel's error, EINVAL for advice that it does not know."""
    if advice is None:
        return errno.EINVAL
    return ctypes.get_errno() if _libc().madvise(address, size, advice) else 0


def _touch(address: int, size: int) -> None:
    failed = _advise(_POPULATE, address, size)
    if failed == errno.EINVAL:
        memory: np.ndarray = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address))
        memory[::PAGE] = 0
    elif failed:
        raise OSError(failed, os.strerror(failed))
