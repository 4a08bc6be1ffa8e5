"""Checks of memory: limits of control groups and of the user, shared memory. What was locked is a probe's affair."""

import re
from collections.abc import Iterator

from apt_model.cli.diagnosis.finding import Finding
from apt_model.cli.diagnosis.system import System
from apt_model.cli.output import size

MIB = 2**20
_SHARED = 256 * MIB
"""Less free shared memory than this is a warning: Docker gives 64 MiB."""
_FAR_BELOW = 0.5
"""Of the machine's memory: a limit under it is a warning."""
_PIN = 256 * MIB
_PIN_IN_WSL = 2048 * MIB
"""Most that is locked or pinned to try it; WSL is known to stop near 1 GiB."""


def bound(system: System) -> int:
    """Bytes that a probe may lock: never more than an eighth of what is free."""
    free = system.memory.free()
    most = _PIN_IN_WSL if system.is_wsl else _PIN
    return most if free is None else max(0, min(most, free // 8))


def lock_limit(system: System) -> int | None:
    """RLIMIT_MEMLOCK in bytes, as /proc tells it; None: there is none, or it is not told."""
    match = re.search(r"^Max locked memory\s+(\w+)", system.read("/proc/self/limits"), flags=re.MULTILINE)
    return int(match[1]) if match and match[1].isdigit() else None


def limit(system: System) -> Iterator[Finding]:
    """A control group that allows far less than the machine has."""
    machine, allowed = system.memory.machine(), system.memory.total()
    if allowed < _FAR_BELOW * machine:
        remedy = "docker update --memory=BYTES --memory-swap=-1 CONTAINER" if system.in_container else ""
        remedy = remedy or "systemctl show --property=MemoryMax,MemoryHigh session.slice user.slice system.slice"
        yield Finding(
            "APT-D30", "warning", "a control group limits this process to far less memory than the machine has",
            f"limit {size(allowed)} of {size(machine)}", f"{remedy}  # or plan with --ram {allowed // MIB}MB",
        )  # fmt: skip


def locked(system: System) -> Iterator[Finding]:
    """A limit of locked memory under a mebibyte."""
    most = lock_limit(system)
    if most is not None and most < MIB:
        yield Finding(
            "APT-D31", "warning", "the limit of locked memory (RLIMIT_MEMLOCK) is next to nothing",
            f"{size(most)}", "ulimit -l unlimited  # a container: docker run --ulimit memlock=-1",
        )  # fmt: skip


def shared(system: System) -> Iterator[Finding]:
    """A small /dev/shm."""
    place = system.at("/dev/shm")  # noqa: S108 - looked at, not used
    if not place.is_dir():
        return
    total, free = system.room(place)
    if free < _SHARED:
        yield Finding(
            "APT-D32", "warning", "shared memory (/dev/shm) is too small for data loaders with workers",
            f"{size(free)} free of {size(total)}",
            "docker run --shm-size=8g IMAGE" if system.in_container else "sudo mount -o remount,size=50% /dev/shm",
        )  # fmt: skip


CHECKS = (limit, locked, shared)
