"""What children told, as findings: the cause behind an error's words, and what to do about it."""

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from apt_model.cli.diagnosis import gpu, installed, memory
from apt_model.cli.diagnosis.children import Outcome
from apt_model.cli.diagnosis.finding import Finding
from apt_model.cli.diagnosis.system import System
from apt_model.cli.output import size
from apt_model.core import env

_LIBRARY = re.compile(r"([\w.+-]+\.so[\w.]*): cannot open shared object file")
_SYMBOL = re.compile(r"(\S+\.so[\w.]*): undefined symbol: (\S+)")
_BRINGS = (
    ("libcuda.so", "NVIDIA's driver"), ("libnvidia", "NVIDIA's driver"), ("libcud", "NVIDIA's CUDA libraries"),
    ("libcu", "NVIDIA's CUDA libraries"), ("libnv", "NVIDIA's CUDA libraries"), ("libnccl", "NVIDIA's NCCL"),
    ("libhccl", "Huawei's CANN"), ("libascend", "Huawei's CANN"), ("libacl", "Huawei's CANN"),
    ("libge_", "Huawei's CANN"), ("libSynapse", "Intel's Gaudi software"), ("libamdhip", "AMD's ROCm"),
    ("libhip", "AMD's ROCm"), ("libroc", "AMD's ROCm"), ("libsycl", "Intel's oneAPI"), ("libze_", "Intel's driver"),
    ("libgomp", "the system's package libgomp1"), ("libstdc++", "the system's package libstdc++6"),
)  # fmt: skip
"""How names of libraries begin, and what brings them."""
_APT = {"libgomp": "sudo apt-get install -y libgomp1", "libstdc++": "sudo apt-get install -y libstdc++6"}
_INIT = {
    100: "it finds no GPU", 802: "it is not ready: a machine with NVSwitch needs its fabric manager",
    803: "its kernel module and its library are of different versions",
    804: "its library is of a forward-compatibility package that this GPU does not take", 999: "an unknown error",
}  # fmt: skip
_INIT_REMEDY = {802: "sudo systemctl restart nvidia-fabricmanager", 803: "sudo reboot"}
_SIGNALS = {
    "SIGILL": "this processor lacks an instruction that the build uses",
    "SIGKILL": "the system ended it, most often because memory ran out",
    "SIGSEGV": "a library reached into memory that is not its own: mixed or damaged files",
    "SIGABRT": "a library gave up", "SIGBUS": "a mapped file is shorter than it was, or /dev/shm is full",
    "SIGFPE": "a library divided by zero",
}  # fmt: skip


def of_torch(system: System, told: Outcome) -> Iterator[Finding]:
    """Import, backends, NumPy, and what was computed."""
    yield from _ends(system, told, "torch")
    imported = told.stage("import torch")
    if imported.get("error"):
        if system.packages.modules("torch"):  # else it is missing, which has been said
            yield _import_failed(system, "torch", imported["error"])
        return
    yield from (_backend(system, stage) for stage in told.stages if "package" in stage and stage.get("error"))
    if told.stage("numpy").get("error"):
        yield Finding(
            "APT-D15", "broken", "torch cannot share arrays with NumPy: one was built for the other's other versions",
            f"{_versions(system, 'torch', 'numpy')}: {told.stage('numpy')['error'][-1]}",
            f"{system.pip} install --upgrade torch numpy",
        )  # fmt: skip
    device = told.stage("device")
    if device.get("error"):
        yield Finding(
            "APT-D12", "broken", "torch is imported, and does not work", device["error"][-1], _again(system, "torch")
        )
    if device.get("asked"):
        yield Finding(
            "APT-D61", "warning", f"{env.DEVICE.name} names a device that is not there", device["asked"],
            f"unset {env.DEVICE.name}",
        )  # fmt: skip
    yield from _computed(system, told)


def finds_no_gpu(system: System, told: Outcome) -> Iterator[Finding]:
    """A torch with CUDA that finds no GPU where there is one, in its words; for when no other finding explains it."""
    cuda = told.stage("device").get("cuda", {})
    if cuda.get("built") and not cuda.get("count") and gpu.is_there(system):
        yield Finding(
            "APT-D25", "broken", "there is an NVIDIA GPU, and torch finds none", cuda.get("why", ""), "nvidia-smi -L"
        )


