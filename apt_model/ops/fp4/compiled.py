"""Triton kernels that are launched without Triton's look-up and its launcher, which take longer than the launch."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

from torch import Tensor

from apt_model.core.system import cuda

if TYPE_CHECKING:
    from apt_model.ops.fp4.direct import Direct

LOG = logging.getLogger(__name__)
# Shape and strides of a tensor, as a kernel's descriptor has them.
View = tuple[tuple[int, ...], tuple[int, ...]]
# What a descriptor brings to shared memory at once, and its layout there.
Box = tuple[list[int], Any]


class Compiled:
    """A kernel with all that is decided before it is compiled; its callers keep one for each way to specialise it.

    As many of the kernel's tensors as it is given views for, its first, go to it as descriptors with these `boxes`.
    """

    def __init__(
        self, function: Any, constants: dict[str, Any], *, boxes: tuple[Box, ...] = (), **options: Any
    ) -> None:
        self.function, self.constants, self.options = function, constants, options
        self.values = tuple(constants.values())  # in the order of the kernel's parameters, after all others
        self.boxes = boxes
        self.checked: dict[int, dict[str, Any]] = {}
        self.kernel: Any = None
        self.fault: str | None = None  # why its launches are not direct
        self.by_triton = 0  # launches that were not, the first among them

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launch on the current device and stream, by way of Triton."""
        self.by_triton += 1
        if self.kernel is not None:
            self.kernel[grid](*arguments, *self.values)
            return
        # Triton compiles it, or finds it on disk; its interpreter gives None
        kernel = self.function[grid](*arguments, **self.constants, **self.options)
        if kernel is not None:
            from apt_model.ops.fp4 import direct  # noqa: PLC0415 - Triton is not everywhere

            self.fault = direct.fault(kernel)
            if self.fault is not None:
                LOG.info("%s is launched by Triton: %s", kernel.metadata.name, self.fault)
        self.kernel = kernel

    def described(self, i: int, tensor: Tensor, view: View) -> Any:
        """The i-th tensor as a descriptor; checked by Triton the first time, and made without asking again."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: PLC0415 - Triton is not everywhere

        shape, strides = view
        if i not in self.checked:
            made = TensorDescriptor(tensor, list(shape), list(strides), *self.boxes[i])
            self.checked[i] = {**vars(made), "base": None}
            return made
        made = TensorDescriptor.__new__(TensorDescriptor)
        made.__dict__.update(self.checked[i], base=tensor, shape=shape, strides=strides)
        return made


@final
class Launch:
    """A kernel with its grid, its numbers and the `views` of its first tensors; called with its tensors, first of all.

    The kernel's first launch is Triton's, which compiles it; those after it are direct where that can be.
    """

    __slots__ = ("direct", "grid", "index", "kernel", "numbers", "views")

    def __init__(
        self, kernel: Compiled, index: int, grid: tuple[int, int, int], numbers: tuple[int, ...],
        views: tuple[View, ...] = (),
    ) -> None:  # fmt: skip
        self.kernel, self.index, self.grid, self.numbers, self.views = kernel, index, grid, numbers, views
        self.direct: Direct | None = None

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Launch on the tensors' device, on its current stream."""
        if self.direct is None or not self.direct(tensors):
            self._otherwise(tensors)

    def _otherwise(self, tensors: tuple[Tensor | None, ...]) -> None:
        if self.index >= 0 and self.index != cuda.current_index():
            with cuda.device_index(self.index):
                self(tensors)
            return
        kernel = self.kernel
        if self.direct is None and kernel.kernel is not None and kernel.fault is None:
            from apt_model.ops.fp4.direct import Direct  # noqa: PLC0415 - Triton is not everywhere

            self.direct = Direct(kernel.kernel, self.index, tensors, self.grid, self.numbers, self.views)
            if self.direct(tensors):
                return
        pairs = zip(tensors, self.views, strict=False)
        described = [kernel.described(i, tensor, view) for i, (tensor, view) in enumerate(pairs) if tensor is not None]
        kernel(self.grid, *described, *tensors[len(described) :], *self.numbers)


# Then it begins anew: shapes of x may never end.
MOST_KNOWN = 8192
_known: dict[tuple[Any, ...], Any] = {}


def known(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What `make` made for this key the first time."""
    found = _known.get(key)
    if found is None:
        found = make()
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[key] = found
    return found
