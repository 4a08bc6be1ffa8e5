"""How FP4 weights are named in our own files, and what config.json says of them. Imports no torch.

A weight `w` becomes `w_packed`, `w_scale` and, in nvfp4, `w_global_scale`: compressed-tensors' names, also for weights
that are not called `weight`, such as fused experts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_model.core.errors import CheckpointError
from apt_model.core.tensor_folders import read_json

CONFIG_FILE, QUANTIZATION_CONFIG = "config.json", "quantization_config"
QUANT_METHOD = "apt_fp4"
LAYOUT = 1
PACKING = "low-nibble-first"
BLOCKS = {"nvfp4": 16, "mxfp4": 32}
# Rows of codes are padded with zero codes to this many weights, in both formats.
ROW_MULTIPLE = 16
PACKED, SCALE, GLOBAL_SCALE = "_packed", "_scale", "_global_scale"
SCALES = (SCALE, GLOBAL_SCALE)
FROM_THE_ORIGINAL = "quantise the 16-bit original: apt-model quantize DIR --format nvfp4 --out DIR2"


def row_bytes(in_features: int) -> int:
    """P, the bytes of a row of codes."""
    return -(-in_features // ROW_MULTIPLE) * (ROW_MULTIPLE // 2)


def packed_parts(shape: Sequence[int], form: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of what a weight [..., N, K] becomes, by the last part of its name."""
    *lead, rows, width = shape
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        PACKED: ("U8", (*lead, rows, row_bytes(width))),
        SCALE: ("F8_E4M3" if form == "nvfp4" else "U8", (*lead, rows, -(-width // BLOCKS[form]))),
    }
    if form == "nvfp4":
        parts[GLOBAL_SCALE] = ("F32", (*lead, 1))
    return parts


def quantization_config(form: str, not_converted: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` in our own words."""
    from apt_model import __version__  # noqa: PLC0415 - only here, and the package imports us lazily

    return {
        "quant_method": QUANT_METHOD,
        "format": form,
        "group_size": BLOCKS[form],
        "modules_to_not_convert": list(not_converted),
        "packing": PACKING,
        "layout": LAYOUT,
        "apt_version": __version__,
    }


def format_of(folder: Path) -> str | None:
    """The format of the FP4 weights in a folder of ours; None where it says nothing of any."""
    config = read_json(folder / CONFIG_FILE).get(QUANTIZATION_CONFIG)
    if config is None:
        return None
    if not isinstance(config, dict):
        raise refused(folder / CONFIG_FILE, "", "an object", config)
    return read_format(config, folder / CONFIG_FILE)


def read_format(config: Mapping[str, Any], where: object) -> str:
    """The format that our own `quantization_config` names; `CheckpointError` for what this version does not read."""
    if config.get("quant_method") != QUANT_METHOD:
        raise refused(where, "quant_method", repr(QUANT_METHOD), config.get("quant_method"))
    form = config.get("format")
    if form not in BLOCKS:
        raise refused(where, "format", "nvfp4 or mxfp4", form)
    for name, expected in (("group_size", BLOCKS[form]), ("packing", PACKING), ("layout", LAYOUT)):
        if config.get(name, expected) != expected:
            raise refused(where, name, repr(expected), config[name])
    return str(form)


def refused(where: object, name: str, expected: str, got: object, why: str = "") -> CheckpointError:
    """The error for an entry of `quantization_config` that cannot be met."""
    return CheckpointError(
        f"{where}: {'.'.join(filter(None, (QUANTIZATION_CONFIG, name)))}: expected {expected}, got {got!r:.200}{why}",
        state="no weight was read",
        remedy=FROM_THE_ORIGINAL,
    )
