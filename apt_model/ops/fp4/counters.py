"""Counters by which the programs of a launch know whose it is to add up what all have left in memory.

They are zeros, which every launch leaves as it found them; two launches that may run at once must not share any. So
each stream of a device has some of its own, for whatever weight. A recorded CUDA graph has those of its weights
instead, as two graphs may have been recorded on one stream and run on two: only graphs of one weight are not to run at
once.

Those of streams are all made together, when a weight is first brought into the kernels' order: never in the middle of a
launch, which may be one whose memory torch.compile means to take back.
"""

import threading

import torch
from torch import Tensor

from apt_model.core.system import cuda

# Streams of a device that have counters of their own, and how many each; beyond, a launch makes its own.
STREAMS, EACH = 128, 512
_made: dict[int, Tensor] = {}
# Device and stream -> which are its own.
_seats: dict[tuple[int, int], int] = {}
_LOCK = threading.Lock()


def prepare(device: torch.device) -> None:
    """Make the counters of a GPU's streams, unless they are there."""
    if device.type == "cuda" and device.index not in _made:
        with _LOCK:
            if device.index not in _made:
                made = torch.zeros(STREAMS, EACH, dtype=torch.int32, device=device)
                cuda.CudaDevice(device.index).synchronize()  # other streams do not wait for this one
                _made[device.index] = made


def take(count: int, held: Tensor, index: int) -> Tensor:
    """At least `count` zeros for a launch on the current stream of GPU `index`; `held` are those of the weight."""
    if cuda.CudaDevice.is_capturing():
        return held if count <= len(held) else held.new_zeros(count)
    seat = _seat(index)
    if count > EACH or seat >= STREAMS:
        return held.new_zeros(count)
    prepare(held.device)
    return _made[index][seat]


def _seat(index: int) -> int:
    """The number of a device's current stream, in the order in which they came here."""
    key = index, cuda.current_stream(index)
    found = _seats.get(key)
    if found is None:
        with _LOCK:
            found = _seats.setdefault(key, sum(device == index for device, _ in _seats))
    return found
