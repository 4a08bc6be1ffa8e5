"""FP4 layers in a model's files: which layers they are, and what config.json says of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apt_model.core.errors import CheckpointError, InputError
from apt_model.core.fp4_storage import (
    CONFIG_FILE,
    GLOBAL_SCALE,
    PACKED,
    QUANTIZATION_CONFIG,
    SCALE,
    format_of,
    quantization_config,
)
from apt_model.layers.fp4_embedding import check_no_packed_embedding
from apt_model.layers.fp4_linear import FusedFP4Linear

_WEIGHT = ".weight"


def is_packed(name: str) -> bool:
    """Whether a tensor is a part of a packed weight."""
    return name.endswith((_WEIGHT + PACKED, _WEIGHT + SCALE, _WEIGHT + GLOBAL_SCALE))


def swap_layers(model: nn.Module, names: Iterable[str], directory: Path, dtype: torch.dtype) -> None:
    """Put FP4 layers, on meta, where the tensors `names` of `directory` are packed.

    Raises `CheckpointError` when config.json does not say so, or the model has no linear layer there.
    """
    layers = [name.removesuffix(_WEIGHT + PACKED) for name in names if name.endswith(_WEIGHT + PACKED)]
    form = format_of(directory)
    if not layers and form is None:
        return
    if not layers or form is None:
        how, said = ("packed in 4 bits", "no ") if layers else ("not packed", "a ")
        raise CheckpointError(
            f"{directory}: its weights are {how}, and {CONFIG_FILE} has {said}{QUANTIZATION_CONFIG}",
            remedy="the files come from different saves: quantise the model again",
        )
    modules = dict(model.named_modules())
    for name in layers:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(f"{directory}: {name} is packed, and the model has no linear layer there")
        packed = FusedFP4Linear(
            linear.in_features, linear.out_features, linear.bias is not None, format=form, device="meta", dtype=dtype
        )
        model.set_submodule(name, packed)


def describe_layers(model: nn.Module) -> dict[str, Any] | None:
    """`quantization_config` of a model with FP4 layers; None of one without.

    Raises `InputError` when layers are in different formats, for which config.json has no words, or embeddings in any.
    """
    check_no_packed_embedding(model)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, FusedFP4Linear)}
    if not packed:
        return None
    forms = sorted({module.format for module in packed.values()})
    if len(forms) > 1:
        raise InputError(f"save_pretrained: expected one FP4 format in a model, got {' and '.join(forms)}")
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in packed]
    return quantization_config(forms[0], others)
