"""What a stack would do with a model: what lives where, how long a pass takes, and what bounds it."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from apt_model.vgpu.memory import Memory
from apt_model.vgpu.planner import DEVICE, DISK, HOST, Plan
from apt_model.vgpu.units import MB, PAGE

# Of what is copied, and of a product's sides, to learn a rate: long enough to be one, short enough to be no bother.
_PROBE, _ROUNDS = 64 * MB, 5
_SIDE_GPU, _SIDE_CPU, _SIDE_LEAST = 4096, 512, 64
_SLOWER = 1.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A plan and its prediction; seconds of one pass over all blocks, None where a rate is not known."""

    levels: list[dict[str, Any]]
    """Of each: device, capacity_mb, planned_mb, and how many blocks live there."""
    slots: int
    streamed_mb: float
    tokens: int
    compute_s: float
    link_s: float | None
    disk_s: float | None
    bound: str
    """'compute', 'link' or 'disk': the slowest, which the prediction is."""
    tokens_for_slow_down: int | None
    """Tokens a pass from which it takes at most 1.15 of what compute alone takes."""

    @property
    def pass_s(self) -> float:
        """The prediction."""
        return max(self.compute_s, self.link_s or 0.0, self.disk_s or 0.0)

    def __str__(self) -> str:
        lines = [f"{'level':<8} {'capacity MB':>12} {'planned MB':>12} {'blocks':>7}"]
        lines += [
            f"{each['device']:<8} {each['capacity_mb']:>12,.1f} {each['planned_mb']:>12,.1f} {each['blocks']:>7}"
            for each in self.levels
        ]
        parts = {"compute": self.compute_s, "link": self.link_s, "disk": self.disk_s}
        shown = ", ".join(f"{name} {seconds:.4f} s" for name, seconds in parts.items() if seconds is not None)
        lines.append(f"{self.streamed_mb:,.1f} MB a pass through {self.slots} slots")
        lines.append(f"{self.tokens} tokens: {self.pass_s:.4f} s a pass, bound by {self.bound} ({shown})")
        if self.tokens_for_slow_down is not None:
            lines.append(f"within {_SLOWER} of compute alone from {self.tokens_for_slow_down} tokens a pass on")
        return "\n".join(lines)


def report(model: nn.Module, plan: Plan, memory: Memory, tokens: int) -> Report:
    """Predict a forward of `tokens` tokens by rates that are configured or measured here."""
    on_disk = sum(1 for home in plan.homes if home == DISK)
    planned = (plan.device_bytes, plan.host_bytes, plan.disk_bytes)
    levels = []
    for number, level in ((DEVICE, memory.first), (HOST, memory.host), (DISK, memory.disk)):
        if level is not None:
            levels.append(
                {
                    "device": level.config.device,
                    "capacity_mb": level.capacity / MB,
                    "planned_mb": planned[number] / MB,
                    "blocks": sum(1 for home in plan.homes if home == number),
                }
            )
    per_token = _operations(model) / _operations_per_s(model, memory)
    link_s = None
    if memory.host is not None and plan.streamed_bytes:
        speed = memory.host.config.speed_gbps
        rate = speed * 1e9 if speed else _link_bytes_per_s(memory)
        link_s = plan.streamed_bytes / rate if rate else None
    disk_s = None
    if memory.disk is not None and on_disk:
        speed = memory.disk.config.speed_gbps
        rate = speed * 1e9 if speed else _disk_bytes_per_s(memory)
        disk_s = plan.disk_bytes / rate if rate else None
    compute_s = per_token * tokens
    parts = {"compute": compute_s, "link": link_s or 0.0, "disk": disk_s or 0.0}
    waiting = max(parts["link"], parts["disk"])
    return Report(
        levels=levels,
        slots=plan.slots,
        streamed_mb=plan.streamed_bytes / MB,
        tokens=tokens,
        compute_s=compute_s,
        link_s=link_s,
        disk_s=disk_s,
        bound=max(parts, key=lambda name: parts[name]),
        tokens_for_slow_down=-(-int(waiting / _SLOWER * 1e9) // max(1, int(per_token * 1e9))) if waiting else None,
    )


def _operations(model: nn.Module) -> int:
    """Of one token: two for each weight that is multiplied with, of which a packed byte holds two."""
    count = 0
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() >= 2 and parameter.dtype in (torch.uint8, torch.int32):
                    count += 2 * parameter.numel() * parameter.element_size()
                elif parameter.dim() >= 2 and parameter.is_floating_point() and parameter.element_size() > 1:
                    count += parameter.numel()
    return 2 * max(count, 1)


def _operations_per_s(model: nn.Module, memory: Memory) -> float:
    """Of a square product in the type that most of the model's weights have."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1:
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    dtype = max(sizes, key=lambda each: sizes[each], default=torch.get_default_dtype())
    side = _SIDE_GPU if memory.lanes.real else _SIDE_CPU
    side = max(_SIDE_LEAST, min(side, int((memory.first.free / 16) ** 0.5) // _SIDE_LEAST * _SIDE_LEAST))
    one = torch.randn(side, side, device=memory.lanes.device).to(dtype)
    return 2 * side**3 / _seconds(memory, lambda: one @ one)


def _link_bytes_per_s(memory: Memory) -> float | None:
    """From the arena to level 1, as far as both have room for a moment; None where they have none."""
    host, first = memory.host, memory.first
    assert host is not None
    size = min(_PROBE, first.free, host.free) // PAGE * PAGE
    if not size:
        return None
    what = "a copy to learn the link's rate"
    first.take(size, what)
    try:
        region = memory.take_host(size, what)
        try:
            target = torch.empty(size, dtype=torch.uint8, device=memory.lanes.device)
            return size / _seconds(memory, lambda: target.copy_(region.tensor, non_blocking=True))
        finally:
            memory.give_host(region)
    finally:
        first.give(size)


def _disk_bytes_per_s(memory: Memory) -> float | None:
    """Of a blob that is written for this and removed, as far as there is room."""
    assert memory.store is not None
    assert memory.disk is not None
    size = min(_PROBE, memory.disk.free) // PAGE * PAGE
    if not size:
        return None
    memory.disk.take(size, "a blob to learn the disk's rate")
    data = torch.zeros(size, dtype=torch.uint8)
    try:
        memory.store.write("how fast the disk is", data)
        begin = time.perf_counter()
        memory.store.read("how fast the disk is", data)
        seconds = time.perf_counter() - begin
        memory.store.delete("how fast the disk is")
        return size / seconds
    finally:
        memory.disk.give(size)


def _seconds(memory: Memory, work: Callable[[], object]) -> float:
    """Median time of `work`, until the device has done it."""
    times = []
    for _ in range(_ROUNDS + 1):
        begin = time.perf_counter()
        work()
        memory.lanes.compute().synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])
