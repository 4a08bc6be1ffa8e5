"""Checks of environment variables: cloud services, whose values are never shown, and our own."""

import difflib
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from apt_model.cli.diagnosis.finding import Finding
from apt_model.cli.diagnosis.system import System
from apt_model.core import env

CLOUDS = {
    "Huawei Cloud": ("HUAWEI_CLOUD_API_KEY", "HUAWEI_CLOUD_ENDPOINT", "HUAWEI_CLOUD_MODEL"),
    "RunPod": ("RUNPOD_API_KEY", "RUNPOD_ENDPOINT_ID"),
    "Salad": ("SALAD_API_KEY", "SALAD_ENDPOINT"),
    "A server of your own": ("APT_CLOUD_ENDPOINT", "APT_CLOUD_API_KEY"),
}
"""Service -> the variables that belong together."""
_OPTIONAL = ("APT_CLOUD_API_KEY",)  # a server on this machine may take calls without one
_HERE = ("localhost", "127.0.0.1", "::1")
_DEVICE = re.compile(r"(auto|cpu|cuda|hpu|npu|xpu)(:\d+)?")


def clouds(system: System) -> Iterator[Finding]:
    """Services of which only a part is set, and addresses that are not https."""
    for service, names in CLOUDS.items():
        there = [name for name in names if system.get(name)]
        lacking = [name for name in names if name not in (*there, *_OPTIONAL)]
        if there and lacking:
            yield Finding(
                "APT-D50", "warning", f"{service} cannot be used: {' and '.join(lacking)} {_verb(lacking)} not set",
                f"set: {', '.join(there)}", "; ".join(f"export {name}=..." for name in lacking),
            )  # fmt: skip
        for name in there:
            if name.endswith("_ENDPOINT") and not _is_safe(system.variables[name]):
                yield Finding(
                    "APT-D51", "warning", f"{name} does not begin with https://, or names no host",
                    "its value is not shown", f"export {name}=https://HOST/PATH",
                )  # fmt: skip


def _verb(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"


def _is_safe(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and (
            parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _HERE)
        )
    except ValueError:
        return False


def unknown(system: System) -> Iterator[Finding]:
    """Variables of our prefix that nothing reads."""
    known = {variable.name.removeprefix(env.PREFIX): variable.name for variable in env.VARIABLES}
    for name in sorted(system.variables):
        rest = name.removeprefix(env.PREFIX)
        if rest == name or rest in known:
            continue
        near = difflib.get_close_matches(rest, known, n=1)
        if near:
            yield Finding(
                "APT-D60", "warning", f"{name} is read by nothing: did you mean {known[near[0]]}?", "",
                f'export {known[near[0]]}="${name}"; unset {name}',
            )  # fmt: skip
        else:
            yield Finding("APT-D60", "note", f"{name} is not a variable of this version", "", f"unset {name}")


def device(system: System) -> Iterator[Finding]:
    """A name in APT_DEVICE that no version knows; whether a known one is there, the probe finds out."""
    value = system.get(env.DEVICE.name)
    if value and not _DEVICE.fullmatch(value):
        near = difflib.get_close_matches(value, ("cuda", "cpu", "auto"), n=1)
        more = f": did you mean {near[0]!r}?" if near else ""
        yield Finding(
            "APT-D61", "warning", f"{env.DEVICE.name} takes {env.DEVICE.takes}{more}", f"got {value!r}",
            f"unset {env.DEVICE.name}",
        )  # fmt: skip


CHECKS = (clouds, unknown, device)
