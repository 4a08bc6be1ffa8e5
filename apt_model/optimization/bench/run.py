"""All of the benchmark: ceilings first, then what is measured beside them."""

import dataclasses
import datetime as dt
import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from apt_model import __version__
from apt_model.core.errors import AptError
from apt_model.core.system.cpu import CpuDevice
from apt_model.core.system.device import Device
from apt_model.core.system.timing import Stopwatch
from apt_model.optimization.bench import disk, link, products
from apt_model.optimization.bench.attention import attention_rows
from apt_model.optimization.bench.rows import MEMORY, NAMES, Ceiling, Course, Row, Told, beside, product_name, reason
from apt_model.vgpu.measure import Probe

VERSION = 1
"""Of the report's form."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    shapes: tuple[tuple[int, int], ...]
    """Of layers, [out, in]."""
    counts: tuple[int, ...] = (1, 16, 256, 4096)
    """Rows of x."""
    lengths: tuple[int, ...]
    """Positions of attention."""
    heads: tuple[int, int]
    """How many, and their width."""
    side: int
    """Of the square matrices whose product is a ceiling."""
    turns: int
    """Bytes of weights that take turns."""
    copied: int
    """Bytes that cross the link."""
    written: int
    """Most bytes of a file."""
    seconds: float
    """For which each figure is measured by the host's clock."""
    disk_seconds: float = 0.5
    """For which a file is written or read at most."""
    room: int
    """Bytes of the device that may be used at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was found."""

    version: int = VERSION
    machine: dict[str, Any]
    small: bool
    seconds: float
    """That the run took."""
    ceilings: dict[str, Ceiling]
    rows: list[Row]

    @property
    def wrong(self) -> list[Row]:
        """Rows whose numbers were not what was expected."""
        return [row for row in self.rows if row.status == "wrong"]


_SHAPES_GPU = ((14336, 4096), (4096, 4096), (2048, 2048), (1024, 1024), (256, 256))
_SHAPES_CPU = ((2048, 1024), (1024, 1024), (512, 512), (256, 256))


def sizes_of(device: Device, *, small: bool = False) -> Sizes:
    """What is measured on a device, within half of its free memory (on a CPU a quarter, and 2 GB)."""
    real, free = device.kind != "cpu", products.free_bytes(device)
    room = free // 2 if real else min(free // 4, 2 * 10**9)
    if small:
        return Sizes(
            shapes=((256, 128),), counts=(1, 16), lengths=(64,), heads=(2, 32), side=256, turns=0, copied=1 << 20,
            written=1 << 20, seconds=0.003, disk_seconds=0.1, room=room,
        )  # fmt: skip
    turns = min(256 << 20 if real else 64 << 20, room // 8)
    every = _SHAPES_GPU if real else _SHAPES_CPU
    side = next((side for side in ((8192, 4096, 2048) if real else (2048, 1024)) if 12 * side**2 <= room), 512)
    return Sizes(
        shapes=products.fitting(every, 4096, turns, room)[:2], lengths=(512, 2048, 8192) if real else (128, 512, 2048),
        heads=(16, 128) if real else (8, 64), side=side, turns=turns,
        copied=min(256 << 20, room // 4), written=128 << 20, seconds=0.1 if real else 0.04, room=room,
    )  # fmt: skip


def bench(
    device: Device, *, folder: Path | None = None, small: bool = False, told: Told = lambda _: None,
    sizes: Sizes | None = None, watch: Stopwatch | None = None,
) -> Report:  # fmt: skip
    """Measure a device, its link and a disk.

    Args:
        device: where models compute.
        folder: on the disk that is measured; None: the temporary one.
        small: measure so little that the figures say nothing, to see that everything works.
        told: hears of what is in hand.
        sizes: instead of those of the device.
        watch: instead of one that takes what the sizes say.
    """
    begin = time.perf_counter()
    sizes = sizes or sizes_of(device, small=small)
    watch = watch or Stopwatch(device, sizes.seconds)
    course = Course(watch or Stopwatch(device, sizes.seconds), told)
    with torch.inference_mode():
        limits = _limits(course, sizes)
        rows = [*_computed(course, sizes), *link.link_rows(course, sizes.copied)]
        limits = {name: _higher(limit, again) for (name, limit), again in zip(
            limits.items(), _limits(course, sizes).values(), strict=True)}  # fmt: skip
    of_disk, stored = _stored(course, sizes, folder)
    limits |= of_disk
    rows = [beside(row, limits) for row in (*rows, *stored)]
    return Report(
        machine=machine(device), small=small, seconds=time.perf_counter() - begin, ceilings=limits, rows=rows
    )  # fmt: skip


def _limits(course: Course, sizes: Sizes) -> dict[str, Ceiling]:
    """Of memory, products and the link."""
    device = course.watch.device
    course.told("ceilings of memory, products and link")
    found = {
        MEMORY: _ceiling(
            "GB/s", "a copy within the memory, bytes read and bytes written",
            lambda: Probe(device, sizes.room, sizes.seconds).memory(),
        )
    }  # fmt: skip
    for dtype in products.peers(device):
        how = f"a product of {sizes.side} x {sizes.side} matrices in {NAMES[dtype]}"
        product = functools.partial(products.square_tflops, course.watch, sizes.side, dtype)
        found[product_name(dtype)] = _ceiling("TFLOP/s", how, product)
    device.empty_cache()
    return found | link.ceilings(course.watch, sizes.copied)


def _computed(course: Course, sizes: Sizes) -> Iterator[Row]:
    device = course.watch.device
    for shape in sizes.shapes:
        yield from products.layer_rows(course, shape, sizes.counts, sizes.turns)
        device.empty_cache()
    for length in sizes.lengths:
        yield from attention_rows(course, length, sizes.heads, products.native(device), sizes.room)
    device.empty_cache()


def _stored(course: Course, sizes: Sizes, folder: Path | None) -> tuple[dict[str, Ceiling], list[Row]]:
    course.told("disk")
    try:
        with disk.Scratch(folder, sizes.written, sizes.disk_seconds) as scratch:
            return disk.measured(scratch)
    except (AptError, OSError) as error:
        return {}, [Row(part="disk", what="write and read", why=reason(error))]


def _higher(before: Ceiling, after: Ceiling) -> Ceiling:
    """Of two that were measured at either end of a run, as others use the machine too."""
    return max(before, after, key=lambda each: each.rate or 0.0)


def _ceiling(unit: str, how: str, measured: Callable[[], float]) -> Ceiling:
    try:
        return Ceiling(unit=unit, how=how, rate=measured())
    except Exception as problem:  # noqa: BLE001 - of the driver or memory: rows that need it are without a share
        return Ceiling(unit=unit, how=how, why=reason(problem))


def machine(device: Device) -> dict[str, Any]:
    """What the figures are true for."""
    return {
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "device": {"type": device.kind, "name": device.name(), "memory_bytes": device.total_memory()},
        "driver": device.driver(),
        "processor": CpuDevice().name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _installed("triton"),
        "apt_model": __version__,
        "commit": _commit(),
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of this package's files, where they are in a checkout; None where git does not know this very file."""
    here = Path(__file__)
    told = ""
    for command in (("ls-files", "--error-unmatch", here.name), ("rev-parse", "HEAD")):
        try:
            done = subprocess.run(  # noqa: S603 - a fixed command
                ["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=10, check=True  # noqa: S607
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return None
        told = done.stdout.strip()
    return told
