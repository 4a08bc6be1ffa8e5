"""Triton kernels that are launched without Triton's look-up and its launcher, which take longer than the launch."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from apt_model.core.system import cuda

if TYPE_CHECKING:
    from apt_model.ops.fp4.direct import Direct

LOG = logging.getLogger(__name__)
# Shape and strides of x, as a kernel's descriptor has them.
View = tuple[tuple[int, ...], tuple[int, ...]]


class Compiled:
    """A kernel with all that is decided before it is compiled; its callers keep one for each way to specialise it.

    With a `box` and its `layout` in shared memory, the kernel's first tensor goes to it as a descriptor.
    """

    def __init__(
        self, function: Any, constants: dict[str, Any], *, box: list[int] | None = None, layout: Any = None,
        **options: Any,
    ) -> None:  # fmt: skip
        self.function, self.constants, self.options = function, constants, options
        self.values = tuple(constants.values())  # in the order of the kernel's parameters, after all others
        self.box, self.layout = box, layout
        self.described: dict[str, Any] = {}
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

    def rows_of(self, x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        """X as the kernel's descriptor; checked by Triton the first time, and made without asking again."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: PLC0415 - Triton is not everywhere

        if not self.described:
            made = TensorDescriptor(x, list(shape), list(strides), self.box, self.layout)
            self.described = {**vars(made), "base": None}
            return made
        made = TensorDescriptor.__new__(TensorDescriptor)
        made.__dict__.update(self.described, base=x, shape=shape, strides=strides)
        return made


@final
class Launch:
    """A kernel with its grid, its numbers and the `view` that it has of x; called with its tensors, the first of all.

    The kernel's first launch is Triton's, which compiles it; those after it are direct where that can be.
    """

    __slots__ = ("direct", "grid", "index", "kernel", "numbers", "view")

    def __init__(
        self, kernel: Compiled, index: int, grid: tuple[int, int, int], numbers: tuple[int, ...],
        view: View | None = None,
    ) -> None:  # fmt: skip
        self.kernel, self.index, self.grid, self.numbers, self.view = kernel, index, grid, numbers, view
        self.direct: Direct | None = None

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Launch on the tensors' device, on its current stream."""
        if self.direct is None or not self.direct(tensors):
            self._otherwise(tensors)

    def _otherwise(self, tensors: tuple[Tensor | None, ...]) -> None:
        if self.index >= 0 and self.index != cuda.current_index():
            with torch.accelerator.device_index(self.index):
                self(tensors)
            return
        kernel, arguments = self.kernel, tensors
        if self.direct is None and kernel.kernel is not None and kernel.fault is None:
            from apt_model.ops.fp4.direct import Direct  # noqa: PLC0415 - Triton is not everywhere

            self.direct = Direct(kernel.kernel, self.index, tensors, self.grid, self.numbers, self.view)
            if self.direct(tensors):
                return
        if self.view is not None:
            arguments = (kernel.rows_of(tensors[0], *self.view), *tensors[1:])  # type: ignore[arg-type]
        kernel(self.grid, *arguments, *self.numbers)


_known: dict[tuple[Any, ...], Any] = {}
recalled = _known.get


def known(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What `make` made for this key the first time."""
    found = _known.get(key)
    if found is None:
        found = _known[key] = make()
    return found
