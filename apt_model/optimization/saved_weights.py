"""The tensors of a saved model under the names that its modules have for them: as they are, put together, quantised."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apt_model.layers.packed import PackedModule, pack, tensors
from apt_model.optimization.convert_plan import is_conv1d
from apt_model.vgpu.weights import FolderWeights, InFile, Weights


class TransformersWeights:
    """A folder's tensors by their names in a transformers model, which renames and stacks some (`conversion_mapping`).

    Args:
        folder: with the safetensors.
        model: a `PreTrainedModel` as the files are for, on meta.
        quantizer: of a folder that is quantised.
    """

    def __init__(self, folder: Path, model: Any, quantizer: Any = None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415 - takes seconds

        self._files, self._model = FolderWeights(folder), model
        self._plain: dict[str, str] = {}
        self._made: dict[str, _Made] = {}
        self._waiting: dict[str, Tensor] = {}  # made together with one that was asked for
        self.left: list[str] = []
        """Tensors of the files that the model has no place for."""
        mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        if quantizer is not None:
            mapping = quantizer.update_weight_conversions(mapping, model)
        for made in self._collect(mapping):
            for name in made.kinds:
                self._made[name] = made

    def __contains__(self, name: object) -> bool:
        return name in self._plain or name in self._made

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]] | None:
        """As the headers say, or what becomes of those."""
        return self._files.kind(self._plain[name]) if name in self._plain else self._made[name].kinds[name]

    def read(self, name: str) -> Tensor:
        """From the files."""
        if name in self._plain:
            return self._files.read(self._plain[name])
        if name not in self._waiting:
            self._waiting.update(self._made[name].make(self._files.read, self._model))
        return self._waiting.pop(name)

    def place(self, name: str) -> InFile | None:
        """In the files, unless it is made of several tensors."""
        return self._files.place(self._plain[name]) if name in self._plain else None

    def _collect(self, mapping: list[Any]) -> list["_Made"]:
        """Find each tensor's place in the model, in transformers' own way."""
        from transformers import core_model_loading as theirs  # noqa: PLC0415

        renamings = [each for each in mapping if isinstance(each, theirs.WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, theirs.WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        prefix, state = self._model.base_model_prefix, self._model.state_dict()
        found: dict[str, _Made] = {}
        for key in sorted(self._files.names(), key=theirs.dot_natural_key):
            name, pattern = theirs.rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = theirs.rename_source_key(key, [], [], prefix, state)
            if name not in state:
                self.left.append(key)
            elif pattern is None:
                self._plain[name] = key
            else:
                found.setdefault(name, _Made(by_pattern[pattern], name)).sources.append((pattern, key))
        for made in found.values():
            made.learn(self._files, self._model)
        return list(found.values())


class _Made:
    """Tensors of a model that are made of others in the files."""

    def __init__(self, converter: Any, name: str) -> None:
        self._converter, self._name = converter, name
        self.sources: list[tuple[str, str]] = []  # pattern, name in the files
        self.kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}

    def learn(self, files: FolderWeights, model: Any) -> None:
        """What comes of it, tried without values."""

        def empty(key: str) -> Tensor:
            kind = files.kind(key)
            assert kind is not None
            return torch.empty(kind[1], dtype=kind[0], device="meta")

        self.kinds = {name: (value.dtype, tuple(value.shape)) for name, value in self.make(empty, model).items()}

    def make(self, read: Callable[[str], Tensor], model: Any) -> dict[str, Tensor]:
        """By name in the model."""
        converter = copy.deepcopy(self._converter)
        for pattern, key in self.sources:
            converter.add_tensor(self._name, key, pattern, lambda key=key: read(key))
        made = converter.convert(self._name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class QuantizedWeights:
    """Values of a model some of whose modules are packed now: those are quantised as they are read.

    Args:
        weights: of the model before.
        model: with its packed modules in place.
        turned: names of packed modules whose weights files have as [in, out].
    """

    def __init__(self, weights: Weights, model: nn.Module, turned: set[str]) -> None:
        self._weights, self._turned = weights, turned
        self._of: dict[str, tuple[str, str, PackedModule, str]] = {}  # a part -> its weight, module, slot
        self._waiting: dict[str, Tensor] = {}
        for prefix, module in model.named_modules():
            for slot in module.slots if isinstance(module, PackedModule) else ():
                weight = f"{prefix}.{slot}" if prefix else slot
                if weight in weights:
                    assert isinstance(module, PackedModule)
                    for key, held in module.named_parameters(recurse=False):
                        if key.startswith(f"{slot}_") and held is not None:
                            self._of[f"{prefix}.{key}" if prefix else key] = (weight, prefix, module, slot)

    def __contains__(self, name: object) -> bool:
        return name in self._of or name in self._weights

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]] | None:
        """Of what is not quantised."""
        return None if name in self._of else self._weights.kind(name)

    def place(self, name: str) -> InFile | None:
        """Of what is not quantised."""
        return None if name in self._of else self._weights.place(name)

    def read(self, name: str) -> Tensor:
        """As it is, or a part of what it was quantised to."""
        if name not in self._of:
            return self._weights.read(name)
        if name not in self._waiting:
            weight, prefix, module, slot = self._of[name]
            values = self._weights.read(weight)
            turned = prefix in self._turned or module.slots[slot].swapped
            made = tensors(pack(values.mT if turned else values, module.format))
            self._waiting.update({f"{weight}_{part}": value for part, value in made.items()})
        return self._waiting.pop(name)


def turned_layers(model: nn.Module) -> set[str]:
    """Names of layers whose weights are [in, out]."""
    return {name for name, module in model.named_modules() if is_conv1d(module)}
