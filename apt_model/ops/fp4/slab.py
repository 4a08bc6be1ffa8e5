"""Many rows of x, and gradients: a slab of the weight is unpacked into one reused buffer, and torch multiplies.

The buffer stays in the GPU's cache between the two; it is all the memory that this takes beside operands and result.
"""

import torch
from torch import Tensor

from apt_model.ops import HAS_TRITON
from apt_model.ops.fp4 import naive
from apt_model.ops.fp4.compiled import Compiled, known, on_device
from apt_model.ops.fp4.format import PackedWeight
from apt_model.ops.fp4.layout import TILE_ROWS, Shuffled, take_turns, take_turns_back

# Rows and columns of a slab are multiples of these: whole tiles and groups of the kernels' order.
_ROWS = 256
_COLUMNS = 256
# Bytes of a slab.
SLAB_BYTES = 32 * 2**20
# A weight as kernels take it.
Operand = PackedWeight | Shuffled
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels serve products on `device` in `dtype`."""
    return device.type == "cuda" and HAS_TRITON and dtype in _TYPES


def unpacks(weight: Operand, dtype: torch.dtype) -> bool:
    """Whether `unpack` gives the whole weight [N, K] in `dtype`, rows where they belong."""
    in_place = isinstance(weight, PackedWeight) or not weight.gated
    return in_place and usable(weight.device, dtype) and weight.shape.numel() > 0


def linear(x: Tensor, weight: Operand, bias: Tensor | None, activation: str | None) -> Tensor:
    """act(x W^T + bias) for x [M, K] -> [M, N] (swiglu: [M, N / 2]).

    W is rounded to x's type after the division by the global scale, which is exact where that is a power of two.
    """
    gated = isinstance(weight, Shuffled) and weight.gated
    rows = stored_rows(weight)
    out = x.new_empty(x.shape[0], rows)
    slab = x.new_empty(height(rows, weight.in_features, x.element_size()), weight.in_features)
    bias = None if bias is None else bias.to(x.dtype)
    for first in range(0, rows, len(slab)):
        part = unpack(weight, slab, row=first)
        target = out[:, first : first + len(part)]
        if bias is None or gated:
            torch.mm(x, part.T, out=target)
        else:
            torch.addmm(bias[first : first + len(part)], x, part.T, out=target)
        if not gated and activation not in (None, "swiglu"):
            target.copy_(naive.activate(target, activation))
    if gated:
        out = take_turns_back(out.T, weight.shape[0]).T
        out = out if bias is None else out + bias
    return naive.activate(out, activation) if gated or activation == "swiglu" else out


def input_gradient(upstream: Tensor, weight: Operand) -> Tensor:
    """dL/dx = upstream W for upstream [M, N] -> [M, K], a slab of columns at a time."""
    rows, width = stored_rows(weight), weight.in_features
    if isinstance(weight, Shuffled) and weight.gated:
        upstream = take_turns(upstream.T).T
    out = upstream.new_empty(upstream.shape[0], width)
    step = max(_COLUMNS, SLAB_BYTES // (rows * upstream.element_size()) // _COLUMNS * _COLUMNS)
    memory = upstream.new_empty(rows * min(step, width))
    for first in range(0, width, step):
        columns = min(step, width - first)
        part = unpack(weight, memory[: rows * columns].view(rows, columns), column=first)
        torch.mm(upstream, part, out=out[:, first : first + columns])
    return out


def unpack(weight: Operand, slab: Tensor, *, row: int = 0, column: int = 0) -> Tensor:
    """Rows from `row` and columns from `column` of a [N, K], as many as the slab has.

    `column` is a multiple of 32; of a weight in the kernels' order, `row` and `column` are multiples of 64, and rows of
    gate and up take turns where they do there. For E4M3 `weight` has its unit in the place of its global scale.
    """
    from apt_model.ops.fp4.kernel_unpack import unpack_kernel, unpack_order_kernel  # noqa: PLC0415 - Triton's import

    part = slab[: stored_rows(weight) - row]
    (rows, width), stride, block = part.shape, part.stride(0), weight.format.block
    has_divisor, index = weight.global_scale is not None, part.device.index
    key = (index, block, has_divisor, part.dtype, width, stride, part.data_ptr() % 16)
    with on_device(index):
        if isinstance(weight, Shuffled):
            half = weight.dtype == torch.float16
            constants = {"BLOCK": block, "FP16": half, "HAS_DIVISOR": has_divisor}
            known(("order", half, *key), lambda: Compiled(unpack_order_kernel, constants))(
                (-(-rows // TILE_ROWS), -(-width // 128), 1),
                weight.words, weight.scales, weight.alpha, weight.global_scale, part, rows, width, stride,
                weight.words.shape[1] * 4, row // TILE_ROWS, column // 64,
            )  # fmt: skip
            return part
        packed = weight.packed[row : row + rows, column // 2 :]
        scale = weight.scale.view(torch.uint8)[row : row + rows, column // block :]
        count = -(-width // 2)
        size = min(512, 1 << max(count - 1, 1).bit_length())
        pitches = (packed.stride(0), scale.stride(0), packed.data_ptr() % 16, scale.data_ptr() % 16)
        constants = {"BLOCK": block, "HAS_DIVISOR": has_divisor, "BYTES": size}
        known(("packed", pitches, *key), lambda: Compiled(unpack_kernel, constants))(
            (rows, -(-count // size), 1),
            packed, scale, weight.global_scale, part, width, packed.stride(0), scale.stride(0), stride,
        )  # fmt: skip
    return part


def stored_rows(weight: Operand) -> int:
    """N, or more where gate and up take turns of eight rows."""
    rows = weight.shape[0]
    return -(-rows // 16) * 16 if isinstance(weight, Shuffled) and weight.gated else rows


def height(rows: int, width: int, size: int) -> int:
    """Rows of a slab: of all slabs the same, and a multiple of what the fastest products take."""
    most = max(_ROWS, SLAB_BYTES // (width * size) // _ROWS * _ROWS)
    slabs = -(-rows // most)
    return min(rows, -(-rows // slabs // _ROWS) * _ROWS)
