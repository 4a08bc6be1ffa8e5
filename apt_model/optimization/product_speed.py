"""How much faster a linear layer of some size is in 4 bits, measured on the device where it is asked for."""

import functools
import math
import statistics

import torch
from torch.nn import functional as F

from apt_model.core.system.device import Device
from apt_model.core.system.timing import Stopwatch
from apt_model.layers.fp4_linear import FusedFP4Linear

ROWS = (1, 16, 128)
"""Of the inputs: a token, some, and a short text."""
# A 4-bit layer is taken where the mean over the rows is at least the first, and none is below the second.
FASTER, NOT_SLOWER = 1.05, 0.97
# Weights are taken in turns until this is moved, so that no cache holds them.
_BYTES = 128 << 20
_MOST_COPIES = 32
# Of the clock, for each figure, where the device has none of its own.
_SECONDS = 0.02


_measured: dict[tuple[str, torch.dtype, tuple[int, ...], str], tuple[float, ...]] = {}


def speed_up(device: Device, dtype: torch.dtype, shape: tuple[int, ...], form: str) -> tuple[float, ...]:
    """Time of a product with a weight of `shape` in `dtype` over that of its 4-bit layer; measured once.

    One for each of `ROWS`: on a GPU the GPU's own time, elsewhere the clock's.
    """
    key = (f"{device.device} {device.name()}", dtype, shape, form)
    if key not in _measured:
        _measured[key] = _measure(device, dtype, shape, form)
    return _measured[key]


@torch.no_grad()
def _measure(device: Device, dtype: torch.dtype, shape: tuple[int, ...], form: str) -> tuple[float, ...]:
    copies = 1
    if device.kind != "cpu":
        copies = max(1, min(_MOST_COPIES, _BYTES // (math.prod(shape) * dtype.itemsize)))
    source = torch.Generator(device.device).manual_seed(0)  # not the one that the caller draws from
    weights = [torch.randn(shape, generator=source, device=device.device, dtype=dtype) for _ in range(copies)]
    layers = [FusedFP4Linear.from_weight(weight, None, format=form) for weight in weights]
    watch, ratios = Stopwatch(device, _SECONDS), []
    for rows in ROWS:
        x = torch.randn(rows, shape[1], generator=source, device=device.device, dtype=dtype)
        plain = watch.gpu([functools.partial(F.linear, x, weight) for weight in weights])
        ratios.append(plain / watch.gpu([functools.partial(layer, x) for layer in layers]))
    return tuple(ratios)


def worth(ratios: tuple[float, ...]) -> bool:
    """Whether a layer with these speed-ups is better off in 4 bits."""
    return statistics.geometric_mean(ratios) >= FASTER and min(ratios) >= NOT_SLOWER
