"""Folders of FP4 weights: read with every name, type and shape checked before any data, and written.

    compressed-tensors, ours    w_packed  w_scale  w_global_scale (nvfp4; a divisor)
    ModelOpt                    w (U8)    w_scale  w_scale_2      (a multiplier)

# Shape suffix legend
#   N = output features, K = input features; leading dimensions are experts
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apt_model.core.errors import CheckpointError
from apt_model.core.fp4_storage import GLOBAL_SCALE, PACKED, SCALE
from apt_model.core.tensor_files import describe
from apt_model.core.tensor_folders import TensorFolder, open_folder
from apt_model.core.tensor_io import read_tensor
from apt_model.integrations.fp4_schemes import Scheme, quantization_of, read_scheme
from apt_model.ops.fp4.format import PackedWeight, check, get_format, row_blocks

_MULTIPLIER = "_scale_2"
# Scales of activations and of the cache, which weight-only 4-bit has no use for.
_IGNORED = re.compile(r"\.(input_scale|input_global_scale|k_scale|v_scale|output_scale)$")
_BITSANDBYTES = re.compile(r"\.(quant_state\.bitsandbytes__\w+|absmax|quant_map|nested_absmax|nested_quant_map)$")
_SCALES = re.compile(r"(\.weight|_proj)(_scale|_global_scale|_scale_2)$")
_SMOOTHED = re.compile(r"\.(pre_quant_scale|weight_g_idx|weight_zero_point)$")
_AGAIN = "download the files again; or quantise the 16-bit original: apt-model quantize DIR --format nvfp4 --out DIR2"


class StoredWeight(NamedTuple):
    """Where an FP4 weight's parts lie, by the tensors' names."""

    shape: tuple[int, ...]
    """[..., N, K], with K as the files have it: two inputs a byte."""
    packed: str
    scale: str
    global_scale: str | None
    inverted: bool
    """Whether the global scale is a multiplier."""


class FP4Folder(NamedTuple):
    """A checked folder; nothing but headers was read."""

    tensors: TensorFolder
    scheme: Scheme
    weights: dict[str, StoredWeight]
    """By the name of the weight that each stands for, such as 'model.layers.0.mlp.up_proj.weight'."""
    others: tuple[str, ...]
    """Tensors in full precision."""
    left_out: tuple[str, ...]
    """Scales of activations and of the cache."""

    def read_weight(self, name: str, in_features: int | None = None) -> PackedWeight:
        """One FP4 weight, on the CPU; `in_features` where a row's last bytes are padding."""
        stored = self.weights[name]
        parts = [
            None if part is None else self.read(part) for part in (stored.packed, stored.scale, stored.global_scale)
        ]
        packed, scale, global_scale = parts
        assert packed is not None
        assert scale is not None
        if global_scale is not None:
            global_scale = global_scale.reshape((*stored.shape[:-2], 1))
            if not bool(((global_scale > 0) & global_scale.isfinite()).all()):
                raise _refused(self.tensors, f"{stored.global_scale}: expected finite values above 0")
            global_scale = 1 / global_scale if stored.inverted else global_scale
        nan = (scale == 255) if scale.dtype == torch.uint8 else scale.isnan()  # E8M0's NaN
        if bool(nan.any()):
            raise _refused(self.tensors, f"{stored.scale} holds values that are no numbers")
        return check(PackedWeight(packed, scale, global_scale, in_features or stored.shape[-1]), name)

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored, on the CPU."""
        return read_tensor(self.tensors.homes[name], self.tensors.entries[name])

    def stream(self) -> Iterator[tuple[str, Tensor | PackedWeight]]:
        """Every weight and every other tensor, one at a time."""
        yield from ((name, self.read_weight(name)) for name in self.weights)
        yield from ((name, self.read(name)) for name in self.others)


def open_fp4(folder: Path, config: Mapping[str, Any] | None = None) -> FP4Folder:
    """Read a folder's headers and check that they hold what its `quantization_config` says.

    Args:
        folder: holds config.json and safetensors.
        config: instead of the folder's own `quantization_config`.

    Raises:
        CheckpointError: a file is truncated; a type, a shape or a partner is not what the format has; the method is
            another one. The message names the tensor, what was expected and what came.
    """
    tensors = open_folder(folder)
    if strange := of_bitsandbytes(tensors.entries):
        raise _refused(
            tensors, f"{strange} is bitsandbytes': its FP4 and NF4 have other values, and the high half of a byte first"
        )
    config = quantization_of(folder) if config is None else config
    if config is None:
        raise _refused(tensors, "neither config.json nor hf_quant_config.json says that its weights are quantised")
    scheme = read_scheme(config, folder)
    if smoothed := [name for name in tensors.entries if _SMOOTHED.search(name)]:
        raise _refused(tensors, f"{smoothed[0]} changes what its weight means, and is not read")
    return _sort(tensors, scheme)


def of_bitsandbytes(names: Iterable[str]) -> str | None:
    """The first tensor that bitsandbytes' 4-bit layers alone have."""
    return next((name for name in names if _BITSANDBYTES.search(name)), None)


