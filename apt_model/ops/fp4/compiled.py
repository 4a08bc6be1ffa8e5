"""A Triton kernel that is found again without Triton's look-up, which takes longer than a launch."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch


class Compiled:
    """A kernel with all that is decided before it is compiled; its callers keep one for each way to specialise it."""

    def __init__(self, function: Any, constants: dict[str, Any], **options: Any) -> None:
        self.function, self.constants, self.options = function, constants, options
        self.values = tuple(constants.values())  # in the order of the kernel's parameters, after all others
        self.kernel: Any = None

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launch on the current device and stream."""
        if self.kernel is None:  # Triton compiles it, or finds it on disk; its interpreter gives None
            self.kernel = self.function[grid](*arguments, **self.constants, **self.options)
        else:
            self.kernel[grid](*arguments, *self.values)


_known: dict[tuple[Any, ...], Any] = {}


def known(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What `make` made for this key the first time."""
    found = _known.get(key)
    if found is None:
        found = _known[key] = make()
    return found


def on_device(index: int | None) -> contextlib.AbstractContextManager[object]:
    """Where a launch goes; nothing is done where the device is the current one."""
    if index is None or index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(index)
