"""Many rows of x, and gradients: a slab of the weight is unpacked into one reused buffer, and torch multiplies.

The buffer stays in the GPU's cache between the two; it is all the memory that this takes beside operands and result.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.core.system import cuda
from apt_model.ops import HAS_TRITON
from apt_model.ops.fp4 import launch, naive
from apt_model.ops.fp4.compiled import Compiled, Launch, known
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


def takes(x: Tensor) -> bool:
    """`usable` for `x`, where it is and as it is."""
    return x.is_cuda and HAS_TRITON and x.dtype in _TYPES


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
        target = out if len(part) == rows else out[:, first : first + len(part)]
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


class Whole(NamedTuple):
    """A product for which the weight is one slab: one launch that unpacks it in pairs, and torch's own linear."""

    launch: Launch
    shape: tuple[int, int]  # of the weight in pairs
    dtype: torch.dtype
    activation: str | None

    def run(self, x: Tensor, weight: Shuffled, bias: Tensor | None) -> Tensor:
        """act(x W^T + bias) for x [..., K]."""
        if self.launch.index != cuda.current_index():
            with cuda.device_index(self.launch.index):
                return self.run(x, weight, bias)
        pairs = cuda.empty(self.shape, (self.shape[1], 1), torch.int32)
        self.launch((weight.words, weight.scales, weight.alpha, pairs))
        out = F.linear(x, pairs.view(self.dtype), bias)
        return out if self.activation is None else naive.activate(out, self.activation)


