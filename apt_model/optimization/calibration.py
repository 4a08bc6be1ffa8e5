"""About a second of measuring: how much faster 4-bit layers are here, and how fast link and disk are.

`apt-model bench` measures the same and more, at leisure.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from apt_model.core.errors import AptError
from apt_model.core.system.device import Device
from apt_model.core.system.manager import get_device_manager
from apt_model.core.system.timing import Stopwatch
from apt_model.optimization.bench import disk, link, products
from apt_model.optimization.bench.rows import NAMES, Course, Row, reason

# A layer that a model has, or a smaller one where memory is short; the many rows of input are those of a prompt.
_LAYERS_GPU = ((4096, 4096), (2048, 2048), (1024, 1024), (256, 256))
_LAYERS_CPU = ((1024, 1024), (512, 512), (256, 256))
_FORMAT, _MANY_GPU, _MANY_CPU = "nvfp4", 4096, 256
_TURNS_GPU, _TURNS_CPU = 128 << 20, 32 << 20
_COPIED, _WRITTEN, _DISK_S, _FIGURE_S = 64 << 20, 64 << 20, 0.1, 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was measured of a device in this process; None where it could not be, and `why` says the reason by name."""

    device: str
    """As torch spells it."""
    name: str
    dtype: str
    """In which the layer with 4-bit weights computes: bf16, fp16, fp32."""
    format: str = _FORMAT
    layer: tuple[int, int]
    """[out, in] of the layer that was measured."""
    few_rows: int = 1
    many_rows: int
    few_speed_up: float | None
    """Times as fast as `nn.Linear` of the same shape in 16 bits, on a CPU in the faster of 16 and 32, at few rows."""
    many_speed_up: float | None
    """The same at many rows."""
    few_seconds: float | None
    """Of one call of the layer with 4-bit weights at few rows: GPU time, on a CPU time of the host."""
    many_seconds: float | None
    link_gbps: float | None
    """From pinned host memory to the device, 10^9 bytes a second; None on a CPU."""
    disk_gbps: float | None
    """Read from the disk that was measured, past the page cache where the file system allows it."""
    why: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The reason for each None, by the field's name."""
    seconds: float
    """That measuring took; the first time on a machine, kernels are compiled too."""


class _Process:
    found: Calibration | None = None


def last() -> Calibration | None:
    """What this process has measured last, or None."""
    return _Process.found


def calibrate(device: Device | None = None, *, folder: Path | None = None, again: bool = False) -> Calibration:
    """Measure a device, its link and a disk, once a process.

    Args:
        device: where models compute; None is the one that "auto" chooses.
        folder: on the disk that is measured; None: the temporary one.
        again: measure anew, also where this process has measured the device.
    """
    device = device or get_device_manager()
    found = _Process.found
    if again or found is None or found.device != str(device.device):
        found = _Process.found = _measured(device, folder)
    return found


def _measured(device: Device, folder: Path | None) -> Calibration:
    begin, real = time.perf_counter(), device.kind != "cpu"
    watch, why = Stopwatch(device, _FIGURE_S), dict[str, str]()
    turns, many = (_TURNS_GPU, _MANY_GPU) if real else (_TURNS_CPU, _MANY_CPU)
    layers = _LAYERS_GPU if real else _LAYERS_CPU
    shape = products.fitting(layers, many, turns, products.free_bytes(device) // 2)[0]
    with torch.inference_mode():
        rows = list(products.layer_rows(Course(watch), shape, (1, many), turns, (_FORMAT,)))
        link_gbps = _link(watch, why)
    few, most = (_packed(rows, count, f"{name}_speed_up", why) for name, count in (("few", 1), ("many", many)))
    return Calibration(
        device=str(device.device), name=device.name(), dtype=NAMES[products.native(device)], layer=shape,
        many_rows=many, few_speed_up=few.speed_up, many_speed_up=most.speed_up, few_seconds=few.seconds,
        many_seconds=most.seconds, link_gbps=link_gbps, disk_gbps=_disk(folder, why), why=why,
        seconds=time.perf_counter() - begin,
    )  # fmt: skip


def _packed(rows: list[Row], count: int, name: str, why: dict[str, str]) -> Row:
    """The row of the layer with 4-bit weights; why there is no speed-up, where there is none."""
    found = next((row for row in rows if (row.what, row.rows) == (_FORMAT, count)), rows[0])
    if found.speed_up is None:
        peers = [row.why for row in rows if row.rows == count and row.why]
        why[name] = found.why or "; ".join(peers)
        if found.seconds is None:
            why[name.replace("speed_up", "seconds")] = why[name]
    return found


def _link(watch: Stopwatch, why: dict[str, str]) -> float | None:
    if watch.device.kind == "cpu":
        why["link_gbps"] = link.NO_LINK
        return None
    try:
        return link.pinned_gbps(watch, link.TO, min(_COPIED, products.free_bytes(watch.device) // 4))
    except RuntimeError as error:
        why["link_gbps"] = reason(error)
        return None


def _disk(folder: Path | None, why: dict[str, str]) -> float | None:
    try:
        with disk.Scratch(folder, _WRITTEN, _DISK_S) as scratch:
            scratch.write()
            out = disk.aligned(scratch.size)
            taken = min(scratch.read(out) for _ in range(2))
            if torch.equal(out, scratch.data):
                return scratch.size / taken / 1e9
            why["disk_gbps"] = "the file was read as other bytes than were written"
    except (AptError, OSError) as error:
        why["disk_gbps"] = reason(error)
    return None
