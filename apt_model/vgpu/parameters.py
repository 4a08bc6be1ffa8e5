"""Parameters whose values are not there at the moment: right in shape, type and device, and fetched when read.

Between a block's turns its parameters have this class in place of their own, so that whatever computes with them by
another way than the block's forward (tied weights, `parameters()`, a reference kept somewhere) gets their values, and
never what lies in their slot by then. What is written to them is written through to where they live.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from apt_model.core.errors import InputError

# What is known without the values. (Some names are not in every torch.)
_ATTRIBUTES = (
    "shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad", "grad", "is_leaf", "grad_fn",
    "is_cuda", "is_cpu", "is_xpu", "is_meta", "is_sparse", "is_quantized", "names", "_version", "retains_grad",
    "output_nr", "_backward_hooks",
)  # fmt: skip
_METHODS = (
    "size", "dim", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous",
    "is_floating_point", "is_complex", "get_device", "requires_grad_", "register_hook",
    "register_post_accumulate_grad_hook", "__len__", "__hash__", "is_inference",
)  # fmt: skip
_GRAD: Any = Tensor.grad
_METADATA: frozenset[Any] = frozenset((
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)),
    *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")),
    _GRAD.__delete__, torch.is_floating_point, torch.is_complex, torch.numel,
))  # fmt: skip

_GET_DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]

# What hands out the memory itself: that of where the parameter lives, which is its own.
_MEMORY: frozenset[Any] = frozenset(
    getattr(Tensor, name)
    for name in ("data_ptr", "untyped_storage", "storage", "_typed_storage")
    if hasattr(Tensor, name)
)
_KEEPING: frozenset[Any] = frozenset(
    getattr(Tensor, name) for name in ("numpy", "__array__", "__dlpack__", "share_memory_") if hasattr(Tensor, name)
)
# What autograd is told about parameters, and what needs no values of them.
_GRAPH: frozenset[Any] = frozenset((torch.autograd.grad, torch.autograd.backward))


class Read(Protocol):
    """How values are had."""

    def __call__(self, parameter: nn.Parameter, call: Callable[[Tensor], Any], *, copied: bool, host: bool) -> Any:
        """Call `call` with them; `copied`: they may be kept, `host`: where they live."""


class StreamedParameter(nn.Parameter):
    """A parameter whose values are elsewhere; `away` makes one, `back` ends it.

    It is made of a parameter by changing its class, as torch's own `UninitializedParameter` becomes a parameter, so
    that everybody who holds it holds the same object.
    """

    _read: Read
    _own_class: type

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` with the values in place of parameters that are away."""
        kwargs = kwargs or {}
        if func == _SET_DATA and isinstance(args[0], StreamedParameter):
            return _write(args[0], args[1])
        if func == _GET_DATA:  # a view that autograd does not know, and whose changes are seen
            func = Tensor.detach
        if func in _METADATA or func in _GRAPH:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
                return func(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        found = {id(leaf): leaf for leaf in leaves if isinstance(leaf, StreamedParameter)}
        # Several may be more than there are places; what is no tensor, such as an array, may keep the memory.
        copied = len(found) > 1 or func in _KEEPING
        return _with_values(func, leaves, spec, list(found.values()), copied=copied)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A parameter of its own, with the values."""
        if id(self) not in memo:
            memo[id(self)] = self._own_class(self.detach().clone(), self.requires_grad)
        copied: nn.Parameter = memo[id(self)]
        return copied


def _write(parameter: StreamedParameter, values: Tensor) -> None:
    """`parameter.data = values`, which has to leave the parameter's memory where it is."""
    if values.shape != parameter.shape or values.dtype != parameter.dtype:
        raise InputError(
            f"a parameter of {tuple(parameter.shape)} in {parameter.dtype} that a VGPUStack streams cannot become "
            f"{tuple(values.shape)} in {values.dtype}",
            remedy="detach the model from the stack before it is changed",
        )
    with torch.no_grad():
        parameter.copy_(values)


def _with_values(
    func: Any, leaves: list[Any], spec: Any, parameters: list[StreamedParameter], *, copied: bool
) -> Any:  # fmt: skip
    """Put the values of each of `parameters` in its place; then call."""
    if not parameters:
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return func(*args, **kwargs)
    parameter, *others = parameters

    def called(values: Tensor) -> Any:
        again = [values if each is parameter else each for each in leaves]
        result = _with_values(func, again, spec, others, copied=copied)
        return pytree.tree_map(lambda each: parameter if each is values else each, result)

    return parameter._read(parameter, called, copied=copied, host=func in _MEMORY)  # noqa: SLF001


def away(parameter: nn.Parameter, read: Read) -> None:
    """Let the parameter's values be had through `read` from here on."""
    held = vars(parameter)
    held["_read"], held["_own_class"] = read, type(parameter)
    parameter.__class__ = StreamedParameter


def back(parameter: nn.Parameter) -> None:
    """The parameter's values are where it says: it is what it was."""
    if type(parameter) is StreamedParameter:
        held = vars(parameter)
        parameter.__class__ = held["_own_class"]
        del held["_read"], held["_own_class"]
