"""Streams and events of the device that computes; on a CPU, where a call is done when it returns, they do nothing."""

from typing import Any

import torch
from typing_extensions import Self

from apt_model.core.errors import InputError
from apt_model.core.system.cuda import CudaDevice


class Nothing:
    """A stream or an event on a device that has none."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        """Nothing: it has happened."""

    def record(self, stream: object = None) -> None:
        """Nothing: it is past."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Whether it is over: always."""
        return True


_NOTHING: Any = Nothing()


class Lanes:
    """The device's stream for copies, its events, and whichever stream computes now."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.real = device, device.type != "cpu"
        self.copy: Any = torch.Stream(device=device) if self.real else _NOTHING

    def event(self, *, timed: bool = False) -> Any:
        """A new one; on a CPU nothing."""
        return torch.Event(device=self.device, enable_timing=timed) if self.real else _NOTHING

    def synchronize(self) -> None:
        """Wait for the device, whichever stream it is in."""
        if self.real:
            torch.accelerator.synchronize(self.device)

    def compute(self) -> Any:
        """The stream on which the caller computes."""
        return torch.accelerator.current_stream(self.device) if self.real else _NOTHING

    def refuse_capture(self) -> None:
        """Raise `InputError` where what computes now is recorded as a CUDA graph, to be replayed without us."""
        if self.device.type == "cuda" and CudaDevice.is_capturing():
            raise InputError(
                "a CUDA graph is recorded of blocks that a VGPUStack streams: replays would read slots to which nobody "
                "brings the blocks' weights",
                state="nothing was recorded of the block; the model is usable",
                remedy="have graphs within blocks (for block in model.layers: block.compile(mode='reduce-overhead')), "
                "or give level 1 room for the whole model",
            )
