"""How FP4 tensors get from files into a transformers model and back: quantised while loading, stacked by expert.

# Shape suffix legend
#   E = experts
"""

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from apt_model.core.errors import CheckpointError
from apt_model.core.fp4_storage import FROM_THE_ORIGINAL, GLOBAL_SCALE, PACKED, SCALE
from apt_model.core.tensor_files import read_header

Take = Callable[[nn.Module, str, Tensor, "set[str] | None"], dict[str, Tensor]]


class QuantizeFP4(ConversionOps):  # type: ignore[misc]  # Any to mypy
    """A weight, as it comes from its file -> its packed tensors."""

    def __init__(self, take: Take) -> None:
        self.take = take

    def __deepcopy__(self, memo: object) -> "QuantizeFP4":
        return self  # a copy would hold a second model

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """`input_dict` holds full names; those that stay as they are pass through."""
        made: dict[str, Tensor] = {}
        while input_dict:  # each is dropped before the next is quantised
            name, value = input_dict.popitem()
            weight = value[0] if isinstance(value, list) else value
            del value
            made |= self.take(model, name, weight, missing_keys)
        return made


class ShareScale(ConversionOps):  # type: ignore[misc]  # Any to mypy
    """Global scales of matrices that lie in one stack, [E, 1] each: they must be the same, and one of them is kept."""

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Tensor]:
        """Several equal -> one."""
        first, *others = [value[0] if isinstance(value, list) else value for value in input_dict.values()]
        for other in others:
            if not torch.equal(first, other):
                raise CheckpointError(
                    f"{' and '.join(input_dict)}: expected one global scale for both, as they are one matrix here",
                    remedy=FROM_THE_ORIGINAL,
                )
        return {target_patterns[0]: first}

    @property
    def reverse_op(self) -> "RepeatScale":
        """Back into files."""
        return RepeatScale()


class RepeatScale(ConversionOps):  # type: ignore[misc]  # Any to mypy
    """The global scale of a stack [E, 1], for each of the matrices in it."""

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Tensor]:
        """One -> several."""
        (value,) = input_dict.values()
        scale = value[0] if isinstance(value, list) else value
        return {target: scale.clone() for target in target_patterns}  # safetensors takes no tensor twice

    @property
    def reverse_op(self) -> ShareScale:
        """Back into the model."""
        return ShareScale()


def expert_conversions(conversions: Iterable[Any], model: nn.Module) -> list[Any]:
    """For each conversion that stacks experts' weights, the same for the packed tensors that the model has."""
    names = "\n".join(name for name, _ in model.named_parameters())
    made = []
    for each in conversions:
        for suffix in (PACKED, SCALE, GLOBAL_SCALE) if stacks_experts(each) else ():
            (target,) = each._original_target_patterns  # noqa: SLF001 - transformers' own quantisers read it
            if re.search(f"{target}{suffix}$", names, re.MULTILINE):
                sources = [source + suffix for source in each._original_source_patterns]  # noqa: SLF001
                made.append(each.copy(sources, [target + suffix], operations=_operations(each, suffix)))
    return made


def stacks_experts(conversion: Any) -> bool:
    """Whether it makes one stack [E, ...] of experts' weights, rows first, and does nothing else."""
    if not isinstance(conversion, WeightConverter) or len(conversion._original_target_patterns) != 1:  # noqa: SLF001
        return False
    stacked = all(
        (type(each) is MergeModulelist and each.dim == 0) or (type(each) is Concatenate and each.dim == 1)
        for each in conversion.operations
    )
    named = all(source.endswith(".weight") for source in conversion._original_source_patterns)  # noqa: SLF001
    return stacked and named and type(conversion.operations[0]) is MergeModulelist


def names_in(files: Sequence[str] | None) -> list[str] | None:
    """Names of the tensors in safetensors files; None where there are other files, or none."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return None
    return [name for file in files for name in read_header(Path(file)).entries]


def check_names(names: Iterable[str], model: Any, conversions: Iterable[Any], expected: Iterable[str]) -> None:
    """Raise `CheckpointError` unless files with these tensors hold all packed ones of the model, and no others.

    Args:
        names: the tensors in the files.
        model: on meta, packed modules in place.
        conversions: all of them; they are not changed.
        expected: full names of the model's packed tensors.
    """
    mapping = [copy.deepcopy(each) for each in conversions]  # they count their uses
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    state = model.state_dict()

    def inside(name: str) -> str:
        found = rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]
        if found in state or name not in state:
            return str(found)
        return name

    there = {inside(name) for name in names}
    missing = sorted(set(expected) - there)
    if missing:
        raise _refused(f"{len(missing)} packed tensors are missing", missing)
    whole = sorted(name for name in there if name.endswith(PACKED) and name.removesuffix(PACKED) in state)
    if whole:
        raise _refused(f"{len(whole)} weights are packed that the model keeps whole", whole)


def _refused(what: str, names: list[str]) -> CheckpointError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return CheckpointError(
        f"{what}: {', '.join(names[:3])}{more}", state="no weight was read", remedy=FROM_THE_ORIGINAL
    )


def _operations(conversion: Any, suffix: str) -> list[Any]:
    if suffix != GLOBAL_SCALE:
        return list(conversion.operations)
    return [ShareScale() if type(each) is Concatenate else each for each in conversion.operations]
