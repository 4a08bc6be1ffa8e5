"""What every vendor's device answers: one abstract class."""

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from apt_model.core.errors import InputError
from apt_model.core.system.presence import Presence
from apt_model.core.system.streams import NOTHING

__all__ = ["Device", "Presence"]

# What a device may leave as it is here: then it has no such thing, and says so in `supports`.
_OPTIONAL = (
    "register_host", "unregister_host", "pin", "stream", "event", "current_stream", "during", "random_state",
    "set_random_state", "seconds", "driver",
)  # fmt: skip


class Device(ABC):
    """One vendor's device; making it touches no hardware. Memory is in bytes.

    Args:
        index: which of the vendor's devices; None is the current one, as torch understands it.
    """

    kind: ClassVar[str]
    """The device type in torch's own spelling."""
    stand_ins: ClassVar[frozenset[str]] = frozenset()
    """Names of the methods that do nothing on this vendor, or answer with less than their name says."""
    standing: ClassVar[str] = "not tested here"
    """On what this package's tests ran: hardware-tested, backend-tested or logic-tested."""
    patience: ClassVar[float] = 20.0
    """Seconds in which `presence` answers, or the vendor counts as not there."""

    def __init__(self, index: int | None = None) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.device)!r})"

    @property
    def device(self) -> torch.device:
        """What `Tensor.to` takes; without an index it follows torch's current device."""
        return torch.device(self.kind) if self.index is None else torch.device(self.kind, self.index)

    def get_accelerator_type(self) -> str:
        """'cuda' (NVIDIA, and AMD through ROCm), 'hpu', 'npu', 'xpu', 'cpu', or the type of a third party's device."""
        return self.kind

    def supports(self, fn: str) -> bool:
        """Whether the method named `fn` really does here what its name says; `InputError` when there is none."""
        if fn.startswith("_") or not callable(getattr(type(self), fn, None)):
            raise InputError(f"Device.supports: expected the name of a method of Device, got {fn!r}")
        left = fn in _OPTIONAL and getattr(type(self), fn) is getattr(Device, fn)
        return not left and fn not in self.stand_ins

    @classmethod  # noqa: B027 - most vendors have nothing to bring
    def load(cls) -> None:
        """Bring what torch needs for this device type into the process; only called where `presence` is usable."""

    def manual_seed(self, seed: int) -> None:
        """Seed every generator that work on this device draws from, the CPU's included."""
        torch.manual_seed(seed)

    def random_state(self) -> torch.Tensor | None:
        """The state of the generator that work on this device draws from; None where that is the CPU's own."""
        return None

    def set_random_state(self, state: torch.Tensor) -> None:
        """Go back to what `random_state` gave."""
        raise InputError(f"{self.device}: expected no state, as it draws from the CPU's generator, got {type(state)}")

    def supports_dtype(self, dtype: torch.dtype) -> bool:
        """Whether torch multiplies matrices of `dtype` here, natively or not: tried once, which starts the device."""
        return _multiplies(self.device, dtype)

    def current_index(self) -> int | None:
        """The number of the device that this is; None for the CPU, of which there is one."""
        return self.index

    def stream(self) -> Any:
        """A new queue of work beside the current one; one that does nothing where the vendor has no such thing."""
        return NOTHING

    def current_stream(self) -> Any:
        """The queue that work goes to now."""
        return NOTHING

    def during(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """A context in which work goes to `stream`, one of `stream()` or `current_stream()`."""
        return contextlib.nullcontext(stream)

    def event(self, *, timed: bool = False) -> Any:  # noqa: ARG002
        """A new mark to set in streams and to wait for; `timed` ones also say what time lies between two."""
        return NOTHING

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in host memory that the device copies by itself, or as it is where torch has none for the vendor."""
        return tensor

    def register_host(self, address: int, nbytes: int) -> bool:  # noqa: ARG002
        """Pin host memory, so that the device copies it by itself; False where the vendor has no such thing.

        `DeviceError` where the driver refuses, with its reason.
        """
        return False

    def unregister_host(self, address: int) -> None:  # noqa: B027
        """Let go of the range of `register_host` that begins at `address`, before its memory goes."""

    def seconds(self, work: Callable[[], object]) -> float | None:  # noqa: ARG002
        """Time of `work`, which has run before, by the device's own clock; None where only the host's can tell."""
        return None

    def driver(self) -> str | None:
        """The version of the vendor's driver; None where there is none, or it does not say."""
        return None

    @classmethod
    @abstractmethod
    def presence(cls) -> Presence:
        """Look for the vendor's devices without starting one; may be called in any thread."""

    @abstractmethod
    def name(self) -> str:
        """What the vendor calls it."""

    @abstractmethod
    def total_memory(self) -> int:
        """Bytes that there are."""

    @abstractmethod
    def free_memory(self) -> int:
        """Bytes that new tensors could take now."""

    @abstractmethod
    def memory_allocated(self) -> int:
        """Bytes held now."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Most bytes held at once since the start or the last `reset_peak_memory`."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Let `peak_memory` start again from what is held now."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Give memory that torch keeps for reuse back to the system."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work given to the device is done."""

    @abstractmethod
    def supports_bf16(self) -> bool:
        """Whether it multiplies bf16 matrices natively, rather than by way of fp32."""


@functools.cache
def _multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        square = torch.zeros(16, 16, device=device).to(dtype)
        (square @ square).cpu()  # which waits for the device, and so for its errors
    except (RuntimeError, TypeError):  # NotImplementedError is the first of them
        return False
    return True
