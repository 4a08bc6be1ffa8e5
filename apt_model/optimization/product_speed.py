"""How much faster a linear layer of some size is in 4 bits, measured on the device where it is asked for."""

import functools
import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from apt_model.core.system.device import Device
from apt_model.core.system.timing import Stopwatch
from apt_model.layers.fp4_linear import FusedFP4Linear

DECODING, WHOLE_TEXTS = (1, 16, 128), (128, 1024)
"""Rows of inputs: of a model that writes a token, some, and a short text; of one that reads a text, and some."""
# A 4-bit layer is taken where the mean over the rows is at least the first, and none is below the second.
FASTER, NOT_SLOWER = 1.05, 0.97
COMPILED = 1.2
"""How much faster a model's layers have to be, all in all, that its blocks are better off in 4 bits than compiled."""
# Weights are taken in turns until this is moved, so that no cache holds them.
_BYTES = 128 << 20
_MOST_COPIES = 32
# Of the clock, for each figure, where the device has none of its own.
_SECONDS = 0.02


class Speed(NamedTuple):
    """Seconds of a product by numbers of rows, plain and in 4 bits."""

    plain: tuple[float, ...]
    packed: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times as fast in 4 bits."""
        return tuple(plain / packed for plain, packed in zip(self.plain, self.packed, strict=True))


_measured: dict[tuple[str, torch.dtype, tuple[int, ...], str, tuple[int, ...]], Speed] = {}


def speed_of(device: Device, dtype: torch.dtype, shape: tuple[int, ...], form: str, rows: tuple[int, ...]) -> Speed:
    """Time of a product with a weight of `shape` in `dtype`, and of its 4-bit layer; measured once.

    One for each of `rows`: on a GPU the GPU's own time, elsewhere the clock's.
    """
    key = (f"{device.device} {device.name()}", dtype, shape, form, rows)
    if key not in _measured:
        _measured[key] = _measure(device, dtype, shape, form, rows)
    return _measured[key]


@torch.no_grad()
def _measure(device: Device, dtype: torch.dtype, shape: tuple[int, ...], form: str, rows: tuple[int, ...]) -> Speed:
    copies = 1
    if device.kind != "cpu":
        copies = max(1, min(_MOST_COPIES, _BYTES // (math.prod(shape) * dtype.itemsize)))
    source = torch.Generator(device.device).manual_seed(0)  # not the one that the caller draws from
    weights = [torch.randn(shape, generator=source, device=device.device, dtype=dtype) for _ in range(copies)]
    layers = [FusedFP4Linear.from_weight(weight, None, format=form) for weight in weights]
    watch, found = Stopwatch(device, _SECONDS), []
    for count in rows:
        x = torch.randn(count, shape[1], generator=source, device=device.device, dtype=dtype)
        plain = watch.gpu([functools.partial(F.linear, x, weight) for weight in weights])
        found.append((plain, watch.gpu([functools.partial(layer, x) for layer in layers])))
    plains, packed = zip(*found, strict=True)
    return Speed(plains, packed)


def worth(ratios: tuple[float, ...]) -> bool:
    """Whether a layer with these speed-ups is better off in 4 bits."""
    return statistics.geometric_mean(ratios) >= FASTER and min(ratios) >= NOT_SLOWER


def in_all(speeds: Iterable[tuple[Speed, bool]]) -> tuple[float, ...]:
    """How many times as fast layers are together, by rows, where those with True are in 4 bits."""
    plain, chosen = [], []
    for speed, packed in speeds:
        plain.append(speed.plain)
        chosen.append(speed.packed if packed else speed.plain)
    return tuple(
        sum(before) / sum(after)
        for before, after in zip(zip(*plain, strict=True), zip(*chosen, strict=True), strict=True)
    )
