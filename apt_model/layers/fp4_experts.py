"""Mixture-of-experts modules that hold the weights of all experts in 3-D parameters, with those weights in 4 bits."""

import functools
from typing import Any

import torch
from torch import nn

from apt_model.core.errors import InputError
from apt_model.core.fp4_names import EXPERT_WEIGHTS
from apt_model.core.options import require
from apt_model.layers.packed import PackedModule, check_dtype, pack
from apt_model.layers.packed_products import dequantize_in_slabs
from apt_model.ops.fp4 import ACTIVATION_DTYPES, get_format


class FP4Experts(PackedModule):
    """What `pack_experts` makes of a module of experts: its own class, with packed weights.

    Forward is the module's own. It finds a `PackedView` [E, ..., ...] where its 3-D parameter was: `weight[expert]`
    unpacks nothing, a product with one expert's weight is the fused one, bmm and grouped_mm go expert by expert. A
    forward that reads the whole stack in another way gets all of it dequantised for as long as it holds it.
    Each expert has a global scale of its own. With `activation_dtype` "fp8" the product of an expert with many rows of
    its own is in FP8; not while torch.compile traces, which gets the stack dequantised.
    """

    def extra_repr(self) -> str:
        """The format, and what is packed, for `print(model)`."""
        packed = ", ".join(f"{name}={list(slot.seen_shape)}" for name, slot in self.slots.items())
        fp8 = f"activation_dtype={self.activation_dtype!r}" if self.activation_dtype else ""
        return ", ".join(part for part in (super().extra_repr(), packed, f"format={self.format!r}", fp8) if part)


def expert_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D parameters of a module that holds experts' weights: those of the known names."""
    held = module._parameters  # noqa: SLF001 - a parametrised weight is not among them
    found = {name: held.get(name) for name in EXPERT_WEIGHTS}
    return {name: each for name, each in found.items() if each is not None and each.dim() == 3}


def pack_experts(
    module: nn.Module,
    *,
    format: str = "nvfp4",  # noqa: A002 - as in FusedFP4Linear
    activation_dtype: str | None = None,
) -> FP4Experts:
    """Quantise the 3-D weights of `module` in place, each expert on its own; returns the same module.

    The blocks run along each weight's input side. Which one it is, `module.is_transposed` says, or the shapes.
    `activation_dtype` is that of `FusedFP4Linear`, for each expert by the number of its own rows.

    Raises:
        InputError: there are no such weights, their types differ, or the input side cannot be told.
    """
    get_format(format)
    require(activation_dtype in ACTIVATION_DTYPES, "pack_experts.activation_dtype", "None or 'fp8'", activation_dtype)
    weights = expert_weights(module)
    if not weights or isinstance(module, PackedModule):
        raise InputError(f"pack_experts: {type(module).__name__} holds no 3-D parameter {' or '.join(EXPERT_WEIGHTS)}")
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) > 1:
        raise InputError(f"pack_experts: expected weights of one type, got {sorted(map(str, dtypes))}")
    dtype, swapped = check_dtype(dtypes.pop(), type(module).__name__), _inputs_come_first(module, weights)
    packed = {
        name: pack(weight.detach().mT if swapped else weight.detach(), format) for name, weight in weights.items()
    }
    for name in packed:
        delattr(module, name)
    module.__class__ = _packed_class(type(module), tuple(packed))  # type: ignore[arg-type]  # classes have hashes
    assert isinstance(module, FP4Experts)
    module.format, module.dtype, module.slots, module.orders = format, dtype, {}, {}
    module.activation_dtype = activation_dtype
    for name, weight in packed.items():
        module.add_packed(name, weight, swapped=swapped)
    return module


def unpack_experts(module: FP4Experts, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a module its own class and full-precision weights back, in place; returns the same module."""
    dtype, slots = dtype or module.dtype, module.slots
    whole = {}
    for name, slot in slots.items():
        values = dequantize_in_slabs(module.packed_weight(name), dtype)
        whole[name] = values.mT.contiguous() if slot.swapped else values
        for part in ("packed", "scale", "global_scale"):
            delattr(module, f"{name}_{part}")
    for name in ("format", "dtype", "slots", "orders", "activation_dtype"):
        delattr(module, name)
    plain: nn.Module = module
    plain.__class__ = type(module).__bases__[1]
    for name, values in whole.items():
        plain.register_parameter(name, nn.Parameter(values))
    return plain


@functools.cache
def _packed_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[FP4Experts]:
    """`cls` with views where the parameters `names` were."""
    body: dict[str, Any] = {name: property(functools.partial(_view, name=name)) for name in names}
    return type(f"FP4{cls.__name__}", (FP4Experts, cls), {**body, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _view(module: FP4Experts, name: str) -> torch.Tensor:
    return module.weight_view(name, reordered=True)


def _inputs_come_first(module: nn.Module, weights: dict[str, nn.Parameter]) -> bool:
    """Whether the weights are [E, in, out] instead of [E, out, in]."""
    told = getattr(module, "is_transposed", None)
    if isinstance(told, bool):
        return told
    if {"gate_up_proj", "down_proj"} <= weights.keys():
        (_, *gate_up), (_, *down) = weights["gate_up_proj"].shape, weights["down_proj"].shape
        for swapped in (False, True):
            (both, hidden), (out, inner) = (gate_up[::-1], down[::-1]) if swapped else (gate_up, down)
            if both == 2 * inner and hidden == out:
                return swapped
    shapes = ", ".join(f"{name} {list(weight.shape)}" for name, weight in weights.items())
    raise InputError(f"pack_experts: which side of {shapes} is the input cannot be told; set is_transposed")
