"""What `quantize` would do to a model: which modules it would take, and why it would leave others. Changes nothing."""

# ruff: noqa: SLF001 - a module's own parameters are in a dictionary with a leading underscore

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from apt_model.core.options import require
from apt_model.core.patterns import covers
from apt_model.layers.fp4_embedding import option_of_training
from apt_model.layers.fp4_experts import expert_weights
from apt_model.layers.packed import FLOATS, PackedModule
from apt_model.optimization.fp4_config import FP4Config, Skipped

HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
_STATE_HOOKS = tuple(name for name in HOOKS if "state_dict" in name)


class Candidate(NamedTuple):
    """A module that holds weights of linear layers, or the table of an embedding."""

    name: str
    module: nn.Module
    weights: tuple[str, ...]  # names of its parameters that would be quantised
    asked: str | None  # the pattern of `skip` that covers it
    fault: str | None  # why it cannot be quantised

    def skipped(self) -> Skipped:
        """How the report shows a module that is left."""
        held = self.module._parameters
        reason = f"skip={self.asked!r}" if self.asked else str(self.fault)
        return Skipped(self.name, reason, sum(nbytes(held.get(name)) for name in self.weights))


def make_plan(model: nn.Module, config: FP4Config) -> list[Candidate]:
    """Every module that may be quantised, once, in the model's order.

    Raises:
        ConfigError: a pattern of `config.skip`, other than the default ones, covers no module.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in config.skip:
        known = pattern in FP4Config().skip or any(covers(pattern, name) for name in names)
        require(known, "FP4Config.skip", "patterns of which each covers a module", pattern)
    holders = _holders(model)
    found = []
    for name, module in model.named_modules():
        weights = _weights(name, module, embeddings=config.embeddings)
        if weights:
            asked = next((each for each in config.skip if covers(each, name)), None)
            fault = _fault(module, weights, f"{name}." if name else "", holders)
            found.append(Candidate(name, module, weights, asked, fault))
    return found


def other_matrices(model: nn.Module, plan: Sequence[Candidate]) -> tuple[Skipped, ...]:
    """Float parameters of two or more dimensions that are in no candidate, each once."""
    known = {id(each.module) for each in plan}
    owners = {
        f"{name}.{key}" if name else key: module for name, module in model.named_modules() for key in module._parameters
    }
    return tuple(
        Skipped(name, type(owners[name]).__name__, nbytes(held))
        for name, held in model.named_parameters()
        if held.dim() > 1 and held.is_floating_point()
        if id(owners[name]) not in known and not isinstance(owners[name], PackedModule)
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's `Conv1D`: a linear layer with its weight as [in, out]."""
    weight = module._parameters.get("weight")
    sizes = (getattr(module, "nx", None), getattr(module, "nf", None))
    return type(module).__name__ == "Conv1D" and weight is not None and tuple(weight.shape) == sizes


def nbytes(held: Tensor | None) -> int:
    """Bytes of a tensor, on any device and on meta."""
    return 0 if held is None else held.numel() * held.element_size()


def _weights(name: str, module: nn.Module, *, embeddings: bool) -> tuple[str, ...]:
    if isinstance(module, PackedModule):
        return ()
    if isinstance(module, nn.Linear) or is_conv1d(module) or (embeddings and isinstance(module, nn.Embedding)):
        return ("weight",)
    if name.lower().endswith("experts") or type(module).__name__.lower().endswith("experts"):
        return tuple(expert_weights(module))
    return ()


def _holders(model: nn.Module) -> dict[object, list[str]]:
    """Names of the parameters that share a tensor, by the tensor."""
    found: dict[object, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, held in module._parameters.items():
            if held is not None:
                found[_tensor_key(held)].append(f"{name}.{key}" if name else key)
    return found


def _tensor_key(held: Tensor) -> object:
    """The same for parameters that are one, or that lie at the same place in memory."""
    if held.is_meta or type(held) is not nn.Parameter or not held.numel():
        return id(held)
    return held.device, held.data_ptr()


def _fault(module: nn.Module, weights: tuple[str, ...], prefix: str, holders: dict[object, list[str]]) -> str | None:
    """Why a module cannot be quantised without changing what it means, or None."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "its weight is parametrised"
    for plain in (nn.Linear, nn.Embedding):
        if isinstance(module, plain) and kind is not plain:
            return f"{kind.__name__} is a subclass of nn.{plain.__name__} and may do more"
    for name in weights:
        held = module._parameters.get(name)
        if held is None:
            return f"{name} is computed by a hook, as pruning and weight_norm do"
        if type(held) is not nn.Parameter:
            return f"{name} is a {type(held).__name__}"
        if held.dtype not in FLOATS or not held.numel():
            return f"{name} is {held.dtype} {list(held.shape)}"
        shared = [each for each in holders[_tensor_key(held)] if each != f"{prefix}{name}"]
        if shared:
            return f"{name} is tied to {', '.join(shared)}"
    if module._compiled_call_impl is not None:
        return "it is compiled: quantise first"
    if any(vars(module)[each] for each in _STATE_HOOKS):
        return "it has hooks on its state dict"
    if isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module):
        if "forward" in vars(module):
            return "its forward has been replaced, as accelerate's hooks do"
        if module._buffers or module._modules or module._parameters.keys() - {"weight", "bias"}:
            return "it holds more than a weight and a bias"
    option = option_of_training(module) if isinstance(module, nn.Embedding) else None
    return f"it has {option}, which a frozen table cannot meet" if option else None
