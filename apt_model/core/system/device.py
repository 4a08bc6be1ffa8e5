"""What every vendor's device answers: one abstract class, and the ladder by which a vendor says what is there."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from apt_model.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Presence:
    """What was found of a vendor, rung by rung; the first rung that fails is the reason that it cannot be used."""

    built: bool
    """This torch was built for the vendor."""
    available: bool = False
    """The vendor's runtime answers."""
    count: int = 0
    """How many of its devices there are."""
    why: str = ""
    """What torch or the driver said, when a rung failed."""
    remedy: str | None = None
    """What the user can do about it."""

    @property
    def usable(self) -> bool:
        """Whether there is at least one device to compute on."""
        return self.built and self.available and self.count > 0


class Device(ABC):
    """One vendor's device; making it touches no hardware. Memory is in bytes.

    Args:
        index: which of the vendor's devices; None is the current one, as torch understands it.
    """

    kind: ClassVar[str]
    """The device type in torch's own spelling."""
    stand_ins: ClassVar[frozenset[str]] = frozenset()
    """Names of the methods that do nothing on this vendor, or answer with less than their name says."""

    def __init__(self, index: int | None = None) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.device)!r})"

    @property
    def device(self) -> torch.device:
        """What `Tensor.to` takes; without an index it follows torch's current device."""
        return torch.device(self.kind) if self.index is None else torch.device(self.kind, self.index)

    def get_accelerator_type(self) -> str:
        """'cuda' (NVIDIA, and AMD through ROCm) or 'cpu'."""
        return self.kind

    def supports(self, fn: str) -> bool:
        """Whether the method named `fn` really does here what its name says; `InputError` when there is none."""
        if fn.startswith("_") or not callable(getattr(type(self), fn, None)):
            raise InputError(f"Device.supports: expected the name of a method of Device, got {fn!r}")
        return fn not in self.stand_ins

    def manual_seed(self, seed: int) -> None:
        """Seed every generator that work on this device draws from, the CPU's included."""
        torch.manual_seed(seed)

    def random_state(self) -> torch.Tensor | None:
        """The state of the generator that work on this device draws from; None where that is the CPU's own."""
        return None

    def set_random_state(self, state: torch.Tensor) -> None:
        """Go back to what `random_state` gave."""
        raise InputError(f"{self.device}: expected no state, as it draws from the CPU's generator, got {type(state)}")

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
        """Look for the vendor's devices without starting one."""

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
