"""Put the linear layers of a model, and its embeddings, into 4 bits, in place and one at a time, and back again."""

import logging
from collections import defaultdict, deque
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from apt_model.core.errors import InputError
from apt_model.layers.fp4_embedding import FusedFP4Embedding
from apt_model.layers.fp4_experts import FP4Experts, pack_experts, unpack_experts
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.layers.packed import PackedModule, check_dtype
from apt_model.optimization.convert_plan import HOOKS, is_conv1d, make_plan, nbytes, other_matrices
from apt_model.optimization.fp4_config import FP4Config, QuantizeReport, Skipped

Model = TypeVar("Model", bound=nn.Module)
LOG = logging.getLogger(__name__)
# What a packed layer has and a plain one does not.
_OF_PACKED = ("format", "dtype", "slots", "orders", "activation", "activation_dtype")


def quantize(
    model: Model, config: FP4Config | None = None, *, report: Callable[[QuantizeReport], object] | None = None,
    device: torch.device | str | None = None,
) -> Model:  # fmt: skip
    """Put the weights of a model's linear layers into 4 bits, in place; returns the model.

    `nn.Linear` and Hugging Face's `Conv1D` become `FusedFP4Linear`; a module with 3-D weights of experts gets packed
    ones (`FP4Experts`). With `embeddings` in the config `nn.Embedding` becomes `FusedFP4Embedding`. Quantised weights
    are frozen. Biases stay the parameters they were; forward and backward hooks, the training flag and layers that
    stand in several places are preserved. Tied weights, subclasses of `nn.Linear`, parametrised weights and the like
    stay as they are, each with its reason in the report. A model that is itself one linear layer is returned as a new
    layer.

    Args:
        model: on any device; each layer is quantised where it is, on meta to tensors on meta.
        config: the format and what to skip; None for `FP4Config()`.
        report: called with the `QuantizeReport` (`report=print` shows it); None writes it to the log, as a warning
            where a layer could not be quantised.
        device: where each layer is brought to be quantised, and back from: an accelerator has room for one layer where
            it has none for the model.

    Raises:
        ConfigError: a pattern of `config.skip` covers no module; nothing was changed.
        InputError: the model has no linear layer that can be quantised; nothing was changed.
    """
    config = config or FP4Config()
    before, plan = _bytes(model), deque(make_plan(model, config))
    others = other_matrices(model, plan)
    asked = [each.skipped() for each in plan if each.asked]
    skipped = [each.skipped() for each in plan if each.fault and not each.asked]
    if len(plan) == len(asked) + len(skipped) and not any(isinstance(each, PackedModule) for each in model.modules()):
        left = "".join(f"; {each}" for each in [*asked, *skipped][:3])
        raise InputError(f"quantize: {type(model).__name__} has no linear layer that can be quantised{left}")
    places, quantized, frozen = places_of(model), [], 0
    while plan:  # each is dropped before the next is quantised: never a second full copy
        each = plan.popleft()
        if each.asked or each.fault:
            continue
        trainable = sum(each.module.get_parameter(name).requires_grad for name in each.weights)
        try:
            model = put(model, places[id(each.module)], _packed_on(device, each.module, config))
        except InputError as error:
            skipped.append(Skipped(each.name, error.message, each.skipped().size))
            continue
        quantized.append(each.name)
        frozen += trainable
    made = QuantizeReport(
        format=config.format,
        quantized=tuple(quantized),
        asked=tuple(asked),
        skipped=tuple(skipped),
        others=others,
        frozen=frozen,
        bytes_before=before,
        bytes_after=_bytes(model),
        activation_dtype=config.activation_dtype,
    )
    (report or _log)(made)
    return model


def dequantize(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Turn every packed layer of a model back into a plain one, in place and one at a time; returns the model.

    `FusedFP4Linear` becomes `nn.Linear` (also where it was a `Conv1D`), `FusedFP4Embedding` becomes `nn.Embedding`,
    experts get their own class back. The weights are the quantised values, trainable as in any new layer.

    Args:
        model: what `quantize` returned, or any model with such layers.
        dtype: type of weights and biases; None is each layer's own.

    Raises:
        ConfigError: a weight cannot have this type.
        InputError: nothing is packed, or a layer has an activation in it; nothing was changed.
    """
    if dtype is not None:
        check_dtype(dtype, "dequantize")
    packed = [(name, each) for name, each in model.named_modules() if isinstance(each, PackedModule)]
    if not packed:
        raise InputError(f"dequantize: {type(model).__name__} has no packed layer")
    for name, module in packed:
        if getattr(module, "activation", None) is not None:
            raise InputError(
                f"dequantize: {name or 'the model'} has its activation {module.activation!r} in it, which nn.Linear "
                "has not",
                remedy="replace that layer yourself: nn.Linear with layer.dequantize(), then the activation",
            )
    places = places_of(model)
    waiting = deque(module for _, module in packed)
    packed.clear()
    while waiting:
        module = waiting.popleft()
        model = put(model, places[id(module)], _plain(module, dtype))
    return model


def packed_of(module: nn.Module, config: FP4Config) -> nn.Module:
    """The packed layer of a plain one, with its hooks and flags; experts become it themselves."""
    form, activation_dtype = config.format, config.activation_dtype
    if isinstance(module, nn.Embedding):
        return _carry(module, FusedFP4Embedding.from_embedding(module, format=form))
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return pack_experts(module, format=form, activation_dtype=activation_dtype)
    weight, bias = module.get_parameter("weight"), module.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    rows_first = weight if isinstance(module, nn.Linear) else weight.mT
    layer = FusedFP4Linear.from_weight(rows_first, bias, format=form, activation_dtype=activation_dtype)
    return _carry(module, layer)


def _packed_on(device: torch.device | str | None, module: nn.Module, config: FP4Config) -> nn.Module:
    """As `packed_of`, computed on `device`."""
    if device is None:
        return packed_of(module, config)
    home = next(module.parameters()).device
    try:
        return packed_of(module.to(device), config).to(home)
    except BaseException:
        module.to(home)
        raise


def _plain(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    if isinstance(module, FP4Experts):
        return unpack_experts(module, dtype)
    if isinstance(module, FusedFP4Embedding):
        return _carry(module, module.to_embedding(dtype))
    assert isinstance(module, FusedFP4Linear)
    weight, bias = module.dequantize(), module.bias
    weight = weight if dtype is None else weight.to(dtype)
    layer = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None and bias.dtype != weight.dtype:
        bias.data = bias.data.to(weight.dtype)  # still the same parameter
    layer.register_parameter("bias", bias)
    return _carry(module, layer)


def _carry(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give `new` the flag and the hooks of `old`, in the dictionaries that handles refer to, and what others put on."""
    theirs, mine = vars(old), vars(new)
    for name in theirs:
        if name in HOOKS or (name not in mine and name not in _OF_PACKED):
            mine[name] = theirs[name]
    return new.train(old.training)


def places_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module stands: its parents, and its name in each."""
    found: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():  # noqa: SLF001 - named_children leaves second names out
            found[id(child)].append((parent, name))
    return found


def put(model: Model, places: list[tuple[nn.Module, str]], new: nn.Module) -> Model:
    """Put `new` where the old module stood; returns the model, which is `new` where it stood nowhere."""
    for parent, name in places:
        setattr(parent, name, new)
    return model if places or new is model else new  # type: ignore[return-value]


def _bytes(model: nn.Module) -> int:
    return sum(nbytes(held) for held in [*model.parameters(), *model.buffers()])


def _log(report: QuantizeReport) -> None:
    LOG.log(logging.WARNING if report.skipped else logging.INFO, "%s", report)
