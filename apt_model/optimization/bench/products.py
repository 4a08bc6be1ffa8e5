"""Linear layers with 4-bit weights beside the same layers in 16 or 32 bits."""

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from apt_model.core.system.device import Device
from apt_model.core.system.timing import Stopwatch
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.optimization.bench.rows import (
    MEMORY,
    NAMES,
    Course,
    Row,
    beside_peer,
    checked,
    failed,
    limit_of,
    product_name,
    ratio,
    squares,
)

FORMATS = ("nvfp4", "mxfp4")
# Rows that are compared at a time.
_PIECE = 1024
_STD = 0.02
_MOST_COPIES = 64
# Bytes that are taken to be free where a device does not say.
_UNKNOWN = 1 << 30
# Bytes an element of a weight takes in all its forms at once, the fp32 of the comparison included; of x and of y.
_BYTES_OF_WEIGHT, _BYTES_OF_ROWS = 16, 12


class Arm(NamedTuple):
    """A layer, and copies of it that take turns, so that no cache holds the next one's weight."""

    what: str
    dtype: torch.dtype
    layers: list[nn.Linear]
    nbytes: int
    """Of one weight."""
    out_features: int


def fitting(
    shapes: Sequence[tuple[int, int]], rows: int, turns: int, room: int
) -> tuple[tuple[int, int], ...]:  # fmt: skip
    """Those of `shapes` that can be measured in `room` bytes, with so many rows and bytes that take turns; or the last.

    Turns are those of four arms.
    """
    left = room - 4 * turns
    found = [each for each in shapes if _BYTES_OF_WEIGHT * math.prod(each) + _BYTES_OF_ROWS * rows * sum(each) <= left]
    return tuple(found) or (shapes[-1],)


def free_bytes(device: Device) -> int:
    """Of its memory, as far as it says; else as much as any has."""
    return device.free_memory() if device.supports("free_memory") else _UNKNOWN


def native(device: Device) -> torch.dtype:
    """The type in which a device multiplies fastest: bf16, or where it has none fp16 on a GPU and fp32 on a CPU."""
    if device.supports_bf16():
        return torch.bfloat16
    return torch.float32 if device.kind == "cpu" else torch.float16


def peers(device: Device) -> tuple[torch.dtype, ...]:
    """The types of the peers: on a CPU the faster one counts."""
    return tuple(dict.fromkeys((native(device), torch.float32))) if device.kind == "cpu" else (native(device),)


def square_tflops(watch: Stopwatch, side: int, dtype: torch.dtype) -> float:
    """Of a product of two square matrices, the second as a linear layer has its weight."""
    a, b = (torch.randn(side, side, device=watch.device.device).to(dtype) for _ in range(2))
    return 2 * side**3 / watch.gpu([lambda: functional.linear(a, b)]) / 1e12


def layer_rows(
    course: Course, shape: tuple[int, int], counts: Sequence[int], turns: int, formats: Sequence[str] = FORMATS
) -> Iterator[Row]:  # fmt: skip
    """Rows of one [out, in], for each number of rows of x: the peers, and what is compared with the faster.

    Args:
        course: what the benchmark goes by.
        shape: of the weight.
        counts: rows of x.
        turns: bytes of weights that take turns.
        formats: of 4-bit weights.
    """
    device, told = course.watch.device, course.told
    names = f"{shape[0]} x {shape[1]}"
    told(f"linear {names}")
    try:
        dense = nn.Linear(shape[1], shape[0], bias=False, device=device.device).requires_grad_(requires_grad=False)
        nn.init.normal_(dense.weight, std=_STD)
        others = [_dense(dense, dtype, turns) for dtype in peers(device)]
        packed = [_packed(dense, form, native(device), turns) for form in formats]
    except Exception as problem:  # noqa: BLE001 - memory, or the driver: the row says so
        yield failed(Row(part="linear", what="layers", shape=names), problem)
        return
    del dense
    for count in counts:
        x = torch.randn(count, shape[1], device=device.device)
        found = []
        for arm in (*others, *packed):
            told(f"linear {names}, {count:,} row{'s'[: count > 1]}, {arm.what}")
            found.append(_measured(course.watch, Row(part="linear", what=arm.what, shape=names, rows=count), arm, x))
        timed = [row for row in found[: len(others)] if row.seconds is not None]
        peer = min(timed, key=lambda row: row.seconds or 0.0) if timed else None
        yield from found[: len(others)]
        yield from (beside_peer(row, peer) for row in found[len(others) :])


def _measured(watch: Stopwatch, row: Row, arm: Arm, x: Tensor) -> Row:
    given = x.to(arm.dtype)
    rows, width = given.shape
    moved = arm.nbytes + rows * (width + arm.out_features) * given.element_size()
    work = {MEMORY: float(moved), product_name(arm.dtype): 2.0 * rows * width * arm.out_features}
    return checked(
        dataclasses.replace(row, work=work),
        lambda: error_of(arm.layers[0], given),
        limit_of(arm.dtype),
        lambda: watch.gpu([functools.partial(layer, given) for layer in arm.layers]),
    )


def error_of(layer: nn.Linear, x: Tensor) -> float:
    """Of the layer's result from an fp32 product of its own weight's values."""
    got = layer(x)
    weight = (layer.dequantize() if isinstance(layer, FusedFP4Linear) else layer.weight).float()
    pairs = [squares(y, functional.linear(each.float(), weight))
             for y, each in zip(got.split(_PIECE), x.split(_PIECE), strict=True)]  # fmt: skip
    return ratio(*map(sum, zip(*pairs, strict=True)))


def _dense(linear: nn.Linear, dtype: torch.dtype, turns: int) -> Arm:
    layer = copy.deepcopy(linear).to(dtype)
    return Arm(
        f"nn.Linear {NAMES[dtype]}",
        dtype,
        _copies(layer, layer.weight.nbytes, turns),
        layer.weight.nbytes,
        layer.out_features,
    )


def _packed(linear: nn.Linear, form: str, dtype: torch.dtype, turns: int) -> Arm:
    layer = FusedFP4Linear.from_linear(copy.deepcopy(linear).to(dtype), format=form)
    nbytes = sum(each.nbytes for each in layer.parameters())
    return Arm(form, dtype, _copies(layer, nbytes, turns), nbytes, layer.out_features)


def _copies(layer: nn.Linear, nbytes: int, turns: int) -> list[nn.Linear]:
    return [layer, *(copy.deepcopy(layer) for _ in range(min(turns // nbytes, _MOST)))]


_MOST = 63