def _backend(system: System, stage: Mapping[str, Any]) -> Finding:
    package, error = stage["package"], stage["error"]
    library = _library(error)
    why = f"{library[0]}{library[1]} is not found" if library else error[-1]
    version = next((found.version for found in system.packages.named(package)), "")
    return Finding(
        "APT-D11", "broken",
        f"'import torch' fails, as it loads the backend {stage['name']} of {package} {version} by itself: {why}",
        error[-1], f"{system.pip} uninstall -y {package}  # to keep it: export TORCH_DEVICE_BACKEND_AUTOLOAD=0",
    )  # fmt: skip


def _computed(system: System, told: Outcome) -> Iterator[Finding]:
    device = told.stage("device")
    where = device.get("kind", "")
    for name, what in (("kernel", "a product of two matrices"), ("triton", "a Triton kernel")):
        stage = told.stage(name)
        if stage.get("error"):
            yield Finding(
                "APT-D28", "broken", f"{what} fails on {where}: {_short(stage['error'][-1])}", device.get("name", ""),
                _again(system, "torch"),
            )  # fmt: skip
        elif stage.get("wrong"):
            count = f"{stage['wrong']} of {stage['of']} numbers" if "of" in stage else "off by "
            off = count if "of" in stage else f"{count}{stage['error_of_result']:.2g}"
            yield Finding(
                "APT-D28", "broken", f"{what} on {where} has a wrong result", f"{off}; {device.get('name', '')}",
                "APT_DEVICE=cpu apt-model doctor  # if the CPU is right, it is the GPU or its driver"
                if where != "cpu" else _again(system, "torch"),
            )  # fmt: skip
    pinned = told.stage("pinned")
    if pinned.get("error"):
        yield Finding("APT-D31", "warning", "pinning host memory fails", pinned["error"][-1], "ulimit -l unlimited")
    elif pinned and pinned["bytes"] < pinned["bound"]:
        yield Finding(
            "APT-D31", "warning", "the GPU's driver pins less host memory than was asked for",
            f"{size(pinned['bytes'])} of {size(pinned['bound'])} tried: {pinned['words']}",
            f"apt-model plan MODEL --gpu 8GiB --ram {max(pinned['bytes'] // memory.MIB, 1)}MB  # keep to it",
        )  # fmt: skip


def of_imports(system: System, told: Outcome) -> Iterator[Finding]:
    """Packages with parts in C that do not load."""
    yield from _ends(system, told, "")
    for stage in told.stages:
        name = stage["stage"].removeprefix("import ")
        if stage.get("error"):
            yield _import_failed(system, name, stage["error"])


def of_lock(system: System, told: Outcome) -> Iterator[Finding]:
    """Less locked memory than the limit promises."""
    found, limit = told.stage("lock"), memory.lock_limit(system)
    if not found or "bytes" not in found:
        yield from _unknown(told)
        return
    promised = found["bound"] if limit is None else min(found["bound"], limit)
    if found["bytes"] < promised - memory.MIB:
        yield Finding(
            "APT-D31", "warning", "less memory can be locked than the limit says",
            f"{size(found['bytes'])} of {size(promised)}: {found['words']}",
            "docker run --ulimit memlock=-1 IMAGE" if system.in_container else "ulimit -l unlimited",
        )  # fmt: skip


def of_driver(system: System, told: Outcome) -> Iterator[Finding]:
    """NVIDIA's driver, asked itself."""
    if told.end in ("idle", "late"):
        yield Finding(
            "APT-D14", "broken", "NVIDIA's driver does not answer", f"after {told.seconds:.1f} s", "sudo reboot"
        )
        return
    found = told.stage("driver")
    if found.get("error"):
        library = _library(found["error"])
        yield Finding(
            "APT-D10", "broken", f"{library[0] if library else 'libcuda.so.1'}, of NVIDIA's driver, is not found",
            _short(found["error"][-1]),
            "docker run --gpus all IMAGE" if system.in_container else "ldconfig -p | grep libcuda",
        )  # fmt: skip
    elif found.get("init"):
        code = found["init"]
        yield Finding(
            "APT-D21" if code == 803 else "APT-D25", "broken",
            f"NVIDIA's driver does not start: {_INIT.get(code, 'see the number')}",
            f"cuInit returns {code}; driver {gpu.driver_version(system) or 'unknown'}",
            _INIT_REMEDY.get(code, "nvidia-smi -q | head -20"),
        )  # fmt: skip


