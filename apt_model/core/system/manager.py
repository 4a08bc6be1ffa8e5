"""Which device to use: the best there is, or exactly the one that was asked for."""

import functools
import logging
import re
from collections.abc import Callable

import torch

from apt_model.core import env
from apt_model.core.errors import DeviceError, InputError
from apt_model.core.system.cpu import CpuDevice
from apt_model.core.system.cuda import CudaDevice
from apt_model.core.system.device import Device, Presence

logger = logging.getLogger(__name__)

VENDORS: tuple[type[Device], ...] = (CudaDevice, CpuDevice)
"""In order of preference. A new vendor is one final class and one entry here."""

PLANNED = {"hpu": "Intel Gaudi", "npu": "Huawei Ascend", "xpu": "Intel GPU"}
"""Device types that have a name here and no class yet."""

Probe = Callable[[type[Device]], Presence]


@functools.cache
def ask(vendor: type[Device]) -> Presence:
    """What the vendor itself finds on this machine: looked for once, as a model may ask in every step."""
    return vendor.presence()


def get_device(spec: str | torch.device = "auto", *, probe: Probe = ask) -> torch.device:
    """The device to compute on, for `Tensor.to` and `Module.to`.

    Without a number the answer has none either ("cuda"), and follows torch's current device.

    Args:
        spec: "auto", "cpu", "cuda", "cuda:N" or a torch.device. "auto" is APT_DEVICE where that is set and there, else
            the first of CUDA (ROCm included) and CPU that works; it never raises, and logs its choice once.
        probe: asked what there is of each vendor.

    Raises:
        DeviceError: the device named is not there; the message says which check failed first.
        InputError: `spec` is neither a name nor a device.
    """
    return get_device_manager(spec, probe=probe).device


def get_device_manager(spec: str | torch.device = "auto", *, probe: Probe = ask) -> Device:
    """The same choice as `get_device`, with what can be asked of the device: name, memory, bf16, synchronisation."""
    if not isinstance(spec, str | torch.device):
        raise InputError(f"device: expected a name such as 'auto' or 'cuda:0', or a torch.device, got {spec!r}")
    return _best(probe) if spec == "auto" else _named(str(spec), probe)


def _best(probe: Probe) -> Device:
    asked = env.DEVICE.get()
    if asked is not None and asked != "auto":
        try:
            return _named(asked, probe)
        except DeviceError as error:
            _log_once(logging.WARNING, f"{env.DEVICE.name}={asked}: {error.message}; taking the best there is")
    passed = []
    for vendor in VENDORS:
        presence = _look(vendor, probe)
        if presence.usable:
            break
        passed.append(f"no {vendor.kind}, {_failure(presence)}")
    else:
        vendor = CpuDevice
    _log_once(logging.INFO, f"device: auto is {vendor.kind}{''.join(f' ({reason})' for reason in passed)}")
    return vendor()


def _named(spec: str, probe: Probe) -> Device:
    """The device called `spec`, or `DeviceError` with the first rung that fails."""
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", spec, flags=re.ASCII)
    kind = match[1] if match else spec
    index = int(match[2]) if match and match[2] else None
    known = {vendor.kind: vendor for vendor in VENDORS}
    if kind in PLANNED and kind not in known:
        raise DeviceError(
            f"device {spec!r}: {PLANNED[kind]} is not supported by this version yet",
            remedy=f"this version has {' and '.join(known)}",
        )
    if kind not in known:
        raise DeviceError(
            f"device {spec!r}: expected auto, {', '.join(known)} or one of them with a number, such as cuda:0",
            remedy="AMD GPUs are called cuda in torch" if kind in ("rocm", "hip") else None,
        )
    presence = _look(known[kind], probe)
    if not presence.usable:
        raise DeviceError(f"device {spec!r}: {_failure(presence)}", remedy=presence.remedy)
    if index is not None and index >= presence.count:
        numbers = f"{kind}:0" if presence.count == 1 else f"{kind}:0 to {kind}:{presence.count - 1}"
        raise DeviceError(f"device {spec!r}: there is no such number here", remedy=f"this machine has {numbers}")
    return known[kind](index)


def _look(vendor: type[Device], probe: Probe) -> Presence:
    """What `probe` finds of the vendor; one that raises is not available, and its words are the reason."""
    try:
        return probe(vendor)
    except Exception as error:  # noqa: BLE001 - a broken driver may raise anything, and must not stop the others
        return Presence(built=True, why=f"{type(error).__name__}: {error}")


def _failure(presence: Presence) -> str:
    """The first rung that fails, in words."""
    if not presence.built:
        rung = "not built into this torch"
    elif not presence.available:
        rung = "built into this torch but not available"
    else:
        rung = "available, but with no device"
    return f"{rung}: {presence.why}" if presence.why else rung


@functools.cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)
