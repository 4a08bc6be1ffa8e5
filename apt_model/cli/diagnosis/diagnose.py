"""All checks and probes of a system, the slowest first and together, and what is known after them."""

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apt_model.cli.diagnosis.probe as probe_script
from apt_model.cli.diagnosis import disk, gpu, installed, memory, settings, verdicts
from apt_model.cli.diagnosis.children import Children, Outcome
from apt_model.cli.diagnosis.finding import SEVERITIES, Finding
from apt_model.cli.diagnosis.system import System
from apt_model.core import env

_LIMIT = 30.0
"""Seconds that a probe may work."""
_START = 1.2
"""And those in which it may do nothing; the stages of a probe set their own."""
_C_PARTS = ("numpy", "safetensors", "tokenizers")
_EXPLAIN_NO_GPU = {f"APT-D{number}" for number in ("08", "09", "10", "13", "14", "20", "21", "22", "23", "24", "25")}
"""Findings after which it is no news that torch finds no GPU."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found, what is known, and how long it took."""

    findings: list[Finding]
    facts: dict[str, Any]
    probes: list[dict[str, Any]] = field(default_factory=list)
    seconds: float

    def count(self, severity: str) -> int:
        """How many findings there are of a severity."""
        return sum(finding.severity == severity for finding in self.findings)


def diagnose(system: System, folder: str | None = None, *, quick: bool = False) -> Diagnosis:
    """Look at everything; `quick` starts no process, and so believes what files say."""
    began = time.perf_counter()
    place = disk.folder(system, folder)
    with Children() as children:
        if not quick:
            _start(children, system, place)
        checks = (*installed.CHECKS, *gpu.CHECKS, *memory.CHECKS, *settings.CHECKS)
        found = list(itertools.chain.from_iterable(check(system) for check in checks))
        found += disk.checks(system, place, given=folder is not None)
        outcomes = children.wait()
    driver = outcomes.get("driver")
    found += gpu.age(system, driver.stage("driver").get("cuda") if driver else None)
    found += _judged(system, outcomes, found, place, given=folder is not None)
    facts = _facts(system, outcomes, place)
    probes = [
        {"probe": each.name, "end": each.end, "seconds": round(each.seconds, 3)} for each in outcomes.values()
    ]  # fmt: skip
    found = sorted(dict.fromkeys(found), key=lambda each: (SEVERITIES.index(each.severity), each.code))
    return Diagnosis(findings=found, facts=facts, probes=probes, seconds=time.perf_counter() - began)


def _start(children: Children, system: System, place: Path) -> None:
    """Start every probe; torch, which takes longest, first."""
    pairs = [
        (package.name, *pair) for package in system.packages.all for pair in package.entry_points("torch.backends")
    ]  # fmt: skip
    loads = system.variables.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1"
    asked = system.get(env.DEVICE.name)
    options = {
        "backends": pairs if loads else [], "asked": asked if asked != "auto" else None,
        "package": str(Path(probe_script.__file__).parents[2]), "bound": memory.bound(system),
    }  # fmt: skip
    if system.packages.modules("torch"):
        # Its backends are loaded one by one afterwards, so that a broken one is seen with its cause.
        _probe(children, system, "torch", options, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    names = [name for name in _C_PARTS if system.packages.modules(name)]
    if names:
        _probe(children, system, "imports", {"names": names})
    if gpu.is_there(system):
        _probe(children, system, "driver", {})
        tool = system.program("nvidia-smi")
        if tool:
            children.start("nvidia-smi", [tool, "-L"], system.variables, limit=10.0, patience=2.0)
    _probe(children, system, "lock", {"bound": memory.bound(system)})
    if place.is_dir():
        _probe(children, system, "disk", {"folder": str(place)})


def _probe(children: Children, system: System, name: str, options: dict[str, Any], **environ: str) -> None:
    told = json.dumps({"paths": list(system.paths), **options})
    command = (*system.python, probe_script.__file__, name, told)
    children.start(name, command, {**system.variables, **environ}, limit=_LIMIT, patience=_START)


def _judged(
    system: System, outcomes: dict[str, Outcome], before: list[Finding], place: Path, *, given: bool
) -> Iterator[Finding]:
    """What the outcomes say; a cause that is known already is not told again by its effect."""
    known = {finding.code for finding in before if finding.severity == "broken"}
    judges = {
        "torch": verdicts.of_torch, "imports": verdicts.of_imports, "lock": verdicts.of_lock,
        "nvidia-smi": verdicts.of_smi,
    }  # fmt: skip
    found = [each for name, judge in judges.items() if name in outcomes for each in judge(system, outcomes[name])]
    if "APT-D06" in known:  # what stands in front of a package is not that package
        found = [each for each in found if each.code != "APT-D12"]
    known |= {finding.code for finding in found if finding.severity == "broken"}
    if "driver" in outcomes and not known & {"APT-D21", "APT-D22", "APT-D23", "APT-D24"}:
        asked = list(verdicts.of_driver(system, outcomes["driver"]))
        found += asked
        known |= {finding.code for finding in asked}
    if "torch" in outcomes and not known & _EXPLAIN_NO_GPU:
        found += verdicts.finds_no_gpu(system, outcomes["torch"])
    writing = outcomes["disk"].stage("disk") if "disk" in outcomes else {}
    if writing.get("error") and not known & {"APT-D40", "APT-D41"}:
        found.append(disk.refused(place, writing["error"][-1], given=given))
    yield from found


def _facts(system: System, outcomes: dict[str, Outcome], place: Path) -> dict[str, Any]:
    """What is known, by subject; None where nothing was measured."""
    told = {name: outcome.stages for name, outcome in outcomes.items()}
    stages = {stage["stage"]: stage for each in told.values() for stage in each if not stage.get("error")}
    torch, device, kernel = system.packages.torch, stages.get("device"), stages.get("kernel")
    packages = {name: found.version for name in installed.SHOWN if (found := system.packages.get(name))}
    what, _ = disk.kind(system, place)
    total, free = system.room(place) if place.is_dir() else (None, None)
    writing = stages.get("disk", {})
    return {
        "python": ".".join(map(str, system.version)),
        "packages": packages,
        "torch_build": torch.build if torch else None,
        "import_torch_s": stages.get("import torch", {}).get("seconds"),
        "device": device and {name: device[name] for name in ("kind", "name", "memory", "free")},
        "matmul_s": kernel["warm"] if kernel and not kernel.get("wrong") else None,
        "triton_kernel_s": stages.get("triton", {}).get("seconds") if stages.get("triton", {}).get("made") else None,
        "driver": gpu.driver_version(system),
        "driver_cuda": stages.get("driver", {}).get("cuda"),
        "wsl": system.is_wsl,
        "container": system.in_container,
        "memory_bytes": system.memory.machine(),
        "memory_limit_bytes": system.memory.total(),
        "memory_free_bytes": system.memory.free(),
        "lock_limit_bytes": memory.lock_limit(system),
        "locked_bytes": stages.get("lock", {}).get("bytes"),
        "locked_tried_bytes": stages.get("lock", {}).get("bound"),
        "pinned_bytes": stages.get("pinned", {}).get("bytes"),
        "pinned_tried_bytes": stages.get("pinned", {}).get("bound"),
        "folder": {
            "path": str(place), "type": what or None, "bytes": total, "free_bytes": free,
            "write_gbps": writing.get("write_gbps"), "read_gbps": writing.get("read_gbps"),
            "direct": writing.get("direct"),
        },
        "clouds": {
            service: {name: bool(system.get(name)) for name in names} for service, names in settings.CLOUDS.items()
        },
    }  # fmt: skip
