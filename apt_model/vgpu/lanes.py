"""Streams and events of the device that computes; where a call is done when it returns, they do nothing."""

import contextlib
from typing import Any

from apt_model.core.errors import InputError
from apt_model.core.system.cuda import CudaDevice
from apt_model.core.system.device import Device


class Lanes:
    """The device's stream for copies, its events, and whichever stream computes now."""

    def __init__(self, device: Device) -> None:
        self._device, self.device = device, device.device
        self.real = device.kind != "cpu"
        """Whether the device has memory of its own, to which blocks are copied."""
        self.streams = device.supports("stream")
        """Whether copies run beside what computes, and the host ahead of both."""
        self.copy: Any = device.stream()

    def event(self, *, timed: bool = False) -> Any:
        """A new one; one that is always over where there are no streams."""
        return self._device.event(timed=timed)

    def synchronize(self) -> None:
        """Wait for the device, whichever stream it is in."""
        self._device.synchronize()

    def compute(self) -> Any:
        """The stream on which the caller computes."""
        return self._device.current_stream()

    def copying(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which copies go to the stream for them."""
        return self._device.during(self.copy)

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
