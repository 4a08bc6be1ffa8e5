"""Where a served block's weights are: on the device, there in 4 bits, or streamed through levels of memory."""

import torch
from torch import nn

from apt_model.cloud.server.models import Place, Placed
from apt_model.optimization.convert import quantize as convert
from apt_model.optimization.fp4_config import FP4Config
from apt_model.optimization.vgpu_stack import VGPUStack
from apt_model.vgpu.config import LevelConfig, VGPUConfig


def place_on(device: torch.device) -> Place:
    """On one device."""

    def place(module: nn.Module, quantize: str | None) -> Placed:
        return Placed(_packed(module, quantize, device).to(device), device)

    return place


def place_in(stack: VGPUStack) -> Place:
    """In the levels of a stack, from which one forward at a time takes them."""

    def place(module: nn.Module, quantize: str | None) -> Placed:
        # A model that is one layer has no block to stream: in a list it is one.
        held = _Whole(_packed(module, quantize, stack.device))
        stack.attach(held)
        return Placed(held, stack.device, serial=True, close=lambda: stack.detach(held))

    return place


def levels(device: torch.device, gpu_mb: float | None, ram_mb: float, ssd_mb: float | None) -> VGPUConfig:
    """A stack's configuration; without an accelerator RAM is its first level."""
    found = [LevelConfig(capacity_mb=ram_mb, device="cpu")]
    if device.type != "cpu" and gpu_mb is not None:
        found.insert(0, LevelConfig(capacity_mb=gpu_mb, device=str(device)))
    if ssd_mb is not None:
        found.append(LevelConfig(capacity_mb=ssd_mb, device="ssd"))
    return VGPUConfig(levels=tuple(found))


class _Whole(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.block(*args, **kwargs)


def _packed(module: nn.Module, quantize: str | None, device: torch.device) -> nn.Module:
    if quantize is None:
        return module
    config = FP4Config(format=quantize, skip=())  # type: ignore[arg-type] # looked at by the block
    return convert(module, config, device=device)
