"""Which modules of a transformers model become FP4, why the others do not, and the exchange of one for the other."""

# ruff: noqa: SLF001 - a module's own parameters are in a dictionary with a leading underscore

import copy
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from apt_model.core.errors import InputError
from apt_model.core.fp4_names import HEAD, ROUTER
from apt_model.core.options import require
from apt_model.core.patterns import covers
from apt_model.layers.fp4_embedding import FusedFP4Embedding
from apt_model.layers.fp4_experts import FP4Experts, expert_weights, pack_experts, unpack_experts
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.layers.packed import FLOATS, PARTS, PackedModule

_PATTERNS = "AptFP4Config.modules_to_not_convert"


class Candidate(NamedTuple):
    """A module that holds weights of linear layers."""

    name: str
    weights: tuple[str, ...]
    kept: str | None
    """Why it stays as it is."""

    @property
    def full_names(self) -> tuple[str, ...]:
        """Its weights' names in the model."""
        return tuple(f"{self.name}.{weight}" for weight in self.weights)


class LoadReport(NamedTuple):
    """What became of a model's linear layers; as a text, one line a finding."""

    format: str
    quantized: tuple[str, ...]
    kept: dict[str, str]
    """By a module's name, why it is not in 4 bits."""

    def __str__(self) -> str:
        lines = [f"{self.format}: {len(self.quantized)} modules in 4 bits"]
        reasons: dict[str, list[str]] = defaultdict(list)
        for name, why in self.kept.items():
            reasons[why].append(name)
        return "\n".join([*lines, *(f"left as they are ({why}): {', '.join(names)}" for why, names in reasons.items())])


def candidates(model: Any, patterns: Iterable[str], *, strict: bool) -> list[Candidate]:
    """Every module that could be quantised, in the model's order.

    Args:
        model: a `PreTrainedModel`, on meta or not.
        patterns: what is to stay as it is.
        strict: whether a pattern that covers no module raises `ConfigError`.
    """
    names = [name for name, _ in model.named_modules()]
    patterns = tuple(patterns)
    for pattern in patterns if strict else ():
        known = any(covers(pattern, name) for name in names)
        require(known, _PATTERNS, "patterns of which each covers a module", pattern)
    kept = _KeptByModel(model)
    found = []
    for name, module in model.named_modules():
        if weights := _weights(name, module):
            prefixed = f"{model.base_model_prefix}.{name}"
            asked = next((each for each in patterns if covers(each, name) or covers(each, prefixed)), None)
            why = f"asked for: {asked}" if asked else kept.reason(name, module, weights)
            found.append(Candidate(name, weights, why))
    return found


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, with its weight as [in, out]."""
    return isinstance(module, Conv1D)


def pack_module(model: nn.Module, name: str, form: str, activation_dtype: str | None = None) -> PackedModule:
    """Put a packed module in the place of the one called `name`, its weights as they are: on meta, nothing is made."""
    module = model.get_submodule(name)
    if isinstance(module, PackedModule):
        return module
    made: PackedModule
    if isinstance(module, nn.Linear) or is_conv1d(module):
        weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
        rows_first = weight if isinstance(module, nn.Linear) else weight.mT
        made = FusedFP4Linear.from_weight(rows_first, bias, format=form, activation_dtype=activation_dtype)
        made.is_conv1d = is_conv1d(module)  # in files its weight has its inputs first
        model.set_submodule(name, made.train(module.training))
    else:
        made = pack_experts(module, format=form, activation_dtype=activation_dtype)
    made._is_hf_initialized = True  # transformers would draw its weights
    return made


def plain_linear(layer: FusedFP4Linear, dtype: torch.dtype | None = None) -> nn.Linear:
    """An `nn.Linear` of the layer's values, with a bias of its own; the layer stays as it is."""
    dtype = dtype or layer.dtype
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(layer.dequantize().to(dtype), requires_grad=False)
    if layer.bias is not None:
        bias = layer.bias.detach().to(dtype, copy=True)
        made.register_parameter("bias", nn.Parameter(bias, requires_grad=layer.bias.requires_grad))
    return made.train(layer.training)


