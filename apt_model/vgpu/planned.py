"""The report on a model in memory: its configuration, and the rates of the stack that it would be attached to."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from apt_model.core.fp4_storage import SCALES
from apt_model.core.system.device import Device
from apt_model.core.system.manager import get_device_manager
from apt_model.core.tensor_files import BITS
from apt_model.vgpu import rates as rates_file
from apt_model.vgpu.layout import Layout
from apt_model.vgpu.measure import disk_gbps, link_gbps, rates_of
from apt_model.vgpu.memory import Memory
from apt_model.vgpu.planner import DISK
from apt_model.vgpu.policy import CYCLIC
from apt_model.vgpu.rates import Rates
from apt_model.vgpu.report import Report, report
from apt_model.vgpu.work import facts_of

# How long each figure is measured where none is kept.
_SECONDS = 0.02


def planned_report(model: nn.Module, layout: Layout, memory: Memory, *, tokens: int, length: int) -> Report:
    """What `layout` means on the levels of `memory`, at the rates that are configured, kept or measured now."""
    dtypes = _dtypes(layout)
    levels = [None if each is None else (each.config.device, each.capacity) for each in _three(memory)]
    found = _rates(layout, memory, dtypes) if layout.policy == CYCLIC else Rates()
    element = BITS[dtypes[0]] // 8
    return report(
        layout, levels, facts_of(_config(model)), found, tokens=tokens, length=length, element=element
    )  # fmt: skip


def _three(memory: Memory) -> Iterable[Any]:
    return memory.first, memory.host, memory.disk


def _config(model: nn.Module) -> Mapping[str, Any]:
    config = getattr(model, "config", None)
    as_dict = getattr(config, "to_dict", None)
    return as_dict() if callable(as_dict) else {}


def _dtypes(layout: Layout) -> list[str]:
    """Of the matrices, that of the most bytes first; at least one."""
    sizes: dict[str, int] = {}
    for window in layout.windows:
        for node in window.node.walk():
            for held in node.own:
                if held.floats and not held.name.endswith(SCALES):
                    sizes[held.dtype] = sizes.get(held.dtype, 0) + held.stored.nbytes
    return sorted(sizes, key=lambda each: -sizes[each]) or ["F32"]


def _rates(layout: Layout, memory: Memory, dtypes: list[str]) -> Rates:
    device = get_device_manager(memory.first.config.device)
    fp4 = any(held.packed for window in layout.windows for node in window.node.walk() for held in node.own)
    found = _kept(device, dtypes) or rates_of(device, dtypes, fp4=fp4, room=memory.first.free, seconds=_SECONDS)
    plan, host, disk = layout.plan, memory.host, memory.disk
    if host is not None and plan.streamed_bytes:
        speed = host.config.speed_gbps or found.link_gbps or link_gbps(memory, device)
        found = dataclasses.replace(found, link_gbps=speed)
    if disk is not None and DISK in plan.homes:
        found = dataclasses.replace(found, disk_gbps=disk.config.speed_gbps or found.disk_gbps or disk_gbps(memory))
    return found


def _kept(device: Device, dtypes: list[str]) -> Rates | None:
    """What was measured on this device before, with the types that are asked for."""
    found = rates_file.kept("cpu" if device.kind == "cpu" else "gpu")
    if found is None or not found.device.startswith(f"{device.name()}, "):
        return None
    return found if all(each in found.products for each in dtypes) else None
