"""NVIDIA GPUs, and AMD GPUs through ROCm, which torch also calls CUDA. No other file says `torch.cuda`."""

import contextlib
import functools
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, final

import torch

from apt_model.core.errors import DeviceError
from apt_model.core.system.device import Device, Presence

# Of a graph, to time it.
_REPLAYS = 7
_NVIDIA = Path("/proc/driver/nvidia/version")
# cudaHostRegisterPortable: pinned for every GPU of the process.
_PORTABLE = 1


def _stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


def _empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# What torch's own compiled code calls around a launch, with no frame of Python and no dispatcher: which device is the
# current one, the driver's handle of a device's current stream, and a tensor on the current device, of shape, strides
# and type, that nobody has filled.
_C: Any = torch._C  # noqa: SLF001
_guards = getattr(getattr(_C, "_dynamo", None), "guards", None)
current_index: Callable[[], int] = getattr(_C, "_cuda_getDevice", torch.cuda.current_device)
current_stream: Callable[[int], int] = getattr(_C, "_cuda_getCurrentRawStream", _stream)
empty: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor] = getattr(
    _guards, "_empty_strided_cuda", _empty
)


# A current device within a block of code: device_index(1).
device_index = torch.accelerator.device_index


class Recorded(NamedTuple):
    """A CUDA graph."""

    replay: Callable[[], None]
    """Gives it to the current stream."""
    result: Any
    """What the work returned; the memory is written anew by each replay."""
    pool: Any
    """The memory that it uses."""


