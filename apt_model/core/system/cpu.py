"""The host's own processor: always there, and what everything falls back to."""

import functools
import platform
from pathlib import Path
from typing import final

import torch

from apt_model.core.system.device import Device, Presence
from apt_model.core.system.host_memory import HostMemory

# How Linux names bf16 dot products: Intel and AMD vectors, Intel tiles, Arm.
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_CPUINFO = Path("/proc/cpuinfo")
_HOST = HostMemory()


@final
class CpuDevice(Device):
    """The CPU and the host's memory, within the limits of the container.

    torch keeps no account of tensors in host memory, so `memory_allocated` is the whole process's resident memory
    (/proc/self/statm), Python and its libraries included, and `peak_memory` is the peak of the same.
    """

    kind = "cpu"
    stand_ins = frozenset({
        "empty_cache", "synchronize", "register_host", "unregister_host", "random_state", "set_random_state", "seconds",
        "driver",
    })  # fmt: skip

    def __init__(self, index: int | None = None, memory: HostMemory | None = None, cpuinfo: Path = _CPUINFO) -> None:
        super().__init__(index)
        self._memory = memory or _HOST
        self._cpuinfo = cpuinfo

    @classmethod
    def presence(cls) -> Presence:
        """One, always."""
        return Presence(built=True, available=True, count=1)

    def supports(self, fn: str) -> bool:
        """As in `Device`; what depends on /proc is true where the system has it."""
        really = {
            "free_memory": lambda: self._memory.free() is not None,
            "memory_allocated": lambda: self._memory.resident() is not None,
            "reset_peak_memory": self._memory.can_reset_peak,
        }
        return super().supports(fn) and really.get(fn, lambda: True)()

    def name(self) -> str:
        """The processor's model, or its architecture where the system does not name the model."""
        return _cpu_field(self._cpuinfo, "model name") or platform.processor() or platform.machine()

    def total_memory(self) -> int:
        """The machine's memory, or the container's limit where that is lower."""
        return self._memory.total()

    def free_memory(self) -> int:
        """What can be had without swapping, under the container's limit; without /proc, what this process leaves."""
        free = self._memory.free()
        return self.total_memory() - self.memory_allocated() if free is None else free

    def memory_allocated(self) -> int:
        """Resident memory of this process (without /proc: its peak)."""
        held = self._memory.resident()
        return self._memory.peak() if held is None else held

    def peak_memory(self) -> int:
        """Peak resident memory of this process."""
        return self._memory.peak()

    def reset_peak_memory(self) -> None:
        """Let `peak_memory` start again from what is held now, where the kernel offers it."""
        self._memory.reset_peak()

    def empty_cache(self) -> None:
        """Nothing: torch keeps no cache of host memory."""

    def synchronize(self) -> None:
        """Nothing: a call on the CPU is done when it returns."""

    def supports_bf16(self) -> bool:
        """Whether the kernel lists bf16 dot products and torch has oneDNN, which uses them."""
        flags = _cpu_field(self._cpuinfo, "flags") or _cpu_field(self._cpuinfo, "Features")  # x86, Arm
        has_onednn: bool = torch.backends.mkldnn.is_available()  # torch leaves it so
        return has_onednn and not _BF16_FLAGS.isdisjoint(flags.split())


@functools.cache
def _cpu_field(cpuinfo: Path, name: str) -> str:
    """The first value of a field of /proc/cpuinfo, empty where there is none; it stays the same while we run."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    pairs = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in pairs if key.strip() == name), "")
