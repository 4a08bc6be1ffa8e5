"""What modules with weights in 4 bits share: how the packed tensors are kept, moved, loaded and read.

A weight called `w` is kept as the parameters `w_packed`, `w_scale` and, in nvfp4, `w_global_scale` (`ops/fp4`). On a
GPU its first product brings the first two into the kernels' order, in which they stay: the same bytes, moved. Reading
them as attributes, moving the module and setting them bring the order of files back, and a state dict always has that.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from apt_model.core.errors import InputError
from apt_model.core.fp4_storage import packed_parts, row_bytes
from apt_model.core.options import require
from apt_model.core.placement import is_placed
from apt_model.core.system.cuda import CudaDevice
from apt_model.layers.packed_products import dequantize_in_slabs
from apt_model.layers.packed_view import PackedView
from apt_model.ops import fp4
from apt_model.ops.fp4 import FORMATS, Operand, PackedWeight, Shuffled
from apt_model.ops.fp4.format import row_blocks

# What a packed weight can stand for.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PARTS = ("packed", "scale", "global_scale")
# Held while parameters change their order: two dictionaries change, which a second thread must not see between.
_MOVING = threading.RLock()


class Slot(NamedTuple):
    """A weight that a module keeps packed."""

    shape: tuple[int, ...]  # [..., N, K]
    swapped: bool  # its readers, and files in full precision, have [..., K, N]

    @property
    def seen_shape(self) -> tuple[int, ...]:
        """The shape that readers see."""
        *lead, rows, width = self.shape
        return (*lead, width, rows) if self.swapped else self.shape


def pack(weight: Tensor, form: str) -> PackedWeight:
    """[..., N, K] -> its packed form, on the weight's device; a weight on meta gives tensors on meta."""
    return empty(weight.shape, form, weight.device) if weight.is_meta else fp4.quantize(weight, form)


def empty(shape: tuple[int, ...], form: str, device: torch.device | str | None = None) -> PackedWeight:
    """Unfilled tensors for a weight [..., N, K]."""
    of, (*lead, rows, width) = FORMATS[form], shape
    packed = torch.empty(*lead, rows, row_bytes(width), dtype=torch.uint8, device=device)
    scale = torch.empty(*lead, rows, row_blocks(width, of), dtype=of.scale_dtype, device=device)
    divisor = torch.empty(*lead, 1, dtype=torch.float32, device=device) if of.has_global_scale else None
    return PackedWeight(packed, scale, divisor, width)


def tensors(weight: PackedWeight) -> dict[str, Tensor]:
    """The tensors that there are, by the last part of their names."""
    return {part: held for part, held in zip(PARTS, weight, strict=False) if isinstance(held, Tensor)}


