"""The host's memory in bytes, as Linux tells it in /proc and in the control groups that a container lives in.

Control groups: docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html. Imports no torch.
"""

import contextlib
import functools
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Of control groups version 2 and version 1.
_LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")
_USAGE_FILES = ("memory.current", "memory.usage_in_bytes")


class HostMemory:
    """Memory of this process and of the machine as this process may use it.

    Args:
        root: where `proc` and the mount points are looked for.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._proc = root / "proc"

    def machine(self) -> int:
        """The machine's memory, whatever limits there are."""
        machine = self._fields(self._proc / "meminfo").get("MemTotal")
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if machine is None else machine

    def total(self) -> int:
        """The machine's memory, or the smallest limit of the control groups around this process."""
        return min([self.machine(), *(limit for _, limit in self._limits())])

    def free(self) -> int | None:
        """What can still be had without swapping, under every limit; None where the system does not say."""
        machine = self._fields(self._proc / "meminfo")
        if "MemAvailable" not in machine:
            return None
        # Version 1 writes a limit beyond any machine where there is none.
        binding = [(group, limit) for group, limit in self._limits() if limit < machine["MemTotal"]]
        return max(0, min([machine["MemAvailable"], *(limit - self._used(group) for group, limit in binding)]))

    def resident(self) -> int | None:
        """What this process holds in memory now; None where the system does not say."""
        pages = self._read(self._proc / "self" / "statm").split()
        return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else None

    def peak(self) -> int:
        """Most that this process held at once."""
        peak = self._fields(self._proc / "self" / "status").get("VmHWM")
        if peak is not None:
            return peak
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def can_reset_peak(self) -> bool:
        """Whether `reset_peak` does anything here."""
        return os.access(self._proc / "self" / "clear_refs", os.W_OK)

    def reset_peak(self) -> None:
        """Let `peak` start again from what is held now, where the kernel offers it."""
        if self.can_reset_peak():
            # "5" resets the peak and nothing else (man 5 proc_pid_clear_refs); some sandboxes refuse the write.
            with contextlib.suppress(OSError):
                (self._proc / "self" / "clear_refs").write_text("5")

    def _limits(self) -> Iterator[tuple[Path, int]]:
        """The control groups around this process that have a limit, with it."""
        for group in self._groups:
            for limit_file in _LIMIT_FILES:
                limit = self._read(group / limit_file).strip()
                if limit.isdigit():  # version 2 writes "max" where there is none
                    yield group, int(limit)

    def _used(self, group: Path) -> int:
        """What the group holds, without the page cache that the kernel gives back first."""
        usage = next((text for file in _USAGE_FILES if (text := self._read(group / file).strip())), "0")
        stat = self._fields(group / "memory.stat")
        # Version 1 counts the group alone under the plain name, and with those inside it under the longer one.
        cache = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        return max(0, int(usage) - cache)

    @functools.cached_property
    def _groups(self) -> list[Path]:
        """The control groups of this process that hold memory limits, each with those around it, as far as visible."""
        groups: list[Path] = []
        mounts = dict(self._mounts())
        for line in self._read(self._proc / "self" / "cgroup").splitlines():
            _, _, place = line.partition(":")
            controllers, _, group = place.partition(":")
            version = "cgroup2" if not controllers else "cgroup" if "memory" in controllers.split(",") else ""
            if version not in mounts:
                continue
            top, point = mounts[version]
            here = PurePosixPath(group)
            # A group outside what is mounted is a container seen from inside: its own group is the mount's top.
            inner = here.relative_to(top) if here.is_relative_to(top) and ".." not in here.parts else PurePosixPath()
            groups += [point.joinpath(*inner.parts[:depth]) for depth in range(len(inner.parts) + 1)]
        return groups

    def _mounts(self) -> Iterator[tuple[str, tuple[PurePosixPath, Path]]]:
        """File system type -> the group at the mount's top and the mount point, for the two kinds that limit memory."""
        for line in self._read(self._proc / "self" / "mountinfo").splitlines():
            place, _, source = line.partition(" - ")
            kind, _, options = source.partition(" ")
            if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.replace(" ", ",").split(",")):
                top, point = place.split()[3:5]
                yield kind, (PurePosixPath(top), self._root / point.lstrip("/"))

    def _fields(self, path: Path) -> dict[str, int]:
        """Lines of `Name: 12 kB` (bytes: 12 * 1024) or `name 12`, as numbers; none where the file is missing."""
        fields = {}
        for line in self._read(path).splitlines():
            match line.replace(":", " ", 1).split():
                case [name, number, *unit] if number.isdigit():
                    fields[name] = int(number) * (1024 if unit == ["kB"] else 1)
        return fields

    @staticmethod
    def _read(path: Path) -> str:
        """The file's text, empty where it cannot be read."""
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
