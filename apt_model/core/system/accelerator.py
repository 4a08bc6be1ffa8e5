"""What accelerators share: each question goes to the vendor's module of torch, then to torch.accelerator, then here."""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch

from apt_model.core.errors import DeviceError
from apt_model.core.system.device import Device
from apt_model.core.system.presence import Presence
from apt_model.core.system.streams import NOTHING
from apt_model.core.system.trial import is_installed, try_package

Call = Callable[..., Any]


class Question(NamedTuple):
    """What a method of Device asks: the function's name in the vendor's module and in torch.accelerator."""

    module: str
    general: str | None
    default: Any
    """What is answered where there is neither."""


# By the method's name.
QUESTIONS = {
    "synchronize": Question("synchronize", "synchronize", None),
    "empty_cache": Question("empty_cache", "empty_cache", None),
    "memory_allocated": Question("memory_allocated", "memory_allocated", 0),
    "peak_memory": Question("max_memory_allocated", "max_memory_allocated", 0),
    "reset_peak_memory": Question("reset_peak_memory_stats", "reset_peak_memory_stats", None),
    "name": Question("get_device_name", None, ""),
    "manual_seed": Question("manual_seed_all", None, None),
    "random_state": Question("get_rng_state", None, None),
    "set_random_state": Question("set_rng_state", None, None),
    "current_index": Question("current_device", "current_device_index", 0),
    "current_stream": Question("current_stream", "current_stream", NOTHING),
    "supports_bf16": Question("is_bf16_supported", None, False),
}
# Asked by several methods: bytes (free, total), and bytes that torch's allocator holds, used or not.
_MEMORY = Question("mem_get_info", "get_memory_info", None)
_RESERVED = Question("memory_reserved", "memory_reserved", None)
# In torch.accelerator these need an allocator of a kind that not every vendor has.
_OF_THE_ALLOCATOR = frozenset({
    "empty_cache", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "get_memory_info",
    "memory_reserved",
})  # fmt: skip


