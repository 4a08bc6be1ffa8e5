"""Checks of the GPU, from files of the system alone: its driver, its device files, what hides it, what torch is for.

Which driver runs which CUDA: docs.nvidia.com/cuda/cuda-toolkit-release-notes, "minor version compatibility".
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from apt_model.cli.diagnosis.finding import Finding, Severity
from apt_model.cli.diagnosis.installed import BUILDS
from apt_model.cli.diagnosis.system import System

DRIVER_FILE = "/proc/driver/nvidia/version"
_NVIDIA, _DISPLAY = "0x10de", "0x03"
_LEAST_DRIVER = ((13, 580), (12, 525), (11, 450))
"""Major versions of CUDA, and of the oldest driver that runs them."""
_FITTING = "uv pip install --torch-backend=auto --reinstall-package torch torch"


def driver_version(system: System) -> str | None:
    """The version of NVIDIA's kernel module, None where it is not loaded."""
    match = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", system.read(DRIVER_FILE))
    return match[1] if match else None


def nodes(system: System) -> list[Path]:
    """The device files of NVIDIA GPUs."""
    return sorted(path for path in system.at("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())


def cards(system: System) -> list[str]:
    """NVIDIA GPUs on the bus, by their place."""
    found = []
    for device in sorted(system.at("/sys/bus/pci/devices").glob("*")):
        place = f"/sys/bus/pci/devices/{device.name}"
        if system.read(f"{place}/vendor").strip() == _NVIDIA and system.read(f"{place}/class").startswith(_DISPLAY):
            found.append(device.name)
    return found


def is_there(system: System) -> bool:
    """Whether there is an NVIDIA GPU that this system could use."""
    return bool(nodes(system)) or (system.is_wsl and system.at("/dev/dxg").exists())


def wants_cuda(system: System) -> bool:
    """Whether the torch that is installed was built for NVIDIA GPUs."""
    return system.packages.torch is not None and system.packages.torch.cuda is not None


def build(system: System) -> Iterator[Finding]:
    """A torch without CUDA on a machine with an NVIDIA GPU."""
    install = system.packages.torch
    other = system.packages.get("torch-npu")
    if install and is_there(system) and not (install.cuda or install.hip or install.xpu or other):
        driver = driver_version(system)
        yield Finding(
            "APT-D08", "broken", f"torch {install.version} was built without CUDA, and there is an NVIDIA GPU",
            f"driver {driver}, {', '.join(path.name for path in nodes(system)) or 'GPU through Windows'}",
            _reinstall(system, _cuda_of(driver)),
        )  # fmt: skip


def age(system: System, says: str | None) -> Iterator[Finding]:
    """A driver that is too old for torch's CUDA. `says`: the newest CUDA that the driver itself claims to run."""
    install, driver = system.packages.torch, driver_version(system)
    newest = _major(says) or _cuda_of(driver)
    built = _major(install.cuda if install else None)
    if install is None or built is None or newest is None or built <= newest:
        return
    least = dict(_LEAST_DRIVER).get(built)
    needs = f", which needs driver {least} or later" if least else ""
    yield Finding(
        "APT-D09", "broken",
        f"torch {install.version} was built with CUDA {install.cuda}{needs}; this driver runs CUDA {says or newest}",
        f"driver {driver or 'unknown'}", _reinstall(system, newest),
    )  # fmt: skip


def _major(version: str | None) -> int | None:
    return int(version.partition(".")[0]) if version else None


def _cuda_of(driver: str | None) -> int | None:
    """The newest major version of CUDA that a driver runs."""
    number = _major(driver)
    return next((cuda for cuda, least in _LEAST_DRIVER if number and number >= least), None)


def _reinstall(system: System, cuda: int | None) -> str:
    """As uv chooses the build by the driver; the index of builds is for who looks for one by hand."""
    python = shlex.quote(system.python[0])
    hint = f" for CUDA {cuda}" if cuda else ""
    return f"{system.pip} install uv && {python} -m {_FITTING}  # takes a build{hint} from {BUILDS}"


def driver(system: System) -> Iterator[Finding]:
    """A GPU without its driver, and a driver without its device files."""
    found, wanted = cards(system), wants_cuda(system)
    version = driver_version(system)
    if system.is_wsl or nodes(system):
        return
    severity: Severity = "broken" if wanted else "note"
    if version and system.in_container:
        yield Finding(
            "APT-D22", severity, "this container was started without the machine's GPU: it has no /dev/nvidia0",
            f"driver {version} on the machine", "docker run --gpus all IMAGE  # start it again so, or with --device",
        )  # fmt: skip
    elif version:
        yield Finding(
            "APT-D22", severity, "NVIDIA's driver is loaded, and there is no device file /dev/nvidia0",
            f"driver {version}, {len(found)} GPUs on the bus", "sudo nvidia-modprobe -u -c=0",
        )  # fmt: skip
    elif found and not system.in_container:
        yield Finding(
            "APT-D20", severity if wanted else "warning",
            "there is an NVIDIA GPU, and no driver of NVIDIA's is loaded (/proc/driver/nvidia is missing)",
            f"on the bus: {', '.join(found)}",
            "sudo modprobe nvidia  # if there is no such module: sudo ubuntu-drivers install, or your system's way",
        )  # fmt: skip


def rights(system: System) -> Iterator[Finding]:
    """Device files that this user may not open, of NVIDIA and of AMD."""
    common = [path for name in ("nvidiactl", "nvidia-uvm", "kfd") if (path := system.at(f"/dev/{name}")).exists()]
    closed = [path for path in [*nodes(system), *common] if not system.may_open(path)]
    if closed:
        groups = sorted({_group(path.stat().st_gid) for path in closed})
        install = system.packages.torch
        uses = ("kfd",) if install and install.hip else ("nvidia",) if wants_cuda(system) else ()
        wanted = any(path.name.startswith(uses) for path in closed)
        modes = ", ".join(f"/dev/{path.name} {path.stat().st_mode & 0o777:o}" for path in closed)
        yield Finding(
            "APT-D23", "broken" if wanted else "note",
            f"this user may not open {', '.join(f'/dev/{path.name}' for path in closed)}", f"modes: {modes}",
            f'sudo usermod -aG {",".join(groups)} "$USER"  # and log in again',
        )  # fmt: skip


def _group(number: int) -> str:
    import grp  # noqa: PLC0415 - only for a remedy

    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def hidden(system: System) -> Iterator[Finding]:
    """Variables that hide every GPU."""
    install = system.packages.torch
    count = len(nodes(system))
    for name, wanted in (
        ("CUDA_VISIBLE_DEVICES", bool(install and install.cuda and is_there(system))),
        ("HIP_VISIBLE_DEVICES", bool(install and install.hip)),
    ):
        value = system.variables.get(name)
        if not wanted or value is None:
            continue
        first = value.split(",")[0].strip()
        beyond = first.isdigit() and count and int(first) >= count
        if first in ("", "-1") or beyond or first.lower() in ("none", "nodevfiles"):
            there = f"there are {count} GPUs, from 0 on" if count else "it is not the number of a GPU"
            yield Finding(
                "APT-D24", "broken", f"{name} hides all GPUs: torch stops at the first number that is not there",
                f"{name}={value!r}; {there}", f"unset {name}",
            )  # fmt: skip


def wsl(system: System) -> Iterator[Finding]:
    """That this is WSL, and whether it has its GPU."""
    if not system.is_wsl:
        return
    if wants_cuda(system) and not system.at("/dev/dxg").exists():
        yield Finding(
            "APT-D22", "broken", "this WSL has no GPU: /dev/dxg is missing",
            system.read("/proc/version").split(" (")[0],
            "wsl.exe --update && wsl.exe --shutdown  # WSL 2, and a current driver in Windows",
        )  # fmt: skip
    else:
        yield Finding("APT-D27", "note", "this is WSL: how much it pins is measured, not looked up")


def listed(system: System) -> Iterator[Finding]:
    """A driver without its own tool."""
    if driver_version(system) and nodes(system) and system.program("nvidia-smi") is None:
        yield Finding(
            "APT-D26", "note", "NVIDIA's driver is loaded, and nvidia-smi is not on the PATH",
            f"driver {driver_version(system)}",
        )  # fmt: skip


CHECKS = (build, driver, rights, hidden, wsl, listed)
