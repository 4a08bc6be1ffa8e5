"""A packed weight as the tensor it stands for: read-only, its numbers made when something computes with them."""

# ruff: noqa: SLF001 - torch's way to write a tensor subclass has leading underscores

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from typing_extensions import Self

from apt_model.core.errors import InputError
from apt_model.layers.packed_products import batched, dequantize_in_slabs, fused_linear, grouped
from apt_model.ops.fp4 import Operand

_aten = torch.ops.aten
# What reads memory behind torch's dispatcher, or copies objects.
_NEEDS_NUMBERS = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__deepcopy__})
# What hands out an address, to kernels that take a tensor for memory.
_NEEDS_MEMORY = frozenset({Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.__dlpack__})
_SETS_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_SETS_GRADIENT = frozenset({Tensor.requires_grad.__set__, Tensor.requires_grad_})  # type: ignore[attr-defined]
_PRODUCTS = frozenset({torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm})


class PackedView(Tensor):
    """What `layer.weight` of a packed layer is: shape, type and device of the weight, and its values on demand.

    A product with it as the weight (`F.linear` or `x @ weight.mT`; for a stack of experts bmm and grouped_mm) is the
    fused one, so that no gradient keeps a dequantised weight alive. Indexing a stack by expert unpacks nothing. Every
    other operation gets the dequantised tensor. Writing raises `InputError`, since it would be lost. Marks that others
    have set on the packed parameter (Hugging Face's `_is_hf_initialized`) are found here too.
    """

    source: Operand
    swapped: bool  # [..., K, N] instead of [..., N, K]
    activation_dtype: str | None  # of products with it, as `ops.fp4.linear` takes it

    def __new__(
        cls, weight: Operand, dtype: torch.dtype, *, swapped: bool = False, activation_dtype: str | None = None
    ) -> Self:
        """A view in `dtype`, [..., N, K], or [..., K, N] where `swapped`."""
        *lead, rows, width = weight.shape
        shape = (*lead, width, rows) if swapped else (*lead, rows, width)
        made: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=weight.device)
        made.source, made.swapped, made.activation_dtype = weight, swapped, activation_dtype
        return made

    def __getattr__(self, name: str) -> Any:
        if name in ("source", "swapped", "activation_dtype", "_is_param") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.source[0], name)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"PackedView({list(self.shape)}, {self.dtype}, {self.source.format.name}, device={self.device})"

    def dense(self) -> Tensor:
        """The dequantised tensor."""
        values = dequantize_in_slabs(self.source, self.dtype)
        return values.mT if self.swapped else values

    def view_of(self, weight: Operand, *, swap: bool = False) -> "PackedView":
        """A view like this one, of another weight or with its last two dimensions swapped."""
        return PackedView(weight, self.dtype, swapped=self.swapped ^ swap, activation_dtype=self.activation_dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls from Python: products and indices of a weight take the short way, writes of attributes are refused."""
        kwargs = kwargs or {}
        if func == _SETS_DATA or (func in _SETS_GRADIENT and args[1:] != (False,)):
            raise _error(args[0], *_READ_ONLY)
        if func in _NEEDS_MEMORY:
            raise _error(args[0], "has no memory of its own", "pass layer.dequantize(), or weight.clone()")
        if func in _NEEDS_NUMBERS:
            return func(args[0].dense(), *args[1:], **kwargs)
        short = _short_way(func, args, kwargs)
        if short is not None:
            return short
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks what torch passes
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Operations: writes are refused, a transposed view stays one, everything else gets numbers."""
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, cls):
                raise _error(value, *_READ_ONLY)
        view = args[0] if args else None
        if isinstance(view, cls):
            if func in (_aten.detach.default, _aten.alias.default):
                return view.view_of(view.source)
            if _swaps_last_two(func, args):
                return view.view_of(view.source, swap=True)
        args, kwargs = tree_map_only(cls, lambda each: each.dense(), (args, kwargs))
        return func(*args, **kwargs)


_READ_ONLY = (
    "takes no gradient and cannot be written in place",
    "change a copy (layer.dequantize()) and load that: load_state_dict quantises a full-precision weight",
)


def _error(view: PackedView, fault: str, remedy: str) -> InputError:
    form = view.source.format.name
    return InputError(f"the weight {list(view.shape)} is packed in {form}: it {fault}", remedy=remedy)


def _swaps_last_two(func: Any, args: Sequence[Any]) -> bool:
    rank = args[0].dim()
    if func is _aten.transpose.int:
        return {axis % rank for axis in args[1:]} == {rank - 2, rank - 1}
    return rank == 2 and (func is _aten.t.default or (func is _aten.permute.default and list(args[1]) == [1, 0]))


def _short_way(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """The result where `func` multiplies with a packed weight or indexes a stack, else None."""
    if func is F.linear and _multiplies(args, rank=2, swapped=False):
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return fused_linear(args[0], args[1].source, bias, activation_dtype=args[1].activation_dtype)
    if func in _PRODUCTS and not kwargs and _multiplies(args, rank=2, swapped=True):
        return fused_linear(args[0], args[1].source, activation_dtype=args[1].activation_dtype)
    if func in _PRODUCTS and not kwargs and _multiplies(args, rank=3, swapped=True) and args[0].dim() == 3:
        return batched(args[0], args[1].source, args[1].activation_dtype)
    if func is torch._grouped_mm and _multiplies(args, rank=3, swapped=True) and kwargs.get("offs") is not None:
        out = grouped(args[0], args[1].source, kwargs["offs"], args[1].activation_dtype)
        out = out if kwargs.get("bias") is None else out + kwargs["bias"]
        return out.to(kwargs.get("out_dtype") or out.dtype)
    if func == Tensor.__getitem__ and args[0].dim() > 2 and _is_index(args[1]):
        return args[0].view_of(args[0].source.picked(args[1]))
    return None


def _multiplies(args: Sequence[Any], *, rank: int, swapped: bool) -> bool:
    """Whether the second operand is a packed weight, and the first one plain."""
    weight = args[1] if len(args) > 1 else None
    return (
        isinstance(weight, PackedView)
        and not isinstance(args[0], PackedView)
        and weight.dim() == rank
        and weight.swapped is swapped
    )


def _is_index(index: object) -> bool:
    if isinstance(index, Tensor):
        return index.dtype in (torch.int32, torch.int64) and index.dim() < 2
    return isinstance(index, int) and not isinstance(index, bool)