def _sort(tensors: TensorFolder, scheme: Scheme) -> FP4Folder:
    modelopt = scheme.method == "modelopt"
    weights = {}
    for name, entry in tensors.entries.items():
        if modelopt and (f"{name}{SCALE}" in tensors.entries or (entry.dtype == "U8" and name.endswith(".weight"))):
            weights[name] = _stored(tensors, scheme, name, name)
        elif not modelopt and name.endswith(PACKED):
            base = name.removesuffix(PACKED)
            weights[base] = _stored(tensors, scheme, base, name)
    used = {part for stored in weights.values() for part in (stored.packed, stored.scale, stored.global_scale)}
    rest = [name for name in tensors.entries if name not in used]
    left_out = tuple(name for name in rest if _IGNORED.search(name))
    others = tuple(name for name in rest if name not in left_out)
    for name in others:
        if _SCALES.search(name):
            raise _refused(tensors, f"{name} is the scale of a weight that is not there, or that has no such scale")
        if name in weights:
            raise _refused(tensors, f"{name} stands beside its own packed form")
    if not weights:
        raise _refused(tensors, f"there is no weight in it that {scheme.method} would have packed")
    return FP4Folder(tensors, scheme, weights, others, left_out)


def _stored(tensors: TensorFolder, scheme: Scheme, base: str, packed: str) -> StoredWeight:
    """The parts of one weight, each of them checked against the packed codes."""
    form, entry = get_format(scheme.format), tensors.entries[packed]
    if entry.dtype != "U8" or len(entry.shape) < 2 or entry.shape[-1] % 8 or not entry.size:
        raise _refused(tensors, f"{packed}: expected U8 [..., N, bytes], whole blocks of 16 inputs, got {entry}")
    *lead, rows, row_bytes = entry.shape
    width = 2 * row_bytes
    inverted = scheme.method == "modelopt"
    suffix = _MULTIPLIER if inverted else GLOBAL_SCALE
    scale_dtype = "F8_E4M3" if form.has_global_scale else "U8"
    _expect(tensors, base + SCALE, packed, scale_dtype, [(*lead, rows, row_blocks(width, form))])
    if form.has_global_scale:
        shapes = [(*lead, 1), *([()] if not lead else [(*lead,)])]
        _expect(tensors, base + suffix, packed, "F32", shapes)
    return StoredWeight(
        (*lead, rows, width), packed, base + SCALE, base + suffix if form.has_global_scale else None, inverted
    )


def _expect(tensors: TensorFolder, name: str, partner: str, dtype: str, shapes: list[tuple[int, ...]]) -> None:
    expected = " or ".join(describe(dtype, shape) for shape in shapes)
    entry = tensors.entries.get(name)
    if entry is None:
        raise _refused(tensors, f"{name} is missing: expected {expected} beside {partner} {tensors.entries[partner]}")
    if entry.dtype != dtype or entry.shape not in shapes:
        raise _refused(tensors, f"{name}: expected {expected} beside {partner} {tensors.entries[partner]}, got {entry}")


def _refused(tensors: TensorFolder, reason: str) -> CheckpointError:
    return CheckpointError(f"{tensors.folder}: {reason}", state="no weight was read", remedy=_AGAIN)
