"""All rates of this machine, its link, its disk and our own hooks included: what `apt-model plan --measure` runs."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from apt_model.core.system.device import Device
from apt_model.vgpu.measure import Probe, disk_gbps, link_gbps, rates_of
from apt_model.vgpu.rates import Rates
from apt_model.vgpu.stack import LevelStack

# MB of the levels of the stack that measures: room for what is copied, and for what is read.
_LEVELS = (200, 200, 300)
_WIDTH, _BLOCKS = 64, 12


def measure(device: Device, dtypes: Sequence[str], path: str | None = None) -> Rates:
    """Rates of this machine.

    Args:
        device: where models compute.
        dtypes: of their weights ("BF16" and the like).
        path: a folder on the disk that is measured; None: a temporary one.
    """
    found = rates_of(device, dtypes)
    link, disk = measure_lanes(device, path)
    return dataclasses.replace(found, link_gbps=link, disk_gbps=disk, hook_s=_hook(device))


def measure_lanes(device: Device, path: str | None = None) -> tuple[float | None, float | None]:
    """GB/s of the link to `device` and of the disk, as a stack of a few MB finds them; None where there is no room."""
    below = [{"capacity_mb": _LEVELS[1], "device": "cpu"}, {"capacity_mb": _LEVELS[2], "device": "ssd", "path": path}]
    with LevelStack({"levels": [{"capacity_mb": _LEVELS[0], "device": _name(device)}, *below]}) as stack:
        memory = stack._memory  # noqa: SLF001 - the same package
        return link_gbps(memory, device), disk_gbps(memory)


def _name(device: Device) -> str:
    """With its number, where it has one."""
    index = device.current_index()
    return device.kind if index is None or device.kind == "cpu" else f"{device.kind}:{index}"


def _hook(device: Device) -> float:
    """Seconds of the host that a block costs for being streamed: of tiny blocks, with and without."""
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(_BLOCKS)))
    probe, x = Probe(device, 0), torch.zeros(1, _WIDTH, device=device.device)
    size = sum(parameter.nbytes for parameter in model[0].parameters())
    levels = [
        {"capacity_mb": 4 * (size + 4096) / 1e6, "device": _name(device)},
        {"capacity_mb": 4.2, "device": "cpu"},
    ]
    with torch.no_grad(), LevelStack({"levels": levels}) as stack:
        stack.attach(model)
        streamed = probe.time(lambda: model(x))
        stack.detach(model)
        model.to(device.device)
        return max(0.0, (streamed - probe.time(lambda: model(x))) / _BLOCKS)
