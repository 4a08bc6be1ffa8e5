"""Many rows of x, and gradients: a slab of the weight is unpacked into one reused buffer, and torch multiplies.

The buffer stays in the GPU's cache between the two; it is all the memory that this takes beside operands and result.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from apt_model.ops.fp4 import naive
from apt_model.ops.fp4.format import PackedWeight

HAS_TRITON = find_spec("triton") is not None
# Columns of a slab come in whole scale blocks of either format.
_COLUMNS = 32
# Bytes of a slab.
SLAB_BYTES = 32 * 2**20
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def usable(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels serve products where `x` is, in `dtype`."""
    return x.is_cuda and HAS_TRITON and dtype in _TYPES


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str | None) -> Tensor:
    """act(x W^T + bias) for x [M, K] -> [M, N] (swiglu: [M, N / 2]).

    W is rounded to x's type after the division by the global scale, which is exact where that is a power of two.
    """
    rows = weight.packed.shape[0]
    out = x.new_empty(x.shape[0], rows)
    slab = _buffer(x, weight)
    bias = None if bias is None else bias.to(x.dtype)
    fused = activation if activation != "swiglu" else None
    for first in range(0, rows, len(slab)):
        part = unpack(weight, slab, row=first)
        target = out[:, first : first + len(part)]
        if bias is None:
            torch.mm(x, part.T, out=target)
        else:
            torch.addmm(bias[first : first + len(part)], x, part.T, out=target)
        if fused is not None:
            target.copy_(naive.activate(target, fused))
    return naive.activate(out, activation) if activation == "swiglu" else out


def input_gradient(upstream: Tensor, weight: PackedWeight) -> Tensor:
    """dL/dx = upstream W for upstream [M, N] -> [M, K], a slab of columns at a time."""
    rows, width = weight.shape
    out = upstream.new_empty(upstream.shape[0], width)
    step = max(_COLUMNS, SLAB_BYTES // (rows * upstream.element_size()) // _COLUMNS * _COLUMNS)
    memory = upstream.new_empty(rows * min(step, width))
    for first in range(0, width, step):
        columns = min(step, width - first)
        part = unpack(weight, memory[: rows * columns].view(rows, columns), column=first)
        torch.mm(upstream, part, out=out[:, first : first + columns])
    return out


def unpack(weight: PackedWeight, slab: Tensor, *, row: int = 0, column: int = 0) -> Tensor:
    """Rows from `row` and columns from `column` (a multiple of 32) of a packed [N, K], as many as the slab has."""
    from apt_model.ops.fp4.kernel_unpack import unpack_kernel  # noqa: PLC0415 - Triton is not everywhere

    part = slab[: weight.packed.shape[0] - row]
    packed = weight.packed[row : row + len(part), column // 2 :]
    scale = weight.scale.view(torch.uint8)[row : row + len(part), column // weight.format.block :]
    count = -(-part.shape[1] // 2)
    block = min(512, 1 << max(count - 1, 1).bit_length())
    with torch.accelerator.device_index(slab.device.index):
        unpack_kernel[(len(part), -(-count // block))](
            packed, scale, weight.global_scale, part, part.shape[1], packed.stride(0), scale.stride(0), part.stride(0),
            BLOCK=weight.format.block, HAS_DIVISOR=weight.global_scale is not None, BYTES=block,
        )  # fmt: skip
    return part


def _buffer(x: Tensor, weight: PackedWeight) -> Tensor:
    rows, width = weight.shape
    height = max(64, SLAB_BYTES // max(1, width * x.element_size()))
    return x.new_empty(min(rows, height), width)
