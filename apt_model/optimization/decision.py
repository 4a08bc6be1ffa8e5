"""What a mode does to a model on this machine, and why: decided before anything is changed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from apt_model.core.errors import CapacityError
from apt_model.core.policy import Policy
from apt_model.core.system.cpu import CpuDevice
from apt_model.core.system.cuda import CudaDevice
from apt_model.core.system.device import Device
from apt_model.layers.packed import PackedModule
from apt_model.ops import HAS_TRITON
from apt_model.optimization.blocks import blocks_of
from apt_model.optimization.convert_plan import Candidate
from apt_model.optimization.four_bits import FourBits, Group
from apt_model.optimization.fp4_config import size_text

MB = 10**6
# Of a free memory, what weights may take; the rest is for activations, and on the host for everybody else.
OF_DEVICE, OF_HOST = 0.7, 0.8
# Beyond its parts' bytes, what a level needs for their alignment.
_SLACK = 1.02
_NVFP4_BYTES = 0.5625


@dataclass(frozen=True)
class Decision:
    """What is to be done with a model; its text is a table for people."""

    mode: str
    model: str
    device: str
    purpose: str
    """training or inference."""
    steps: tuple[tuple[str, str, str], ...]
    """What, what is chosen, and why."""
    groups: tuple[Group, ...]
    precision: str
    """fp32, bf16 autocast, bf16 weights, or "as it is"."""
    quantized: tuple[Candidate, ...] = field(repr=False)
    recompute: str = "off"
    compiles: bool = False
    graphs: bool = False
    levels: tuple[dict[str, Any], ...] = ()
    """Of the stack that streams the weights; none where they are not streamed."""
    moves: bool = False
    """Whether the weights go to the device."""
    weight_bytes: int = 0
    """Of all parameters and buffers, afterwards."""

    def __str__(self) -> str:
        heading = f"{self.mode} mode, {self.model} for {self.purpose} on {self.device}"
        width = max(len(what) for what, _, _ in self.steps)
        lines = [heading, *(f"  {what:<{width}}  {chosen}: {why}" for what, chosen, why in self.steps)]
        if self.groups:
            lines.append("layers")
            width = max(len(group.name) for group in self.groups)
            for group in self.groups:
                shape = " x ".join(map(str, group.shape))
                lines.append(
                    f"  {group.name:<{width}}  {group.count} of {group.kind} {shape}, {size_text(group.nbytes)}: "
                    f"{group.treatment}, {group.reason}"
                )
        return "\n".join(lines)


def decide(model: nn.Module, policy: Policy, device: Device) -> Decision:
    """What `policy` does to `model` on `device`. Products in 4 bits are measured where the decision hangs on them.

    Raises:
        CapacityError: the weights neither fit nor may be streamed.
    """
    return _Deciding(model, policy, device).decide()


class _Deciding:
    def __init__(self, model: nn.Module, policy: Policy, device: Device) -> None:
        self.model, self.policy, self.device = model, policy, device
        self.steps: list[tuple[str, str, str]] = []
        trains = model.training and any(each.requires_grad for each in model.parameters())
        self.training = trains if policy.mode == "full" else policy.mode != "speed" and trains
        self.fast = policy.mode == "speed" or (policy.mode == "full" and not self.training)
        self.dtype: torch.dtype | None = None
        """That weights are cast to; None: each stays as it is."""

    def decide(self) -> Decision:
        precision = self._precision()
        layers = FourBits(self.model, self.policy, self.device, fast=self.fast, dtype=self.dtype)
        chosen, groups = layers.choose(compiles=self._may_compile()[0])
        if layers.why_none:
            self.steps.append(("4 bits", "none", layers.why_none))
        nbytes = self._bytes_after(chosen)
        levels = self._levels(nbytes)
        moves = not levels and self.policy.mode != "balanced"
        if moves:
            self.steps.append(("weights", f"on {self.device.device}", f"{size_text(nbytes)} fit"))
        recompute = self._recompute()
        has_packed = any(isinstance(each, PackedModule) for each in self.model.modules())
        compiles = self._compile(packed=has_packed or bool(chosen))
        graphs = self._graphs(streamed=bool(levels))
        return Decision(
            mode=self.policy.mode, model=type(self.model).__name__, device=str(self.device.device),
            purpose="training" if self.training else "inference", steps=tuple(self.steps), groups=tuple(groups),
            precision=precision, quantized=tuple(chosen), recompute=recompute, compiles=compiles, graphs=graphs,
            levels=levels, moves=moves, weight_bytes=nbytes,
        )  # fmt: skip

    def _precision(self) -> str:
        native = self.device.supports_bf16()
        why = f"{self.device.kind} multiplies bf16 natively" if native else "bf16 only by way of fp32 here"
        if self.policy.precision != "auto":
            why = "asked for"
        bf16 = self.policy.resolve_precision(native_bf16=native) == "bf16"
        halves = {each.dtype for each in self.model.parameters()} <= {torch.bfloat16, torch.float16}
        if not self.fast:
            found = "bf16 autocast" if bf16 else "fp32"
        elif halves and self.policy.precision == "auto":
            found, why = "as it is", "the weights are in 16 bits already"
        elif bf16:
            found, self.dtype = "bf16 weights", torch.bfloat16
        else:
            found, self.dtype = ("fp32 weights", torch.float32) if self.policy.precision == "fp32" else ("fp32", None)
        self.steps.append(("precision", found, why))
        return found

    def _bytes_after(self, chosen: list[Candidate]) -> int:
        packed = {
            id(each.module.get_parameter(name)): each.module.get_parameter(name).numel()
            for each in chosen
            for name in each.weights
        }
        found = sum(packed.values()) * _NVFP4_BYTES
        cast = {} if self.dtype is None else castable(self.model)
        for held in self.model.parameters():
            if id(held) not in packed:
                size = self.dtype.itemsize if self.dtype is not None and id(held) in cast else held.itemsize
                found += held.numel() * size
        return int(found) + sum(each.nbytes for each in self.model.buffers())

    def _levels(self, nbytes: int) -> tuple[dict[str, Any], ...]:
        """Those of a stack; none where the weights are not streamed."""
        policy = self.policy
        if policy.stream == "off" or policy.mode == "balanced":
            if policy.stream == "on":
                self.steps.append(("streaming", "off", "balanced leaves the weights where they are"))
            return ()
        cap = policy.device_mb or OF_DEVICE * self._free() / MB
        fits = nbytes / MB <= cap
        whose = "as asked for" if policy.device_mb else f"{OF_DEVICE:.0%} of what is free"
        what = f"{_mb(nbytes / MB)} of weights, {_mb(cap)} of {self.device.device} for them ({whose})"
        if fits and policy.stream == "auto":
            return ()
        if policy.mode == "speed" and policy.stream == "auto":
            raise CapacityError(
                f"vb.optimize: expected weights that fit, as the speed mode does not stream, got {what}",
                state="the model is as it was",
                remedy="vb.enable_full_optimization() streams what does not fit",
            )
        levels = [{"device": str(self.device.device), "capacity_mb": cap}, *self._below(nbytes / MB - cap, nbytes / MB)]
        shown = ", ".join(f"{_mb(level['capacity_mb'])} of {level['device']}" for level in levels)
        self.steps.append(("streaming", f"from {shown}", what))
        return tuple(levels)

    def _below(self, rest: float, whole: float) -> Iterator[dict[str, Any]]:
        """The levels below the first, for `rest` MB of `whole`."""
        policy, room = self.policy, 0.0
        if self.device.kind != "cpu":
            free = CpuDevice().free_memory() + self._nbytes_on("cpu")
            room = min(policy.host_mb or OF_HOST * free / MB, whole * _SLACK + 64)
            yield {"device": "cpu", "capacity_mb": room}
        if policy.disk_mb != 0 and (rest * _SLACK > room or policy.disk_mb):
            yield {"device": "ssd", "capacity_mb": policy.disk_mb or whole * _SLACK + 64}

    def _free(self) -> int:
        """Bytes of the device that weights could take: what is free, and what the model has there already."""
        return self.device.free_memory() + self._nbytes_on(self.device.kind)

    def _nbytes_on(self, kind: str) -> int:
        held = [*self.model.parameters(), *self.model.buffers()]
        return sum(each.nbytes for each in held if each.device.type == kind)

    def _recompute(self) -> str:
        if not self.training:
            return "off"
        asked = self.policy.activation_checkpointing
        why = {
            "auto": "measured on the first block of the first step of each shape, beside what is then free",
            "on": "asked for",
            "off": "asked for",
        }[asked]
        self.steps.append(("recompute", {"auto": "if needed"}.get(asked, asked), why))
        return asked

    def _may_compile(self) -> tuple[bool, str]:
        """Whether blocks without 4-bit layers are compiled, and why."""
        if self.training:
            return False, "only in inference"
        if self.policy.compile != "auto":
            return self.policy.compile == "on", "asked for"
        if not self.fast:
            return False, f"not in {self.policy.mode} mode"
        on = isinstance(self.device, CudaDevice) and HAS_TRITON
        return on, "Triton is there" if on else f"no Triton for {self.device.kind}"

    def _compile(self, *, packed: bool) -> bool:
        on, why = self._may_compile()
        if on and packed and self.policy.compile == "auto":
            on, why = False, "4-bit layers would be compiled anew for each block"
        count = len(blocks_of(self.model))
        self.steps.append(("torch.compile", f"{count} blocks" if on else "off", why))
        return on

    def _graphs(self, *, streamed: bool) -> bool:
        asked = self.policy.graphs
        if streamed:
            on, why = False, "streamed weights are not where they were at the next replay"
        elif self.training:
            on, why = False, "only in inference"
        elif not isinstance(self.device, CudaDevice):
            on, why = False, f"{self.device.kind} has none"
        elif asked != "auto":
            on, why = asked == "on", "asked for"
        else:
            on, why = (
                self.fast,
                "a shape each, where a replay is faster" if self.fast else f"not in {self.policy.mode} mode",
            )
        self.steps.append(("CUDA graphs", "on" if on else "off", why))
        return on


def _mb(size: float) -> str:
    return f"{size:,.0f} MB" if size >= 10 else f"{size:,.2f} MB"


def castable(model: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters that a cast of the weights takes, by id: floats, but for those of packed layers."""
    packed = {
        id(each)
        for module in model.modules()
        if isinstance(module, PackedModule)
        for each in module.parameters(recurse=False)
    }
    return {
        id(each): each
        for each in model.parameters()
        if each.is_floating_point() and each.itemsize > 1 and id(each) not in packed
    }