class PackedModule(nn.Module):
    """A module some of whose weights are packed parameters: frozen, and never cast.

    They are plain tensors, rows first, so that FSDP2, safetensors, deepcopy and `share_memory` take them as they are.
    `dtype` is what the weights stand for; `.to(dtype)`, `.half()` and the like change it, and leave the packed tensors'
    types alone. Loading a state dict with a full-precision weight quantises it; one with packed tensors takes them as
    they are, all or none. `requires_grad_(True)` on a whole model is an error of torch's: bytes take no gradient.
    """

    format: str
    dtype: torch.dtype
    slots: dict[str, Slot]
    activation_dtype: str | None = None  # "fp8": products of many rows are in FP8
    is_sharded = False  # by FSDP
    fixed: frozenset[str] = frozenset()  # weights whose bytes the kernels' order cannot hold
    orders: dict[str, Shuffled]  # of the weights whose parameters are in the kernels' order

    def add_packed(self, name: str, weight: PackedWeight, *, swapped: bool = False) -> None:
        """Keep `weight` as the parameters of `name`."""
        self.slots[name] = Slot(tuple(weight.shape), swapped)
        held = tensors(weight)
        for part in PARTS:
            made = nn.Parameter(held[part], requires_grad=False) if part in held else None
            self.register_parameter(f"{name}_{part}", made)

    def packed_weight(self, name: str) -> PackedWeight:
        """The tensors of `name` as files have them, in their own types; copies while they are in the kernels' order.

        FSDP2 with `MixedPrecisionPolicy(param_dtype)` casts every float parameter while a module runs: scales are
        cast back, which is exact; a global scale that is no power of two has then been rounded to bf16.
        """
        order = self._order(name)
        if order is not None:
            return fp4.unshuffle(order)
        held: Mapping[str, Tensor | None] = self._parameters
        packed, scale, divisor = held[f"{name}_packed"], held[f"{name}_scale"], held[f"{name}_global_scale"]
        assert packed is not None
        assert scale is not None
        if torch.int32 in (packed.dtype, scale.dtype):
            return self._packed_meanwhile(name)
        form = FORMATS[self.format]
        if divisor is not None and divisor.dtype == torch.float16:
            raise InputError(
                f"{name}_global_scale: expected float32, got float16, in which it may not fit",
                remedy="take bfloat16 for FSDP's param_dtype",
            )
        if scale.dtype != form.scale_dtype or (divisor is not None and divisor.dtype != torch.float32):
            scale, divisor = scale.to(form.scale_dtype), None if divisor is None else divisor.to(torch.float32)
        return PackedWeight(packed, scale, divisor, self.slots[name].shape[-1])

    def _packed_meanwhile(self, name: str) -> PackedWeight:
        """`packed_weight` where another thread has been moving the parameters."""
        with _MOVING:
            words = self._parameters[f"{name}_packed"]
            if self._order(name) is None and words is not None and words.dtype == torch.int32:
                raise InputError(
                    f"{name}_packed: expected codes as files have them, got int32 in an order of which the layer has "
                    "no record",
                    remedy="assign state dicts and the parameters of files to a layer, not another layer's parameters",
                )
            return self.packed_weight(name)

    def operand(self, name: str, dtype: torch.dtype, *, gated: bool = False) -> Operand:
        """`name` as a product with inputs in `dtype` takes it: in the kernels' order where there are kernels."""
        traced = torch.compiler.is_compiling()
        if traced:  # before anything is read: what torch.compile has seen stays as it is
            self._reorder_traced(name, dtype, gated)
        order = self._order(name)
        if not traced and (order is None or order.dtype != dtype or order.gated != gated):
            self._reorder(name, dtype, gated)
            order = self._order(name)
        return order or self.packed_weight(name)

    def order_for(self, device: torch.device) -> None:
        """Bring the weights that products on `device` take in an order of their own into it, and leave them here.

        For whoever keeps the bytes elsewhere and puts them on `device` for a product (`core/placement.py`).
        """

    def _order_for(self, name: str, device: torch.device, *, gated: bool) -> None:
        """`order_for` of one weight."""
        if not fp4.wants_order(FORMATS[self.format], device, self.dtype) or name in self.fixed:
            return
        with _MOVING, torch.inference_mode(mode=False):
            weight = self.packed_weight(name)
            moved = _parts(
                weight, lambda part: torch.zeros_like(part, device=device) if part.is_meta else part.to(device)
            )
            order = fp4.shuffle_if_reversible(moved, self.dtype, gated=gated)
            self._settle_order(name, order and _words_on(order, weight.device))

    def ordered(self, read: Callable[[str], Tensor], device: torch.device) -> dict[str, Tensor]:
        """Values for all parameters, in the order that they have now, from those that `read` gives in files' order.

        For whoever made the module, brought it into the order of `device` (`order_for`), and has its values only now.
        """
        values = {name: read(name) for name, held in self._parameters.items() if held is not None}
        for name, order in list(self.orders.items()):
            parts = {part: values[f"{name}_{part}"] for part in PARTS if f"{name}_{part}" in values}
            weight = PackedWeight(
                parts["packed"], parts["scale"], parts.get("global_scale"), self.slots[name].shape[-1]
            )  # fmt: skip
            moved = _parts(weight, lambda part: part.to(device))
            made = fp4.shuffle_if_reversible(moved, order.dtype, gated=order.gated)
            if made is None:
                raise InputError(
                    f"{name}_packed: these bytes cannot be brought into the kernels' order and back",
                    remedy="load the model's weights as usual, and attach it then",
                )
            values[f"{name}_packed"], values[f"{name}_scale"] = made.words, made.scales
            # With what else is known of the values.
            self.orders[name] = made._replace(words=order.words, scales=order.scales, global_scale=order.global_scale)
        return values

    def in_files(self, parameter: str) -> tuple[str, tuple[int, ...]] | None:
        """Type, by safetensors' names, and shape of a packed parameter as files have it, whatever its order is now."""
        for name, slot in self.slots.items():
            if parameter.startswith(f"{name}_"):
                return packed_parts(slot.shape, self.format).get(parameter.removeprefix(name))
        return None

    def leave_order(self) -> None:
        """Bring all weights back into the order of files."""
        for name in list(self.orders):
            self.restore(name)

    def restore(self, name: str) -> None:
        """Bring the parameters of `name` back from the kernels' order to that of files."""
        with _MOVING, torch.inference_mode(mode=False):
            if self._order(name) is not None:
                weight = self.packed_weight(name)
                del self.orders[name]
                self._replace(name, weight.packed, weight.scale)

    def _order(self, name: str) -> Shuffled | None:
        """The order that the parameters of `name` are in, unless it is that of files."""
        order, held = self.orders.get(name), self._parameters
        if order is None or (order.words is held[f"{name}_packed"] and order.scales is held[f"{name}_scale"]):
            return order
        with _MOVING:
            return self._order_of_others(name)

    def _order_of_others(self, name: str) -> Shuffled | None:
        """`_order` where someone put other parameters in place: in the same order, or in that of files."""
        order, held = self.orders.get(name), cast("Mapping[str, Any]", self._parameters)
        words = held[f"{name}_packed"]
        if order is not None and words is not None and words.dtype == torch.int32:
            return order._replace(
                words=words, scales=held[f"{name}_scale"], global_scale=held[f"{name}_global_scale"]
            )  # fmt: skip
        self.orders.pop(name, None)
        return None

    def _reorder_traced(self, name: str, dtype: torch.dtype, gated: bool) -> None:
        """`_reorder` for torch.compile, which calls this and does not look into it; once in order, no more."""
        if self._order(name) is None:
            self._reorder(name, dtype, gated)

    # What torch.compiler.assume_constant_result does, which would import all of dynamo here.
    _reorder_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001

    def _reorder(self, name: str, dtype: torch.dtype, gated: bool) -> None:
        """Bring `name` into the order of products with inputs in `dtype`, if there is one and it can stay there."""
        if not self._may_reorder(name, dtype):
            return
        with _MOVING, torch.inference_mode(mode=False):  # what stays has to serve a later backward too
            found = self._order(name)
            if found is not None and found.dtype == dtype and found.gated == gated:
                return
            order = fp4.shuffle_if_reversible(self.packed_weight(name), dtype, gated=gated)
            self._settle_order(name, order)

    def _settle_order(self, name: str, order: Shuffled | None) -> None:
        """Let the parameters of `name` be those of `order`; None: they cannot be."""
        if order is None:
            self.fixed = self.fixed | {name}
            return
        self.orders.pop(name, None)  # first: who reads now waits
        self._replace(name, order.words, order.scales)
        held: Mapping[str, Any] = self._parameters
        self.orders[name] = order._replace(
            words=held[f"{name}_packed"], scales=held[f"{name}_scale"], global_scale=held[f"{name}_global_scale"]
        )

    def _may_reorder(self, name: str, dtype: torch.dtype) -> bool:
        packed: Any = self._parameters[f"{name}_packed"]
        if not fp4.wants_order(FORMATS[self.format], packed.device, dtype):
            return False
        if packed.is_cuda and CudaDevice.is_capturing():
            return False
        if name in self.fixed or self.is_sharded or type(packed) is not nn.Parameter or is_placed(packed):
            return False
        hook = getattr(self, "_hf_hook", None)  # accelerate's: may put the files' order in place for each call
        return not any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,)))

    def _replace(self, name: str, packed: Tensor, scale: Tensor) -> None:
        made = {}
        for part, tensor in (("packed", packed), ("scale", scale)):
            key = f"{name}_{part}"
            made[key] = nn.Parameter(tensor, requires_grad=False)
            made[key].__dict__.update(vars(self._parameters[key]))  # marks of others
        self._parameters.update(made)  # both at once

    def weight_view(self, name: str, *, reordered: bool = False) -> Tensor:
        """`name` as its readers know it: a read-only view; a plain tensor while torch.compile traces.

        With `reordered` products with the view are the fused ones: the weight is brought into their order first.
        """
        slot = self.slots[name]
        weight = self.operand(name, self.dtype) if reordered else self._order(name) or self.packed_weight(name)
        if not torch.compiler.is_compiling():
            return PackedView(weight, self.dtype, swapped=slot.swapped, activation_dtype=self.activation_dtype)
        values = dequantize_in_slabs(weight, self.dtype)
        return values.mT if slot.swapped else values

    def __getattr__(self, name: str) -> Any:
        for slot in self.__dict__.get("orders", ()):
            if name in (f"{slot}_packed", f"{slot}_scale"):
                self.restore(slot)
                break
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        slots: Mapping[str, Slot] = self.__dict__.get("slots", {})
        if name in slots:
            raise InputError(
                f"{type(self).__name__}.{name} is packed in {self.format} and cannot be assigned",
                remedy="load_state_dict quantises a full-precision weight",
            )
        if isinstance(value, nn.Parameter):
            for slot in slots:
                if any(name == f"{slot}_{part}" for part in PARTS):
                    value.requires_grad_(False)  # loaders make every float tensor trainable
                    self._set_part(slot, value)
        super().__setattr__(name, value)

    def _set_part(self, slot: str, value: nn.Parameter) -> None:
        """What has to be so before a part of `slot` becomes `value`."""
        sharded = hasattr(value, "device_mesh")
        if sharded and self._order(slot) is not None:
            raise InputError(
                f"{type(self).__name__}: its weight is in the kernels' order and cannot be sharded",
                remedy=f"build the model anew, as torch counts this one as sharded; call fully_shard before its first "
                f"product, or read layer.{slot}_packed of each such layer before: that brings the order of files back",
            )
        if value.dtype != torch.int32:
            self.restore(slot)
        self.fixed = self.fixed - {slot}
        self.is_sharded = self.is_sharded or sharded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedModule":
        """Move as torch does, but keep the packed tensors' types."""
        for slot in list(self.orders):
            device = self.orders[slot].device
            if fn(torch.empty(0, dtype=torch.uint8, device=device)).device != device:
                self.restore(slot)
        kept = {id(self._parameters[f"{slot}_{part}"]) for slot in self.slots for part in PARTS}
        still = {id(self._parameters[f"{slot}_{part}"]) for slot in self.orders for part in PARTS}

        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) in still:
                return tensor
            moved = fn(tensor)
            return moved if id(tensor) not in kept or moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype  # not the default device: it may be meta
        self.dtype = dtype if dtype in FLOATS else self.dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As torch does, with weights in the kernels' order copied back to that of files."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for slot in list(self.orders):
            for part, tensor in tensors(self.packed_weight(slot)).items():
                destination[f"{prefix}{slot}_{part}"] = tensor.detach()

    def _load_from_state_dict(  # noqa: PLR0917 - torch's signature
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Quantise what came in full precision and check what came packed; with a fault nothing is loaded."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        for name in list(self.orders):
            self.restore(name)
        self.fixed = frozenset()
        whole = {name: state_dict[prefix + name] for name in self.slots if prefix + name in state_dict}
        faults = [fault for name in self.slots if (fault := self._take(name, state_dict, prefix + name))]
        if faults:
            error_msgs.extend(faults)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for tensor in whole.values() if assign else ():
            self.dtype = tensor.dtype

    def _take(self, name: str, state: dict[str, Any], key: str) -> str | None:
        """Make `state` hold what this module stores; what is wrong with it, or None."""
        foreign = [each for each in state if each.startswith(f"{key}.")]
        if foreign:
            return (
                f"{foreign[0]}: another quantiser's storage, whose codes are not these (bitsandbytes' FP4 and NF4 have "
                "other values, and the high half of a byte first): dequantize it there and load what comes out."
            )
        given = {part: state[f"{key}_{part}"] for part in PARTS if f"{key}_{part}" in state}
        if key not in state:
            return self._fault_of_parts(name, key, given) if given else None
        if given:
            there = ", ".join(f"{key}_{part}" for part in given)
            return f"{key} came in full precision and packed too ({there}): give one of the two."
        return self._quantize_into(name, state, key)

    def _fault_of_parts(self, name: str, key: str, given: dict[str, Any]) -> str | None:
        expected = tensors(empty(self.slots[name].shape, self.format, "meta"))
        missing = [f"{key}_{part}" for part in expected if part not in given]
        if missing:
            return f"{', '.join(missing)} missing beside {key}_{next(iter(given))}: {self.format} needs it."
        if len(given) > len(expected):
            return f"{key}_global_scale: {self.format} has none; this weight is in another format."
        for part, like in expected.items():
            if describe(given[part]) != describe(like):
                return f"{key}_{part}: expected {describe(like)} in {self.format}, got {describe(given[part])}."
        return None

    def _quantize_into(self, name: str, state: dict[str, Any], key: str) -> str | None:
        slot, weight, held = self.slots[name], state.pop(key), self._parameters[f"{name}_packed"]
        assert held is not None
        if not isinstance(weight, Tensor) or weight.dtype not in FLOATS or weight.shape != slot.seen_shape:
            expected = f"a float16, bfloat16, float32 or float64 {list(slot.seen_shape)}"
            return f"{key}: expected {expected}, or packed tensors, got {describe(weight)}."
        weight = weight if held.is_meta or weight.is_meta else weight.to(held.device)
        try:
            made = pack(weight.detach().mT if slot.swapped else weight.detach(), self.format)
        except InputError as error:
            return f"{key}: {error.message}."
        state.update({f"{key}_{part}": tensor for part, tensor in tensors(made).items()})
        return None


def _parts(weight: PackedWeight, change: Callable[[Tensor], Tensor]) -> PackedWeight:
    """`weight` with its tensors changed."""
    return PackedWeight(*(change(part) if isinstance(part, Tensor) else part for part in weight))  # type: ignore[arg-type]


def _words_on(order: Shuffled, device: torch.device) -> Shuffled:
    """`order` with what parameters hold of it on `device`."""
    return order._replace(words=order.words.to(device), scales=order.scales.to(device))


def describe(value: object) -> str:
    """Type and shape of a tensor, as errors name them."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_dtype(dtype: torch.dtype, where: str) -> torch.dtype:
    """Return `dtype` if a packed weight can stand for it; else raise `ConfigError`."""
    require(dtype in FLOATS, f"{where}.dtype", "float16, bfloat16, float32 or float64", dtype)
    return dtype
