"""Which device to use: the best there is, or exactly the one that was asked for."""

import contextlib
import dataclasses
import functools
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points

import torch

from apt_model.core import env
from apt_model.core.errors import DeviceError, InputError
from apt_model.core.system.cpu import CpuDevice
from apt_model.core.system.cuda import CudaDevice
from apt_model.core.system.device import Device
from apt_model.core.system.hpu import HpuDevice
from apt_model.core.system.npu import NpuDevice
from apt_model.core.system.presence import NoAnswerError, Presence, within
from apt_model.core.system.xpu import XpuDevice

logger = logging.getLogger(__name__)

ACCELERATORS: tuple[type[Device], ...] = (CudaDevice, HpuDevice, NpuDevice, XpuDevice)
"""In order of preference, which is not torch.accelerator's. A new vendor is one final class and one entry here."""

ENTRY_POINTS = "apt_model.devices"
"""The group in which other packages register classes of devices, by the device type."""

Probe = Callable[[type[Device]], Presence]


def vendors() -> tuple[type[Device], ...]:
    """All classes of devices in order of preference: our accelerators, those of others, the CPU."""
    return (*ACCELERATORS, *third_parties(), CpuDevice)


@functools.cache
def third_parties() -> tuple[type[Device], ...]:
    """Classes that other packages register; one that cannot be had is logged, and left out."""
    own: list[type[Device]] = [*ACCELERATORS, CpuDevice]
    found = {vendor.kind: vendor for vendor in own}
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda each: each.name):
        try:
            vendor = _registered(entry, found)
        except Exception as error:  # noqa: BLE001, PERF203 - another's code may raise anything, and must not stop ours
            logger.warning("entry point %s = %s is left out: %s", entry.name, entry.value, _words(error))
        else:
            found[vendor.kind] = vendor
    return tuple(found.values())[len(own) :]


def _registered(entry: EntryPoint, taken: Mapping[str, type[Device]]) -> type[Device]:
    """The class that an entry point names, whose device type is not taken."""
    vendor = within(Device.patience, entry.load)
    if not (isinstance(vendor, type) and issubclass(vendor, Device)):
        raise InputError(f"expected a subclass of apt_model.core.system.Device, got {vendor!r}")
    kind = getattr(vendor, "kind", None)
    if not (isinstance(kind, str) and re.fullmatch("[a-z]+", kind, flags=re.ASCII)):
        raise InputError(f"expected a `kind` of lower-case letters, such as 'npu', got {kind!r}")
    if kind in taken:
        raise InputError(f"the device type {kind!r} has {taken[kind].__name__} already")
    return vendor


@functools.cache
def ask(vendor: type[Device]) -> Presence:
    """What the vendor itself finds on this machine: looked for once, as a model may ask in every step.

    A vendor that raises or does not answer is not there, and that is the reason.
    """
    # torch and drivers say what is wrong in warnings, and then report no device.
    with warnings.catch_warnings(record=True) as said, _looking_only():
        warnings.simplefilter("always")
        presence = _answer(vendor)
    if presence.usable or not said:
        return presence
    return dataclasses.replace(presence, why="; ".join(str(warning.message) for warning in said))


def _answer(vendor: type[Device]) -> Presence:
    try:
        return within(vendor.patience, vendor.presence)
    except Exception as error:  # noqa: BLE001 - a broken driver may raise anything, and must not stop the others
        return Presence(installed=True, loads=True, why=_words(error))


@contextlib.contextmanager
def _looking_only() -> Iterator[None]:
    """Have torch ask NVIDIA's management library for GPUs, not the driver, after which no process could be forked."""
    before = os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]
        else:
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = before


def get_device(spec: str | torch.device = "auto", *, probe: Probe = ask) -> torch.device:
    """The device to compute on, for `Tensor.to` and `Module.to`.

    Without a number the answer has none either ("cuda"), and follows torch's current device.

    Args:
        spec: "auto", "cpu", "cuda", "hpu", "npu", "xpu", a third party's device, one of them with a number, or a
            torch.device. "auto" is APT_DEVICE where that is set and there, else the first of CUDA (ROCm included),
            HPU, NPU, XPU, those of third parties and CPU that works; it never raises, and logs its choice once.
        probe: asked what there is of each vendor.

    Raises:
        DeviceError: the device named is not there; the message says which check failed first.
        InputError: `spec` is neither a name nor a device.
    """
    return get_device_manager(spec, probe=probe).device


