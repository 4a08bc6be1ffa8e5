"""What a model makes of the tensors in its files: which are matrices of linear layers, and which only look like it."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from apt_model.core.fp4_names import EXPERT_WEIGHTS
from apt_model.core.fp4_storage import CONFIG_FILE
from apt_model.core.tensor_folders import read_json

LINEAR, TRANSPOSED, EXPERTS = "linear", "transposed", "experts"


class Outline(NamedTuple):
    """A model without weights, seen from its files."""

    source: str
    """Who says so: a class's name, or names, and why."""
    kinds: dict[str, str]
    """By a tensor's name in the files: LINEAR [N, K], TRANSPOSED [K, N], EXPERTS [E, ...], or what else it is."""
    linears: tuple[str, ...]
    """Every linear layer's name in the model."""
    renamed: dict[str, str]
    """A tensor's name in the model, where it is another one than in the files."""
    turned: dict[str, bool]
    """Whether fused experts have their inputs first, where the model says so."""


def outline(model: nn.Module, names: Iterable[str], rename: Callable[[str], str] = str) -> Outline:
    """Look the tensors `names` of `model`'s files up in it; `rename` gives each one's name in the model."""
    modules = dict(model.named_modules())
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kinds, renamed, turned = {}, {}, {}
    tied = _tied(model)
    for name in names:
        if (inside := rename(name)) != name:
            renamed[name] = inside
        owner, _, part = inside.rpartition(".")
        module = modules.get(owner)
        kinds[name] = "not part of the model" if module is None else _kind(module, part, is_head=module is head)
        if kinds[name] == LINEAR and inside in tied:
            kinds[name] = "tied to another tensor"
        if isinstance(order := getattr(module, "is_transposed", None), bool):
            turned[name] = order
    linears = tuple(name for name, module in modules.items() if isinstance(module, nn.Linear))
    return Outline(type(model).__name__, kinds, linears, renamed, turned)


def no_outline(why: str) -> Outline:
    """Where names alone decide."""
    return Outline(why, {}, (), {}, {})


def hugging_face_outline(folder: Path, names: Iterable[str]) -> Outline:
    """The outline of the transformers model in `folder`; where there is none, why. Code in the folder is not run."""
    config = read_json(folder / CONFIG_FILE)
    architecture = (config.get("architectures") or [None])[0]
    if not isinstance(architecture, str):
        return no_outline("names, as config.json tells of no model")
    try:
        import transformers  # noqa: PLC0415 - takes seconds, and is not everywhere
        from transformers import conversion_mapping, core_model_loading  # noqa: PLC0415
    except ImportError:
        return no_outline("names, as transformers 5 is not installed")
    kind = getattr(transformers, architecture, None)
    if kind is None:
        return no_outline(f"names, as transformers has no {architecture}")
    try:
        with torch.device("meta"):
            model = kind(kind.config_class.from_pretrained(folder))
        mapping = conversion_mapping.get_model_conversion_mapping(model)
        renamings = [each for each in mapping if isinstance(each, core_model_loading.WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, core_model_loading.WeightConverter)]
        state = model.state_dict()

        def rename(name: str) -> str:
            prefix = model.base_model_prefix
            found = core_model_loading.rename_source_key(name, renamings, converters, prefix, state)[0]
            return name if found not in state and name in state else found

        return outline(model, names, rename)
    except Exception as error:  # noqa: BLE001 - whatever a model's own code raises: names decide then, and it is said
        return no_outline(
            f"names, as transformers cannot build {architecture} ({type(error).__name__}: {error!s:.200})"
        )


def _tied(model: nn.Module) -> set[str]:
    """Names of parameters that stand in several places."""
    holders: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)].append(name)
    return {name for names in holders.values() if len(names) > 1 for name in names}


def _kind(module: nn.Module, part: str, *, is_head: bool) -> str:
    if is_head:
        return "the output projection"
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if part == "weight" and isinstance(module, nn.Linear):
        return LINEAR
    if part == "weight" and type(module).__name__ == "Conv1D":
        return TRANSPOSED
    if part in EXPERT_WEIGHTS and getattr(getattr(module, part, None), "ndim", 0) == 3:
        return EXPERTS
    return f"of a {type(module).__name__}"
