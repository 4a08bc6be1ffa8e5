"""The machine that is diagnosed, as one object: everything a check reads goes through it."""

import functools
import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from apt_model.cli.diagnosis.packages import Packages
from apt_model.core import env
from apt_model.core.system.host_memory import HostMemory


def room(path: Path) -> tuple[int, int]:
    """Bytes of the file system that `path` is on, and those that are free to this user."""
    found = os.statvfs(path)
    return found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail


@dataclass(frozen=True, kw_only=True)
class System:
    """A machine, an environment and a Python.

    Args:
        variables: of the environment.
        paths: where Python looks for modules, in its order.
        python: the command that starts this Python.
        root: where /proc, /sys, /dev and the like are looked for.
        home: the user's folder, which is named in no JSON.
        private: further words that are named in no JSON.
        version: of Python, as numbers.
        bits: of a pointer.
        uid: of the user; 0 may open every file.
        gids: groups of the user.
        room: bytes of the file system of a path, and free ones.
    """

    variables: Mapping[str, str]
    paths: tuple[str, ...]
    python: tuple[str, ...] = (sys.executable,)
    root: Path = Path("/")
    home: Path = field(default_factory=Path.home)
    private: tuple[str, ...] = ()
    version: tuple[int, ...] = sys.version_info[:3]
    bits: int = 64 if sys.maxsize > 2**32 else 32
    uid: int = field(default_factory=os.getuid)
    gids: frozenset[int] = field(default_factory=lambda: frozenset([os.getgid(), *os.getgroups()]))
    room: Callable[[Path], tuple[int, int]] = room

    @functools.cached_property
    def packages(self) -> Packages:
        """What is installed."""
        return Packages(self.paths)

    @functools.cached_property
    def memory(self) -> HostMemory:
        """The machine's memory and its limits."""
        return HostMemory(self.root)

    @property
    def pip(self) -> str:
        """How pip of this Python is called."""
        import shlex  # noqa: PLC0415 - only for a remedy

        return f"{shlex.quote(self.python[0])} -m pip"

    def at(self, path: str) -> Path:
        """An absolute path, under `root`."""
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str:
        """The text of a file under `root`, empty where it cannot be read."""
        try:
            return self.at(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def get(self, name: str) -> str | None:
        """An environment variable, None when it is unset or empty."""
        return self.variables.get(name) or None

    def program(self, name: str) -> str | None:
        """Where a program is found."""
        return shutil.which(name, path=self.variables.get("PATH", ""))

    @functools.cached_property
    def in_container(self) -> bool:
        """Whether there are the marks of a container."""
        words = ("docker", "kubepods", "containerd", "libpod", "lxc")
        marks = (self.at("/.dockerenv"), self.at("/run/.containerenv"))
        return any(mark.exists() for mark in marks) or any(word in self.read("/proc/1/cgroup") for word in words)

    @functools.cached_property
    def is_wsl(self) -> bool:
        """Whether the kernel is that of Windows' Subsystem for Linux."""
        return "microsoft" in self.read("/proc/version").lower()

    def may_open(self, path: Path) -> bool:
        """Whether this user may read and write the file, by its owner, group and mode."""
        found = path.stat()
        shift = 6 if found.st_uid == self.uid else 3 if found.st_gid in self.gids else 0
        return self.uid == 0 or (found.st_mode >> shift) & 0o6 == 0o6


def here() -> System:
    """The machine, environment and Python of this process."""
    names = (env.environment().get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "HOSTNAME"))
    return System(
        variables=env.environment(), paths=tuple(sys.path), private=tuple({*names, socket.gethostname()} - {""})
    )