def files_form(linear: nn.Linear, packed: nn.Module) -> nn.Module:
    """The module that transformers has in the place of `packed`, of these values: the linear layer, or a `Conv1D`."""
    if not getattr(packed, "is_conv1d", False):
        return linear
    with torch.device("meta"):
        made = Conv1D(linear.out_features, linear.in_features)
    made.weight = nn.Parameter(linear.weight.detach().mT.contiguous(), requires_grad=linear.weight.requires_grad)
    made.bias = linear.bias
    return made.train(linear.training)


def unpack_model(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give every packed module of a model its full-precision form, in place and one at a time."""
    for name in [name for name, each in model.named_modules() if isinstance(each, PackedModule)]:
        module = model.get_submodule(name)
        if isinstance(module, FP4Experts):
            unpack_experts(module, dtype)
        elif isinstance(module, FusedFP4Embedding):
            model.set_submodule(name, module.to_embedding(dtype).requires_grad_(False))
        else:
            assert isinstance(module, FusedFP4Linear)
            model.set_submodule(name, files_form(plain_linear(module, dtype), module))


def part_names(module: PackedModule, name: str) -> list[str]:
    """Full names of the packed tensors of the module called `name`."""
    held = module._parameters
    return [
        f"{name}.{weight}_{part}" for weight in module.slots for part in PARTS if held[f"{weight}_{part}"] is not None
    ]


def _weights(name: str, module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return ("weight",)
    if isinstance(module, FP4Experts):
        return tuple(module.slots)
    if name.lower().endswith("experts") or type(module).__name__.lower().endswith("experts"):
        return tuple(expert_weights(module))
    return ()


class _KeptByModel:
    """What a model itself, or the kind of a module, rules out."""

    def __init__(self, model: Any) -> None:
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self.tied = {**tied, **{target: source for source, target in tied.items()}}
        self.head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self.fp32: Collection[str] = {
            *(getattr(model, "_keep_in_fp32_modules", None) or ()),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
        }
        self.holders: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.holders[id(parameter)].append(name)

    def reason(self, name: str, module: nn.Module, weights: tuple[str, ...]) -> str | None:
        """Why a module stays as it is; None where it does not."""
        if isinstance(module, PackedModule):
            return None
        if module is self.head or HEAD.search(name):
            return "the output projection"
        if ROUTER.search(name):
            return "a router"
        if any(covers(each, name) for each in self.fp32):
            return "the model keeps it in float32"
        for weight in weights:
            if reason := self._of_weight(f"{name}.{weight}", module._parameters.get(weight)):
                return reason
        if isinstance(module, nn.Linear):
            return _not_plain(module)
        return None if is_conv1d(module) else _no_experts(module)

    def _of_weight(self, name: str, weight: Tensor | None) -> str | None:
        if name in self.tied:
            return f"tied to {self.tied[name]}"
        others = [each for each in self.holders[id(weight)] if each != name]
        if others:
            return f"tied to {others[0]}"
        if weight is None or type(weight) is not nn.Parameter:
            return "its weight is no plain parameter"
        return None if weight.dtype in FLOATS and weight.numel() else f"its weight is {weight.dtype}"


def _not_plain(module: nn.Linear) -> str | None:
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is a subclass of nn.Linear and may do more"
    more = module._buffers or module._modules or module._parameters.keys() - {"weight", "bias"}
    return "it holds more than a weight and a bias" if more else None


def _no_experts(module: nn.Module) -> str | None:
    """Why these experts cannot be packed, tried on a copy on meta."""
    shell = copy.copy(module)
    shell._parameters = {
        name: None if held is None else nn.Parameter(torch.empty_like(held, device="meta"), requires_grad=False)
        for name, held in module._parameters.items()
    }
    try:
        pack_experts(shell)
    except InputError as error:
        return error.message
    return None