def whole(x: Tensor, weight: Shuffled, bias: Tensor | None, activation: str | None) -> Whole | None:
    """How the like of `linear` with x [..., K] is computed with fewer words, or None where that is not so."""
    rows, width = weight.shape
    if weight.gated or activation == "swiglu" or width % 2:
        return None
    if rows * width * x.element_size() > SLAB_BYTES or (bias is not None and bias.dtype != x.dtype):
        return None
    pairs = _pairs(weight, x.new_empty(rows, width))
    return None if pairs is None else Whole(_in_pairs(weight, pairs, 0, 0), (rows, width // 2), x.dtype, activation)


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
    rows = min(len(slab), stored_rows(weight) - row)
    part = slab if rows == len(slab) else slab[:rows]
    block = weight.format.block
    about = (part.shape, part.stride(), part.dtype, part.data_ptr() % 16, part.get_device(), block)
    if isinstance(weight, Shuffled):
        key = (
            "order", *about, weight.dtype, weight.in_features, row, column, weight.global_scale is None,
            weight.alpha.data_ptr() % 16,
        )  # fmt: skip
        pairs = _pairs(weight, part)
        if pairs is not None:
            known((*key, "pairs"), lambda: _in_pairs(weight, pairs, row, column))(
                (weight.words, weight.scales, weight.alpha, pairs)
            )
        else:
            known(key, lambda: _from_order(weight, part, row, column))(
                (weight.words, weight.scales, weight.alpha, weight.global_scale, part)
            )
        return part
    packed = weight.packed[row : row + rows, column // 2 :]
    scale = weight.scale.view(torch.uint8)[row : row + rows, column // block :]
    pitches = (packed.stride(0), scale.stride(0), packed.data_ptr() % 16, scale.data_ptr() % 16)
    key = ("packed", *about, *pitches, weight.global_scale is None)  # type: ignore[assignment]
    known(key, lambda: _from_packed(weight, part, pitches))((packed, scale, weight.global_scale, part))
    return part


def _from_order(weight: Shuffled, part: Tensor, row: int, column: int) -> Launch:
    from apt_model.ops.fp4.kernel_unpack import unpack_order_kernel  # noqa: PLC0415 - Triton is not everywhere

    (rows, width), pitch = part.shape, part.stride(0)
    constants = {
        "BLOCK": weight.block, "FP16": weight.dtype == torch.float16, "HAS_DIVISOR": weight.global_scale is not None,
    }  # fmt: skip
    kind = ("order kernel", *constants.values(), *_kind(part), weight.alpha.data_ptr() % 16)
    kernel = known(kind, lambda: Compiled(unpack_order_kernel, constants))
    grid = (-(-rows // TILE_ROWS), -(-width // 128), 1)
    numbers = (rows, width, pitch, weight.words.shape[1] * 4, row // TILE_ROWS, column // 64)
    return Launch(kernel, part.get_device(), grid, numbers)


def _in_pairs(weight: Shuffled, pairs: Tensor, row: int, column: int) -> Launch:
    from apt_model.ops.fp4.kernel_unpack import unpack_pairs_kernel  # noqa: PLC0415 - Triton is not everywhere

    (rows, width), pitch = pairs.shape, pairs.stride(0)
    chunks = math.gcd(column // 64, 2)
    constants = {
        "BLOCK": weight.block, "FP16": weight.dtype == torch.float16, "E4M3": pairs.dtype == torch.int16,
        "CHUNKS": chunks,
    }  # fmt: skip
    kind = ("pairs kernel", *constants.values(), *_kind(pairs), weight.alpha.data_ptr() % 16)
    kernel = known(kind, lambda: Compiled(unpack_pairs_kernel, constants, num_warps=8))
    numbers = (rows, width, pitch, weight.words.shape[1] * 4, row // TILE_ROWS, column // 64)
    return Launch(kernel, pairs.get_device(), (-(-rows // TILE_ROWS), -(-width // (32 * chunks)), 1), numbers)


def _pairs(weight: Shuffled, part: Tensor) -> Tensor | None:
    """`part` as pairs of weights, where these are unpacked as such; exactly, and by PTX."""
    to_e4m3 = part.dtype == torch.float8_e4m3fn
    if not part.is_cuda or not (to_e4m3 or (part.dtype == weight.dtype and weight.exact)):
        return None
    if part.shape[1] % 2 or part.stride(0) % 2 or part.data_ptr() % (2 * part.element_size()):
        return None
    # The order has to hold what its type can multiply (fp16 has no room for E8M0 scales).
    if not launch.serves(weight.format, part.device, weight.dtype):
        return None
    if to_e4m3 and launch.facts(part.device.index)[0] < launch.ADA:
        return None
    return part.view(torch.int16 if to_e4m3 else torch.int32)


def _from_packed(weight: PackedWeight, part: Tensor, pitches: tuple[int, ...]) -> Launch:
    from apt_model.ops.fp4.kernel_unpack import unpack_kernel  # noqa: PLC0415 - Triton is not everywhere

    (rows, width), pitch = part.shape, part.stride(0)
    count = -(-width // 2)
    size = min(512, 1 << max(count - 1, 1).bit_length())
    constants = {"BLOCK": weight.format.block, "HAS_DIVISOR": weight.global_scale is not None, "BYTES": size}
    kind = ("packed kernel", *constants.values(), *pitches, *_kind(part))
    kernel = known(kind, lambda: Compiled(unpack_kernel, constants))
    return Launch(kernel, part.get_device(), (rows, -(-count // size), 1), (width, *pitches[:2], pitch))


def _kind(part: Tensor) -> tuple[object, ...]:
    """What Triton would look at to find the kernel again."""
    return part.get_device(), part.dtype, part.shape[1], part.stride(0), part.data_ptr() % 16


def stored_rows(weight: Operand) -> int:
    """N, or more where gate and up take turns of eight rows."""
    rows = weight.shape[0]
    return -(-rows // 16) * 16 if isinstance(weight, Shuffled) and weight.gated else rows


def height(rows: int, width: int, size: int) -> int:
    """Rows of a slab: of all slabs the same, and a multiple of what the fastest products take."""
    most = max(_ROWS, SLAB_BYTES // (width * size) // _ROWS * _ROWS)
    slabs = -(-rows // most)
    return min(rows, -(-rows // slabs // _ROWS) * _ROWS)
