"""What config.json says of FP4 weights: our own words, compressed-tensors' and ModelOpt's. Imports no torch.

All three mean the same codes and blocks. They differ in the tensors' names, and in the global scale: compressed-tensors
(and we) divide by it, ModelOpt multiplies with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from apt_model.core.errors import CheckpointError
from apt_model.core.fp4_storage import BLOCKS, CONFIG_FILE, QUANT_METHOD, QUANTIZATION_CONFIG, read_format, refused
from apt_model.core.tensor_folders import read_json

Method = Literal["apt_fp4", "compressed-tensors", "modelopt"]

MODELOPT_FILE = "hf_quant_config.json"
_SUFFIX = "-pack-quantized"
# compressed-tensors' names for how scales are shared, and their type.
_STRATEGIES = {"nvfp4": ("tensor_group", "torch.float8_e4m3fn"), "mxfp4": ("group", "torch.uint8")}
_PRESETS = {"NVFP4": "nvfp4", "NVFP4A16": "nvfp4", "MXFP4": "mxfp4", "MXFP4A16": "mxfp4"}
_MODELOPT_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")
_ACTIVATIONS = "its activations were made for fewer bits too; here they stay as they are"
_CACHE = "its keys and values were made for fewer bits; here they stay as they are"
# Methods that are not read, and why.
_OTHERS = {
    "bitsandbytes": "its FP4 and NF4 have other values (0, 0.0052, 0.167 ... 1) and the high half of a byte first",
    "mxfp4": "gpt-oss's own layout of blocks and scales",
}


@dataclass(frozen=True)
class Scheme:
    """How a folder's FP4 weights are stored."""

    method: Method
    format: str
    notes: tuple[str, ...] = ()
    """What the folder asks for beyond 4-bit weights, and is not done."""


def compressed_tensors_config(form: str, not_converted: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` as compressed-tensors writes it for weights alone (its presets NVFP4A16 and MXFP4A16)."""
    strategy, scale_dtype = _STRATEGIES[form]
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "group_size": BLOCKS[form],
        "strategy": strategy,
        "dynamic": False,
        "scale_dtype": scale_dtype,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": form + _SUFFIX,
    }
    return {
        "config_groups": {"group_0": group},
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": None,
        "format": form + _SUFFIX,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": list(not_converted),
    }


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """What a folder says of its quantisation, in config.json or in ModelOpt's own file; None when it is silent."""
    found = read_json(folder / CONFIG_FILE).get(QUANTIZATION_CONFIG) if (folder / CONFIG_FILE).is_file() else None
    if found is None and (folder / MODELOPT_FILE).is_file():
        found = {"quant_method": "modelopt", **read_json(folder / MODELOPT_FILE)}
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"{folder}: expected {QUANTIZATION_CONFIG} to be an object, got {found!r:.80}")
    return found


def read_scheme(config: Mapping[str, Any], where: object) -> Scheme:
    """The scheme that a `quantization_config` describes.

    Raises `CheckpointError` that names the entry which is unknown, or asks for what is not done.
    """
    method = config.get("quant_method")
    if method == QUANT_METHOD:
        return Scheme("apt_fp4", read_format(config, where))
    if method == "compressed-tensors":
        return _compressed_tensors(config, where)
    if method in ("modelopt", "modelopt_fp4"):
        return _modelopt(config, where)
    why = f": {_OTHERS[method]}" if method in _OTHERS else ""
    raise refused(where, "quant_method", "apt_fp4, compressed-tensors or modelopt", method, why)


def _compressed_tensors(config: Mapping[str, Any], where: object) -> Scheme:
    for name in ("transform_config", "sparsity_config"):
        if config.get(name):
            raise refused(where, name, "none", config[name])
    if (status := config.get("quantization_status", "compressed")) != "compressed":
        raise refused(where, "quantization_status", "'compressed'", status)
    forms, notes = [], []
    for name, group in _groups(config, where):
        if isinstance(group, list):  # a preset and the layers that it is for
            if name.upper() not in _PRESETS:
                raise refused(where, "config_groups", f"one of the presets {', '.join(_PRESETS)}", name)
            forms.append(_PRESETS[name.upper()])
            notes += [] if name.upper().endswith("A16") else [_ACTIVATIONS]
        else:
            forms.append(_group_format(name, group, group.get("format") or config.get("format"), where))
            notes += [_ACTIVATIONS] if group.get("input_activations") else []
    if len(set(forms)) != 1:
        raise refused(where, "config_groups", "one format for all weights", forms)
    notes += [_CACHE] if config.get("kv_cache_scheme") else []
    return Scheme("compressed-tensors", forms[0], tuple(dict.fromkeys(notes)))


def _groups(config: Mapping[str, Any], where: object) -> Iterator[tuple[str, Any]]:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise refused(where, "config_groups", "an object of groups", groups)
    for name, group in groups.items():
        if not isinstance(group, dict | list):
            raise refused(where, f"config_groups.{name}", "an object", group)
        yield name, group


def _group_format(name: str, group: Mapping[str, Any], stored: object, where: object) -> str:
    form = str(stored).removesuffix(_SUFFIX)
    if form not in BLOCKS or stored != form + _SUFFIX:
        raise refused(where, "format", "nvfp4-pack-quantized or mxfp4-pack-quantized", stored)
    weights = group.get("weights") or {}
    expected = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": BLOCKS[form]}
    for key, value in expected.items():
        if weights.get(key, True if key == "symmetric" else None) != value:
            raise refused(where, f"config_groups.{name}.weights.{key}", repr(value), weights.get(key))
    return form


def _modelopt(config: Mapping[str, Any], where: object) -> Scheme:
    config = config.get("quantization") or config
    algorithm = config.get("quant_algo")
    if algorithm not in _MODELOPT_ALGORITHMS:
        raise refused(where, "quant_algo", " or ".join(_MODELOPT_ALGORITHMS), algorithm)
    if (size := config.get("group_size", BLOCKS["nvfp4"])) != BLOCKS["nvfp4"]:
        raise refused(where, "group_size", str(BLOCKS["nvfp4"]), size)
    notes = [_ACTIVATIONS] if algorithm == "NVFP4" else []
    notes += [_CACHE] if config.get("kv_cache_quant_algo") else []
    return Scheme("modelopt", "nvfp4", tuple(notes))