def get_device_manager(spec: str | torch.device = "auto", *, probe: Probe = ask) -> Device:
    """The same choice as `get_device`, with what can be asked of the device: name, memory, streams, synchronisation."""
    if not isinstance(spec, str | torch.device):
        raise InputError(f"device: expected a name such as 'auto' or 'cuda:0', or a torch.device, got {spec!r}")
    return _best(probe) if spec == "auto" else _named(str(spec), probe)


def look(vendor: type[Device], probe: Probe = ask) -> Presence:
    """What `probe` finds of the vendor; one that raises is not available, and its words are the reason."""
    try:
        return probe(vendor)
    except Exception as error:  # noqa: BLE001 - as in `_answer`
        return Presence(installed=True, loads=True, why=_words(error))


def _best(probe: Probe) -> Device:
    asked = env.DEVICE.get()
    if asked is not None and asked != "auto":
        try:
            return _named(asked, probe)
        except DeviceError as error:
            _log_once(logging.WARNING, f"{env.DEVICE.name}={asked}: {error.message}; taking the best there is")
    passed = []
    chosen: type[Device] = CpuDevice
    for vendor in vendors():
        presence = _loaded(vendor, look(vendor, probe))
        if presence.usable:
            chosen = vendor
            break
        passed.append(f"no {vendor.kind}, {presence.reason}")
    _log_once(logging.INFO, f"device: auto is {chosen.kind}{''.join(f' ({reason})' for reason in passed)}")
    _compare(chosen, probe)
    return chosen()


def _named(spec: str, probe: Probe) -> Device:
    """The device called `spec`, or `DeviceError` with the first rung that fails."""
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", spec, flags=re.ASCII)
    kind = match[1] if match else spec
    index = int(match[2]) if match and match[2] else None
    known = {vendor.kind: vendor for vendor in vendors()}
    if kind not in known:
        raise DeviceError(
            f"device {spec!r}: expected auto, {', '.join(known)} or one of them with a number, such as cuda:0",
            remedy="AMD GPUs are called cuda in torch" if kind in ("rocm", "hip") else None,
        )
    presence = _loaded(known[kind], look(known[kind], probe))
    if not presence.usable:
        raise DeviceError(f"device {spec!r}: {presence.reason}", remedy=presence.remedy)
    if index is not None and index >= presence.count:
        numbers = f"{kind}:0" if presence.count == 1 else f"{kind}:0 to {kind}:{presence.count - 1}"
        raise DeviceError(f"device {spec!r}: there is no such number here", remedy=f"this machine has {numbers}")
    return known[kind](index)


def _loaded(vendor: type[Device], presence: Presence) -> Presence:
    """`presence`, once the vendor's package is in this process, too; it has loaded in another one."""
    if presence.usable:
        why = _load(vendor)
        if why is not None:
            return dataclasses.replace(presence, loads=False, why=why)
    return presence


@functools.cache
def _load(vendor: type[Device]) -> str | None:
    """What was wrong with loading it, or None."""
    try:
        vendor.load()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - as in `_answer`
        return _words(error)
    return None


def _compare(chosen: type[Device], probe: Probe) -> None:
    """Say so, once, where torch.accelerator speaks of another device than the one that is taken."""
    other = torch.accelerator.current_accelerator()
    if other is None or other.type == chosen.kind:
        return
    # torch names what it was built for, whether there is such a device or not.
    known = {vendor.kind: vendor for vendor in vendors()}
    if other.type not in known or look(known[other.type], probe).usable:
        _log_once(
            logging.WARNING,
            f"device: auto is {chosen.kind}, and torch.accelerator is {other.type}: code that asks torch.accelerator "
            f"computes elsewhere; {env.DEVICE.name}={other.type} takes torch's choice",
        )


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, NoAnswerError) else f"{type(error).__name__}: {error}"


@functools.cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)
