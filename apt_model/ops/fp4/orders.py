"""The kernels' order of each weight that lives on: made at its first use, remembered beside it, never stored."""

from weakref import finalize

import torch
from torch import Tensor, nn

from apt_model.core.system.cuda import CudaDevice
from apt_model.ops.fp4.format import PackedWeight
from apt_model.ops.fp4.layout import Shuffled, shuffle

_orders: dict[int, tuple[tuple[object, ...], Shuffled]] = {}


def lives(weight: PackedWeight) -> bool:
    """Whether the weight stays between calls, so that another order is worth making: whether it is a parameter."""
    return isinstance(weight.packed, nn.Parameter)


def order_of(weight: PackedWeight, dtype: torch.dtype, *, gated: bool) -> Shuffled | None:
    """The kernels' order, made anew when a tensor of the weight was written to, moved or replaced.

    None for a weight that is made for every call (a view, an expert picked from a stack), and while a CUDA graph is
    recorded before the first use.
    """
    if not lives(weight):
        return None
    parts = [part.detach() for part in weight[:3] if part is not None]
    state = (dtype, int(gated), *weight.shape, *map(_count, parts), *(part.data_ptr() for part in parts))
    key = id(weight.packed)
    found = _orders.get(key)
    if found is not None and found[0] == state:
        return found[1]
    if weight.packed.is_cuda and CudaDevice.is_capturing():
        return None
    if found is None:
        finalize(weight.packed, _orders.pop, key, None)
    else:
        del _orders[key]  # before the new one is made
    divisor = parts[2] if len(parts) > 2 else None
    made = shuffle(PackedWeight(parts[0], parts[1], divisor, weight.in_features), dtype, gated=gated)
    _orders[key] = (state, made)
    return made


def forget(packed: Tensor) -> None:
    """Free the order of a weight that moves elsewhere; its next use makes it again."""
    _orders.pop(id(packed), None)


def _count(tensor: Tensor) -> int:
    """How often torch has seen the tensor written to; it does not count for tensors of inference mode."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch has no other name for it