@final
class CudaDevice(Device):
    """A GPU behind `torch.cuda`."""

    kind = "cuda"
    standing = "hardware-tested"  # NVIDIA's; on AMD's nothing ran

    @classmethod
    def presence(cls) -> Presence:
        """Look for GPUs; counts only in a torch that was built for them, and where nothing imitates `torch.cuda`.

        torch looks without starting a device, and so a process may still fork, where PYTORCH_NVML_BASED_CUDA_CHECK is 1
        (`manager.ask` sees to that).
        """
        platform = _platform()
        if platform is None:
            return Presence(
                installed=False,
                why=f"torch {torch.__version__} is built with neither CUDA nor ROCm",
                remedy="install a torch built for your GPU (https://pytorch.org/get-started/locally), or take 'cpu'",
            )
        imitator = _imitator()
        if imitator is not None:
            return Presence(
                installed=True,
                why=f"torch.cuda is imitated by {imitator}",
                remedy="leave out what replaces torch.cuda (torch_npu.contrib.transfer_to_npu does), or take 'npu'",
            )
        available = torch.cuda.is_available()
        lister = "rocm-smi" if cls.is_rocm() else "nvidia-smi"
        hider = "HIP_VISIBLE_DEVICES" if cls.is_rocm() else "CUDA_VISIBLE_DEVICES"
        return Presence(
            installed=True,
            loads=True,
            available=available,
            count=torch.cuda.device_count() if available else 0,
            why=f"torch is built for {platform} and finds no GPU",
            remedy=f"see that {lister} lists a GPU and that {hider} does not hide it, or take 'cpu'",
        )

    @staticmethod
    def is_rocm() -> bool:
        """Whether this torch drives AMD GPUs."""
        return torch.version.hip is not None

    def name(self) -> str:
        """The GPU's product name."""
        return torch.cuda.get_device_name(self.index)

    def total_memory(self) -> int:
        """Bytes of the GPU's own memory."""
        return int(torch.cuda.get_device_properties(self.index).total_memory)

    def free_memory(self) -> int:
        """Bytes that the driver has free, and those that torch's allocator keeps unused; starts the device."""
        free, _ = torch.cuda.mem_get_info(self.index)
        return int(free + torch.cuda.memory_reserved(self.index) - torch.cuda.memory_allocated(self.index))

    def memory_allocated(self) -> int:
        """Bytes in live tensors of this process."""
        return torch.cuda.memory_allocated(self.index)

    def peak_memory(self) -> int:
        """Most bytes in live tensors of this process at once."""
        return torch.cuda.max_memory_allocated(self.index)

    def reset_peak_memory(self) -> None:
        """Let `peak_memory` start again from what is held now."""
        # Before the device is started there is no peak, and torch refuses an index.
        if torch.cuda.is_initialized():  # torch leaves it unannotated
            torch.cuda.reset_peak_memory_stats(self.index)

    def empty_cache(self) -> None:
        """Give memory that torch's allocator keeps unused back to the driver."""
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for all streams of the GPU."""
        torch.cuda.synchronize(self.index)

    def random_state(self) -> torch.Tensor | None:
        """The state of the GPU's generator."""
        return torch.cuda.get_rng_state(self.index if self.index is not None else "cuda")

    def set_random_state(self, state: torch.Tensor) -> None:
        """Go back to what `random_state` gave."""
        torch.cuda.set_rng_state(state, self.index if self.index is not None else "cuda")

    def register_host(self, address: int, nbytes: int) -> bool:
        """Pin host memory for every GPU of the process; `DeviceError` with the driver's reason where it refuses."""
        with torch.cuda.device(self.index):
            self._accepted(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE), f"pinning {nbytes} bytes")
        return True

    def unregister_host(self, address: int) -> None:
        """Let go of the range that begins at `address`; copies from and to it are done."""
        with torch.cuda.device(self.index):
            self._accepted(torch.cuda.cudart().cudaHostUnregister(address), "unpinning")

    def _accepted(self, result: Any, what: str) -> None:
        """Raise `DeviceError` unless the runtime's result is 0."""
        if int(result):
            # It stays the runtime's last error, for which torch blames the next kernel: launch one to be blamed.
            with contextlib.suppress(RuntimeError):
                torch.empty(1, device=self.device).fill_(1)
            raise DeviceError(f"{self.device}: {what}: {torch.cuda.cudart().cudaGetErrorString(result)}")

    def current_index(self) -> int | None:
        """The number of the GPU that this is."""
        return torch.cuda.current_device() if self.index is None else self.index

    def stream(self) -> Any:
        """A new stream of the GPU."""
        return torch.Stream(device=self.device)

    def during(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """The stream itself is the context."""
        context: contextlib.AbstractContextManager[Any] = stream
        return context

    def event(self, *, timed: bool = False) -> Any:
        """A new event of the GPU."""
        return torch.Event(device=self.device, enable_timing=timed)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in pinned memory."""
        return tensor.pin_memory()

    def supports_bf16(self) -> bool:
        """NVIDIA: compute capability 8.0 (Ampere) or later. AMD: yes, as torch itself answers for ROCm."""
        return self.is_rocm() or torch.cuda.get_device_capability(self.index) >= (8, 0)

    def compute_capability(self) -> tuple[int, int]:
        """NVIDIA's number for what the GPU can do, (9, 0) for Hopper; (0, 0) for AMD."""
        return (0, 0) if self.is_rocm() else torch.cuda.get_device_capability(self.index)

    def multiprocessors(self) -> int:
        """How many programs run side by side at least."""
        return int(torch.cuda.get_device_properties(self.index).multi_processor_count)

    def cache_bytes(self) -> int:
        """Bytes of the cache that all its programs share."""
        return int(torch.cuda.get_device_properties(self.index).L2_cache_size)

    def seconds(self, work: Callable[[], object]) -> float:
        """Median time of `work` on the GPU alone, from replays of a CUDA graph that holds it: no launch from the host.

        `work` has run before, so that nothing is left to compile.
        """
        with torch.cuda.device(self.index):
            aside = _aside(torch.cuda.current_device())
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                work()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=aside):
                work()
            graph.replay()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            times = []
            for _ in range(_REPLAYS):
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def current_stream(self) -> torch.Stream:
        """The stream on which the caller computes."""
        return torch.cuda.current_stream(self.index)

    def record(self, work: Callable[[], Any], pool: Any = None) -> "Recorded":
        """What `work` gives to the GPU, as a CUDA graph; `work` runs twice before, so that nothing is left to set up.

        Args:
            work: without a wait for the GPU in it, and with its inputs in memory that stays where it is.
            pool: of a graph recorded before, whose memory this one may use too where the two never run side by side.
        """
        with torch.cuda.device(self.index):
            aside = _aside(torch.cuda.current_device())
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    work()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                result = work()
        return Recorded(graph.replay, result, graph.pool())

    def driver(self) -> str | None:
        """NVIDIA's, as its kernel module tells it."""
        try:
            told = _NVIDIA.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        found = re.search(r"Module\b.*?\s(\d+(?:\.\d+)+)\s", told)
        return found[1] if found else None

    @staticmethod
    def toolkit() -> tuple[int, ...]:
        """The version of CUDA, and so of NVIDIA's libraries, that torch was built with; () for ROCm."""
        return tuple(map(int, torch.version.cuda.split("."))) if torch.version.cuda else ()

    @staticmethod
    def is_capturing() -> bool:
        """Whether the current stream records a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()


def _imitator() -> str | None:
    """The module or the file that answers in place of `torch.cuda`, or None where it is torch's own."""
    function = torch.cuda.is_available
    code = getattr(function, "__code__", None)
    if code is not None and Path(code.co_filename).parent == Path(torch.__file__).parent / "cuda":
        return None
    module = getattr(function, "__module__", None) or type(function).__module__
    return module if code is None or module != "torch.cuda" else code.co_filename


@functools.cache
def _aside(index: int) -> torch.cuda.Stream:
    """One a GPU to time work on: for each stream that multiplies, torch keeps tens of MB of workspace for good."""
    return torch.cuda.Stream(index)


def _platform() -> str | None:
    """What this torch was built for, with its version, or None."""
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return None if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
