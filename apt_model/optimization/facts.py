"""What is true of this machine and this version, as plain data: the banner words it, `vb.status()` returns it."""

import sys
from collections.abc import Callable
from typing import Any

import torch

from apt_model.cloud.manager import get_cloud_npu_manager
from apt_model.core.policy import Policy, current_policy
from apt_model.core.system.device import Device
from apt_model.core.system.manager import get_device_manager, look, vendors


def gather(device: Device | None = None) -> dict[str, Any]:
    """The facts, one entry a row of the banner, and those of the policy; every value can be written as JSON.

    Args:
        device: the device to speak of; None is the one that "auto" chooses. On a GPU this starts the device.
    """
    device = device or get_device_manager()
    measured = _measured(device)
    return {
        **_policy(device),
        "accelerator": _accelerator(device),
        "gpu_flash": {
            "attention": "scaled_dot_product_attention",
            "kernels": _attention_kernels(device.kind),
            "fp4_weights": True,
        },
        "vgpu_stack": True,
        "multi_vendor_backend": _standings(),
        "cloud_npu": {"configured": get_cloud_npu_manager().list_backends()},
        "left_spin": "by model configuration",
        "expected_speed_up": None if measured is None else _speed_up(measured),
        "virtual_memory": True,
        "measured": None if measured is None else {"link_gbps": measured.link_gbps, "disk_gbps": measured.disk_gbps},
    }


def _measured(device: Device) -> Any:
    """What this process has measured of `device`, if it has."""
    calibration = sys.modules.get("apt_model.optimization.calibration")  # not loaded, it has measured nothing
    found = None if calibration is None else calibration.last()
    return found if found is not None and found.device == str(device.device) else None


def _speed_up(measured: Any) -> dict[str, Any]:
    """Of a layer with 4-bit weights over a plain one."""
    return {
        "layer": list(measured.layer), "format": measured.format,
        "by_rows": [[measured.few_rows, measured.few_speed_up], [measured.many_rows, measured.many_speed_up]],
    }  # fmt: skip


def _policy(device: Device) -> dict[str, Any]:
    policy = current_policy()
    native_bf16 = device.supports_bf16()
    chosen = policy or Policy(mode="balanced")
    return {
        "enabled": policy is not None,
        "mode": policy.mode if policy else None,
        "precision": chosen.resolve_precision(native_bf16=native_bf16),
        "native_bf16": native_bf16,
        "activation_checkpointing": chosen.activation_checkpointing,
    }


def _accelerator(device: Device) -> dict[str, Any]:
    return {
        "type": device.get_accelerator_type(),
        "device": str(device.device),
        "name": device.name(),
        "total_memory": device.total_memory(),
        "free_memory": device.free_memory() if device.supports("free_memory") else None,
        "torch": str(torch.__version__),
        "without_accelerator": _why_none() if device.kind == "cpu" else None,
    }


def _why_none() -> str:
    """Why the CPU: each accelerator's first failed check, or that there is one and the CPU was asked for."""
    found = {vendor.kind: look(vendor) for vendor in vendors() if vendor.kind != "cpu"}
    return "; ".join(
        f"{kind} is there and not asked for" if presence.usable else f"{kind}: {presence.reason}"
        for kind, presence in found.items()
    )


def _standings() -> dict[str, str]:
    """On what the tests of this version ran, by vendor; AMD's GPUs have NVIDIA's class."""
    found = {vendor.kind: vendor.standing for vendor in vendors()}
    return {**found, "rocm": "logic-tested"}


def _attention_kernels(kind: str) -> list[str]:
    """The kernels of torch's attention that exist for a device type and are switched on; torch picks one a call."""
    # torch keeps the switches under torch.backends.cuda also for the CPU's two kernels.
    switches = torch.backends.cuda
    kernels: dict[str, list[Callable[[], bool]]] = {"math": [switches.math_sdp_enabled]}
    if kind == "cpu":
        kernels["flash"] = [switches.flash_sdp_enabled]
    elif kind == "cuda":
        kernels["flash"] = [switches.flash_sdp_enabled, switches.is_flash_attention_available]
        kernels["memory-efficient"] = [switches.mem_efficient_sdp_enabled]
        kernels["cudnn"] = [switches.cudnn_sdp_enabled, torch.backends.cudnn.is_available]
    return sorted(name for name, conditions in kernels.items() if all(holds() for holds in conditions))