def of_smi(system: System, told: Outcome) -> Iterator[Finding]:
    """NVIDIA's own tool."""
    words = " ".join((told.out + told.err).split())
    if told.end in ("idle", "late"):
        yield Finding("APT-D14", "broken", "nvidia-smi does not answer", f"after {told.seconds:.1f} s", "sudo reboot")
    elif "version mismatch" in words:
        library = re.search(r"NVML library version: ([\d.]+)", words)
        yield Finding(
            "APT-D21", "broken", "the driver was updated while its old kernel module is loaded",
            f"module {gpu.driver_version(system) or 'unknown'}, library {library[1] if library else 'newer'}",
            "sudo reboot",
        )  # fmt: skip
    elif told.code:
        yield Finding("APT-D25", "broken", f"nvidia-smi fails: {_short(words)}", f"exit code {told.code}", "nvidia-smi")


def _ends(system: System, told: Outcome, package: str) -> Iterator[Finding]:
    """A process that was killed, hung, or ended without having told all."""
    package = package or told.begun.removeprefix("import ")
    at = told.begun or "its end"
    where = f" in {told.place}" if told.place else ""
    if told.end == "signal":
        why = _SIGNALS.get(told.signal, "no code can catch it")
        yield Finding(
            "APT-D13", "broken", f"{at!r} is killed by {told.signal}{where}: {why}", _versions(system, package),
            _again(system, package),
        )  # fmt: skip
    elif told.end in ("idle", "late"):
        what = "waits and does nothing" if told.end == "idle" else "does not end"
        remedy = (
            f"{shlex.quote(system.python[0])} -X faulthandler -v -c 'import {package}'  # the last line is the place"
        )
        if not told.begun.startswith("import"):
            remedy = f"{shlex.quote(system.python[0])} -c 'import torch; print(torch.ones(2))'"
        yield Finding(
            "APT-D14", "broken", f"{at!r} {what}{where}", f"stopped after {told.seconds:.1f} s", remedy
        )  # fmt: skip
    elif told.begun or told.end == "absent" or told.code:
        yield from _unknown(told)


def _unknown(told: Outcome) -> Iterator[Finding]:
    words = [line for line in told.err.splitlines() if line.strip()]
    yield Finding(
        "APT-D90", "warning", f"the probe {told.name!r} could not be made", _short(words[-1]) if words else told.end
    )


def _import_failed(system: System, name: str, error: list[str]) -> Finding:
    library, symbol = _library(error), next(filter(None, map(_SYMBOL.search, error)), None)
    if library:
        beginning = next((each for each in _APT if library[0].startswith(each)), None)
        return Finding(
            "APT-D10", "broken", f"'import {name}' fails: {library[0]}{library[1]} is not found",
            _versions(system, name), _APT[beginning] if beginning else _again(system, name),
        )  # fmt: skip
    if symbol:
        return Finding(
            "APT-D12", "broken",
            f"'import {name}' fails: {symbol[1].rpartition('/')[2]} was built for another version of a library",
            f"undefined symbol {symbol[2]}; {_versions(system, name)}", _again(system, name),
        )  # fmt: skip
    return Finding(
        "APT-D12", "broken", f"'import {name}' fails: {_short(error[-1])}", _versions(system, name),
        _again(system, name),
    )  # fmt: skip


def _library(error: list[str]) -> tuple[str, str] | None:
    """The shared library that an error misses, and in words what brings it."""
    name = next((match[1] for words in reversed(error) if (match := _LIBRARY.search(words))), None)
    if name is None:
        return None
    return name, next((f", of {who}," for beginning, who in _BRINGS if name.startswith(beginning)), "")


def _versions(system: System, *names: str) -> str:
    return ", ".join(f"{each.name} {each.version}" for name in names if (each := system.packages.get(name)))


def _again(system: System, name: str) -> str:
    package = system.packages.get(name)
    return f"{system.pip} install --force-reinstall {installed.exactly(package) if package else name}"


def _short(words: str) -> str:
    return words if len(words) <= 200 else words[:197] + "..."
