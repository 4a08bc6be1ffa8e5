"""Amounts of memory as people write them: '24GiB', '24GB', '2000MB', '2000' (MB)."""

import re

from apt_model.core.errors import ConfigError
from apt_model.vgpu.units import MB

_UNITS = {
    "": MB, "b": 1, "kb": 10**3, "mb": MB, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30,
    "tib": 2**40,
}  # fmt: skip


def capacity(text: str, option: str) -> int:
    """Bytes; `ConfigError` that names the option for anything else than an amount above 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    count = int(float(match[1]) * unit) if match and unit else 0
    if count < 1:
        raise ConfigError(
            f"{option}: expected an amount of memory above 0, got {text!r}",
            remedy=f"for one: {option} 24GiB (or MB, GB)",
        )
    return count