class Accelerator(Device):
    """A device whose vendor brings a module `torch.<kind>` that looks like `torch.cuda`, as far as it goes.

    A third party's class may be no more than its `kind` and its `package`.
    """

    package: ClassVar[str | None] = None
    """What to import for torch to know the device type; None where torch itself does."""
    patience: ClassVar[float] = 60.0
    remedies: ClassVar[dict[str, str]] = {}
    """What the user can do, by the rung that fails."""

    # --- the ladder

    @classmethod
    def presence(cls) -> Presence:
        """Look at the package in a process of its own, or, where it is loaded already, ask it."""
        if cls.package is None or cls.package in sys.modules:
            found = cls._asked()
        elif is_installed(cls.package):
            found = try_package(cls.package, cls.kind, 0.9 * cls.patience)
        else:
            found = Presence(installed=False, why=f"there is no package {cls.package}")
        if found.failed is None:
            return found
        return Presence(**{**vars(found), "remedy": found.remedy or cls.remedies.get(found.failed)})

    @classmethod
    def _asked(cls) -> Presence:
        """What the vendor's module in this process says."""
        module = getattr(torch, cls.kind, None)
        if module is None:
            return Presence(installed=True, why=f"torch has no module torch.{cls.kind}")
        try:
            available = bool(module.is_available())
            count = int(module.device_count()) if available else 0
        except Exception as error:  # noqa: BLE001 - a broken driver may raise anything
            return Presence(installed=True, loads=True, why=f"{type(error).__name__}: {error}")
        why = "" if available else f"torch.{cls.kind}.is_available() is False"
        return Presence(installed=True, loads=True, available=available, count=count, why=why)

    @classmethod
    def load(cls) -> None:
        """Import the package, so that torch knows the device type."""
        if cls.package is not None:
            importlib.import_module(cls.package)
        if getattr(torch, cls.kind, None) is None:
            raise DeviceError(f"{cls.package} loads, and torch has no module torch.{cls.kind} after it")

    # --- the questions

    def __init__(self, index: int | None = None) -> None:
        super().__init__(index)
        self._where: tuple[int, ...] = () if index is None else (index,)

    def supports(self, fn: str) -> bool:
        """As in `Device`; decided from what the vendor's module, or else torch.accelerator, really has."""
        if not super().supports(fn):
            return False
        if getattr(type(self), fn) is not getattr(Accelerator, fn, None):
            return True  # a vendor's own
        if fn in QUESTIONS:
            return _found(self.kind, QUESTIONS[fn]) is not None
        if fn in ("total_memory", "free_memory"):
            return _found(self.kind, _MEMORY) is not None or (fn == "total_memory" and bool(self._properties_memory()))
        if fn in ("stream", "event", "during"):
            return self._has_streams()
        return fn != "pin" or _pins(self.kind)

    def name(self) -> str:
        """The vendor's name of it, or the device type."""
        return str(_ask(self.kind, "name")(*self._where) or self.kind)

    def total_memory(self) -> int:
        """Bytes of the device's own memory; 0 where nobody says."""
        return self._info()[1] or self._properties_memory()

    def free_memory(self) -> int:
        """Bytes that the device has free, and those that torch's allocator keeps unused; 0 where nobody says."""
        reserved = _found(self.kind, _RESERVED)
        kept = 0 if reserved is None else reserved(*self._where) - self.memory_allocated()
        return self._info()[0] + max(0, kept)

    def memory_allocated(self) -> int:
        """Bytes in live tensors of this process; 0 where nobody says."""
        return int(_ask(self.kind, "memory_allocated")(*self._where))

    def peak_memory(self) -> int:
        """Most bytes in live tensors of this process at once; 0 where nobody says."""
        return int(_ask(self.kind, "peak_memory")(*self._where))

    def reset_peak_memory(self) -> None:
        """Let `peak_memory` start again from what is held now, where the vendor counts."""
        _ask(self.kind, "reset_peak_memory")(*self._where)

    def empty_cache(self) -> None:
        """Give memory that torch keeps for reuse back to the driver; nothing where the vendor has no such thing."""
        _ask(self.kind, "empty_cache")()

    def synchronize(self) -> None:
        """Wait for all work given to the device; nothing where the vendor has no such thing."""
        _ask(self.kind, "synchronize")(*self._where)

    def current_index(self) -> int | None:
        """The number of the device that this is."""
        return int(_ask(self.kind, "current_index")()) if self.index is None else self.index

    def manual_seed(self, seed: int) -> None:
        """Seed the CPU's generators, those torch knows, and the vendor's by its own function."""
        torch.manual_seed(seed)
        _ask(self.kind, "manual_seed")(seed)

    def random_state(self) -> torch.Tensor | None:
        """The state of the vendor's generator; None where it does not give one."""
        state: torch.Tensor | None = _ask(self.kind, "random_state")(self.device)
        return state

    def set_random_state(self, state: torch.Tensor) -> None:
        """Go back to what `random_state` gave."""
        _ask(self.kind, "set_random_state")(state, self.device)

    def supports_bf16(self) -> bool:
        """As the vendor's module answers; False where it does not say."""
        return bool(_ask(self.kind, "supports_bf16")())

    def stream(self) -> Any:
        """The vendor's own kind of stream, or torch's; where there is neither, one that does nothing."""
        if not self._has_streams():
            return NOTHING
        return _new(self.kind, "Stream", device=self.device)

    def current_stream(self) -> Any:
        """The stream that work goes to now."""
        return _ask(self.kind, "current_stream")(*self._where) if self._has_streams() else NOTHING

    def during(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """A context in which work goes to `stream`, by the vendor's module or by the stream itself."""
        enter = getattr(torch.get_device_module(self.kind), "stream", None)
        context: contextlib.AbstractContextManager[Any] = (
            stream if enter is None or stream is NOTHING else enter(stream)
        )
        return context

    def event(self, *, timed: bool = False) -> Any:
        """The vendor's own kind of event, or torch's; where there is neither, one that does nothing."""
        if not self._has_streams():
            return NOTHING
        return _new(self.kind, "Event", self.device, enable_timing=timed)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in pinned memory, where torch has such memory for this device."""
        return tensor.pin_memory() if _pins(self.kind) else tensor

    def _has_streams(self) -> bool:
        return _has_streams(self.kind)

    def _info(self) -> tuple[int, int]:
        info = _found(self.kind, _MEMORY)
        free, total = (0, 0) if info is None else info(*self._where)
        return int(free), int(total)

    def _properties_memory(self) -> int:
        properties = getattr(torch.get_device_module(self.kind), "get_device_properties", None)
        return 0 if properties is None else int(getattr(properties(*self._where), "total_memory", 0))


def _is_current(kind: str) -> bool:
    """Whether torch.accelerator speaks of this device type."""
    found = torch.accelerator.current_accelerator()
    return found is not None and found.type == kind


@functools.cache
def _found(kind: str, question: Question) -> Call | None:
    """The function that answers, or None; looked for once, so that a call costs one look into a table more."""
    own = getattr(torch.get_device_module(kind), question.module, None)
    if callable(own):
        return own
    if question.general is None or not _is_current(kind):
        return None
    if question.general in _OF_THE_ALLOCATOR and not _allocator_answers():
        return None
    general: Call = getattr(torch.accelerator, question.general)
    return general


@functools.cache
def _ask(kind: str, method: str) -> Call:
    """The function behind a method, or one that gives its default."""
    question = QUESTIONS[method]
    return _found(kind, question) or (lambda *_: question.default)


def _allocator_answers() -> bool:
    """Whether the accelerator's allocator is of the kind that torch.accelerator can ask: torch asserts that it is."""
    try:
        torch.accelerator.memory_stats()
    except RuntimeError:
        return False
    return True


@functools.cache
def _has_streams(kind: str) -> bool:
    """Whether one can be made, and an event that is set in it; tried once, which starts the device."""
    try:
        _new(kind, "Event", torch.device(kind)).record(_new(kind, "Stream", device=torch.device(kind)))
    except (RuntimeError, TypeError, AttributeError):  # NotImplementedError is the first of them
        return False
    return _found(kind, QUESTIONS["current_stream"]) is not None


def _new(kind: str, name: str, device: torch.device | None = None, **options: Any) -> Any:
    """A stream or an event: the vendor's own, whose events take no device, or torch's."""
    own = getattr(torch.get_device_module(kind), name, None)
    if own is not None:
        return own(**options)
    general = getattr(torch, name)
    return general(**options) if device is None else general(device, **options)


@functools.cache
def _pins(kind: str) -> bool:
    """Whether torch pins host memory for this device type; tried once."""
    try:
        return _is_current(kind) and torch.zeros(1).pin_memory().is_pinned()
    except RuntimeError:
        return False
