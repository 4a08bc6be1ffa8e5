"""Checks of what is installed: packages that are missing, old, doubled, shadowed or made for one another's others."""

import shlex
from collections.abc import Iterator

from apt_model.cli.diagnosis.finding import Finding, Severity
from apt_model.cli.diagnosis.packages import Package, fits
from apt_model.cli.diagnosis.system import System

OURS = "apt-transformer"
TRITONS = (
    "triton", "triton-xpu", "triton-rocm", "triton-ascend", "triton-windows",
    "pytorch-triton", "pytorch-triton-xpu", "pytorch-triton-rocm",
)  # fmt: skip
"""Packages that bring a folder triton/."""
BUILDS = "https://download.pytorch.org/whl"
"""Where torch's builds for all platforms are."""
_TIED = ("torchvision", "torchaudio", "torch-npu", "transformers", "peft", "accelerate", "torch")
"""Whose requirements are looked at."""
_BASES = ("torch", "numpy", "triton", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface-hub")
"""And of those, requirements of these."""
SHOWN = ("apt-transformer", "torch", "numpy", "triton", "transformers", "peft", "accelerate")
"""Whose versions are facts."""
_IMPORTED = ("torch", "numpy", "triton", "safetensors", "tokenizers")


def python(system: System) -> Iterator[Finding]:
    """The Python itself."""
    ours = system.packages.get(OURS)
    wanted = ours.field("Requires-Python") if ours else ""
    version = ".".join(map(str, system.version))
    if not fits(version, wanted):
        yield Finding(
            "APT-D01", "broken", f"this version of apt-model needs Python {wanted}", f"Python {version}",
            "uv venv --python 3.12  # or another way to an environment of such a Python",
        )  # fmt: skip
    if system.bits < 64:
        yield Finding(
            "APT-D01", "broken", "torch has no builds for a 32-bit Python", f"{system.bits} bits",
            "uv venv --python 3.12  # a 64-bit one",
        )  # fmt: skip


def ours(system: System) -> Iterator[Finding]:
    """What our own metadata asks for; without metadata (a bare checkout), that torch is there at all."""
    package = system.packages.get(OURS)
    needed = list(package.requirements()) if package else []
    if package is None and not system.packages.modules("torch"):
        yield _missing(system, "torch", "")
    seen = set()
    for need in needed:
        if need.extra == "dev" or need.name in seen:
            continue
        seen.add(need.name)
        have = system.packages.get(need.name)
        if have is None:
            if need.extra is None:
                yield _missing(system, need.name, need.versions)
        elif not fits(have.version, need.versions):
            severity: Severity = "broken" if need.extra is None else "warning"
            why = f", for the extra [{need.extra}]" if need.extra else ""
            yield Finding(
                "APT-D03", severity, f"apt-model needs {need.name}{need.versions}{why}",
                f"{need.name} {have.version} is installed",
                f"{system.pip} install --upgrade '{need.name}{need.versions}'",
            )  # fmt: skip


def _missing(system: System, name: str, versions: str) -> Finding:
    return Finding(
        "APT-D02", "broken", f"the package {name} is not installed for this Python",
        f"looked for in {len(system.paths)} places of sys.path", f"{system.pip} install '{name}{versions}'",
    )  # fmt: skip


def tied(system: System) -> Iterator[Finding]:
    """Packages that were made for another version of one that is there."""
    for name in _TIED:
        package = system.packages.get(name)
        for need in package.requirements() if package else ():
            have = system.packages.get(need.name)
            conditional = need.extra is not None or (need.marker and (name, need.name) != ("torch", "triton"))
            if package is None or have is None or conditional or need.name not in _BASES:
                continue
            if not fits(have.version, need.versions):
                severity: Severity = "broken" if need.name == "torch" else "warning"
                yield Finding(
                    "APT-D04", severity,
                    f"{name} {package.version} was made for {need.name}{need.versions}, and another one is there",
                    f"{need.name} {have.version}", _together(system, package, have),
                )  # fmt: skip


def _together(system: System, package: Package, have: Package) -> str:
    """Raise the one that was made for the other; torch's own needs are older than what they meet."""
    if package.name == "torch":
        need = next(each for each in package.requirements() if each.name == have.name)
        return f"{system.pip} install '{need.name}{need.versions}'"
    return f"{system.pip} install --upgrade {package.name} {exactly(have)}"


def exactly(package: Package) -> str:
    """What pip takes for this very build; a torch for another platform than pip's index has is on torch's own."""
    version, _, local = package.version.partition("+")
    if not local:
        return f"'{package.name}=={version}'"
    return f"'{package.name}=={version}+{local}' --extra-index-url {BUILDS}/{local}"


def doubled(system: System) -> Iterator[Finding]:
    """The same package twice in a folder: its files are a mixture."""
    for name in dict.fromkeys((OURS, *_TIED, *_BASES)):
        found = system.packages.named(name)
        same = [package for package in found if package.site == found[0].site]
        if len(same) > 1:
            versions = " and ".join(package.version for package in same)
            severity: Severity = "broken" if name == "torch" else "warning"
            yield Finding(
                "APT-D05", severity, f"{name} is installed {len(same)} times in one folder: its files may be mixed",
                versions, f"{system.pip} uninstall -y {name} && {system.pip} uninstall -y {name}; "
                f"{system.pip} install --force-reinstall '{name}'",
            )  # fmt: skip


def shadowed(system: System) -> Iterator[Finding]:
    """Modules that hide the installed package of their name, and a second copy of our own."""
    for name in _IMPORTED:
        package, places = system.packages.get(name), system.packages.modules(name)
        if package is None or not places:
            continue
        first = places[0].parent if places[0].name == "__init__.py" else places[0]
        if first.parent != package.site and any(place.is_relative_to(package.site) for place in places):
            yield Finding(
                "APT-D06", "broken", f"'import {name}' takes {first}, which hides the installed package",
                f"{name} {package.version} is in {package.site}",
                f"mv {shlex.quote(str(first))} {shlex.quote(f'{first}.hidden')}",
            )  # fmt: skip
    copies = list(dict.fromkeys(place.parent.resolve() for place in system.packages.modules("apt_model")))
    if len(copies) > 1:
        yield Finding(
            "APT-D06", "warning", f"there are {len(copies)} copies of apt_model; {copies[0]} hides the others",
            " and ".join(str(copy) for copy in copies),
            f"{system.pip} uninstall -y {OURS}  # or leave the folder of the other copy, or unset PYTHONPATH",
        )  # fmt: skip


def tritons(system: System) -> Iterator[Finding]:
    """More than one owner of triton/."""
    found = [package for name in TRITONS for package in system.packages.named(name)[:1]]
    if len(found) > 1:
        names = " ".join(package.name for package in found)
        keep = next((package for package in found if package.name != "triton"), found[0])
        install = system.packages.torch
        if install and install.cuda and system.packages.get("triton"):
            keep = next(package for package in found if package.name == "triton")
        yield Finding(
            "APT-D07", "broken",
            f"{' and '.join(names.split())} all own the folder triton/ and overwrite one another's files",
            ", ".join(f"{package.name} {package.version}" for package in found),
            f"{system.pip} uninstall -y {names} && {system.pip} install '{keep.name}=={keep.version}'",
        )  # fmt: skip


CHECKS = (python, ours, tied, doubled, shadowed, tritons)
