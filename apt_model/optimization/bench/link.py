"""The link between host memory and the device, both ways: pinned memory and pageable."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from apt_model.core.system.timing import Stopwatch
from apt_model.optimization.bench.rows import (
    Ceiling,
    Course,
    Row,
    checked,
    failed,
    random_bytes,
    reason,
    wrong_share,
)
from apt_model.vgpu.arena import DevicePin, HostArena
from apt_model.vgpu.units import PAGE, padded

TO, FROM = "link to device", "link from device"
_WAYS = {TO: "host to device", FROM: "device to host"}
NO_LINK = "there is no link: a CPU computes in the host's memory"


def ceilings(watch: Stopwatch, size: int) -> dict[str, Ceiling]:
    """Of one copy from, and one into, memory that torch has pinned; none on a CPU."""
    if watch.device.kind == "cpu":
        return {}
    found = {}
    for name in _WAYS:
        how = f"one copy of {size / 2**20:.0f} MiB of memory that torch has pinned"
        try:
            found[name] = Ceiling(unit="GB/s", how=how, rate=pinned_gbps(watch, name, size))
        except RuntimeError as error:  # a driver that pins nothing
            found[name] = Ceiling(unit="GB/s", how=how, why=reason(error))
    return found


def pinned_gbps(watch: Stopwatch, name: str, size: int) -> float:
    """Of one copy of memory that torch has pinned; `RuntimeError` where it cannot."""
    if not watch.device.supports("pin"):
        raise RuntimeError(f"torch pins no memory for {watch.device.kind}")
    host = watch.device.pin(torch.empty(size, dtype=torch.uint8))
    return size / _copy_s(watch, name, host) / 1e9


def link_rows(course: Course, size: int) -> Iterator[Row]:
    """Copies each way, from and into the VGPU stack's pinned arena, and pageable memory."""
    watch = course.watch
    if watch.device.kind == "cpu":
        yield Row(part="link", what="host to device and back", why=NO_LINK)
        return
    for kind in ("pinned", "pageable"):
        course.told(f"link, {kind} memory")
        with contextlib.ExitStack() as held:
            try:
                host = _pinned(held, watch, size) if kind == "pinned" else torch.empty(size, dtype=torch.uint8)
            except Exception as problem:  # noqa: BLE001 - memory, or what the driver refuses: the rows say so
                yield from (failed(Row(part="link", what=f"{way}, {kind}"), problem) for way in _WAYS.values())
                continue
            for name, way in _WAYS.items():
                row = Row(part="link", what=f"{way}, {kind}", shape=f"{size / 2**20:.0f} MiB", work={name: float(size)})
                error = functools.partial(wrong_bytes, watch, name, host)
                yield checked(row, error, 0.0, functools.partial(_copy_s, watch, name, host))


def _pinned(held: contextlib.ExitStack, watch: Stopwatch, size: int) -> Tensor:
    arena = HostArena(padded(size, PAGE), pin=DevicePin(watch.device))
    held.callback(arena.close)
    held.callback(watch.device.synchronize)
    region = arena.take(size)
    if not region.pinned:
        raise RuntimeError("this device pins no memory, or its driver refuses")
    return region.tensor


def _copy_s(watch: Stopwatch, name: str, host: Tensor) -> float:
    device = torch.empty(host.shape, dtype=host.dtype, device=watch.device.device)
    target, source = (device, host) if name == TO else (host, device)
    return watch.wall(lambda: target.copy_(source, non_blocking=True))


def wrong_bytes(watch: Stopwatch, name: str, host: Tensor) -> float:
    """Share of bytes that arrive as others than were sent."""
    sent = random_bytes(host.numel())
    device = torch.empty(host.shape, dtype=host.dtype, device=watch.device.device)
    if name == TO:
        host.copy_(sent)
        device.copy_(host, non_blocking=True)
        watch.device.synchronize()
        came = device.cpu()
    else:
        device.copy_(sent)
        host.zero_()
        host.copy_(device, non_blocking=True)
        watch.device.synchronize()
        came = host
    return wrong_share(came, sent)
