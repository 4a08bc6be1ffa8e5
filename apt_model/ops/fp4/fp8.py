"""Both operands in E4M3, for many rows of x: rows with a scale each, and slabs of the weight, for torch's own product.

Needs matrix units for FP8. `naive.linear_in_e4m3` is the definition; README.md says what is rounded.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from apt_model.core.errors import DeviceError, InputError
from apt_model.core.options import require
from apt_model.core.system.cuda import CudaDevice
from apt_model.ops.fp4 import launch, naive, slab
from apt_model.ops.fp4.compiled import Compiled, Launch, known
from apt_model.ops.fp4.layout import Shuffled, take_turns, take_turns_back
from apt_model.ops.fp4.slab import Operand

ACTIVATION_DTYPES = (None, "fp8")
# From this many rows of x on; below them the 16-bit path is about as fast, and more exact.
FP8_ROWS = 1024
# Whether Hopper's matrix units may keep sums to 14 bits beside their largest term, and not be added up in fp32 every
# 128 inputs. Faster; tests/tolerances.py has what it costs.
FAST_ACCUMULATION = True
# cuBLAS has scales of rows for Hopper from this version of CUDA on; elsewhere torch takes CUTLASS.
_HOPPER, _SCALES_OF_ROWS = 9, (12, 9)
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# What torch's product wants K and N to be multiples of.
_MULTIPLE = 16
# The widest row that a program holds, and values of it that a warp holds.
_WIDEST, _PER_WARP = 32768, 1024


def check(activation_dtype: str | None, dtype: torch.dtype, where: str = "fp4 linear") -> None:
    """Raise unless `activation_dtype` is one there is, and x in `dtype` can be brought to it."""
    require(activation_dtype in ACTIVATION_DTYPES, f"{where}.activation_dtype", "None or 'fp8'", activation_dtype)
    if activation_dtype is not None and dtype not in _TYPES:
        raise InputError(
            f"{where}: expected x in float32, bfloat16 or float16 with activation_dtype 'fp8', got {dtype}",
            remedy="cast x, or leave activation_dtype None",
        )


def serves(rows: int, device: torch.device) -> bool:
    """Whether a product with so many rows of x is computed in FP8; `DeviceError` on a GPU that has no units for it."""
    if device.type == "cuda":
        found = launch.facts(device.index)[0]
        if found < launch.ADA:
            raise DeviceError(
                "activation_dtype 'fp8': expected a GPU with FP8 matrix units, NVIDIA's of compute capability 8.9 or "
                f"later, got {'.'.join(map(str, found)) if any(found) else 'one of another maker'}",
                remedy="leave activation_dtype None: layer.activation_dtype = None",
            )
    return rows >= FP8_ROWS


def explain(rows: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """What computes `rows` rows of x with `activation_dtype` "fp8", or None where it is what computes them without."""
    if not serves(rows, device):
        return None
    why = f"from {FP8_ROWS} rows on with activation_dtype 'fp8'"
    if slab.usable(device, dtype):
        return f"x and slabs of the weight in E4M3 for torch's own product in FP8, {why}"
    return f"the definition in torch with x and the weight in E4M3, {why}"


def linear(x: Tensor, weight: Operand, bias: Tensor | None, activation: str | None) -> Tensor:
    """act(x W^T + bias) for x [M, K] -> [M, N] (swiglu: [M, N / 2]), both operands in E4M3.

    Beside the result this takes x in E4M3 and one slab; and the slab's result where torch's product is not cuBLAS's.
    """
    (count, width), (rest, unit) = x.shape, _factors(weight)
    rows, across = slab.stored_rows(weight), _padded(width)
    height = _padded(slab.height(rows, across, 1))
    in_e4m3 = quantize_rows(x, rest, height)
    out = x.new_empty(count, _padded(rows))
    memory = torch.empty(height, across, dtype=naive.E4M3, device=x.device)
    if across > width:
        memory.view(torch.uint8)[:, width:].zero_()
    own = weight._replace(global_scale=unit)
    added = None if bias is None else _in_order(bias.to(x.dtype), weight, out.shape[1])
    for first in range(0, rows, height):
        target = out[:, first : first + height]
        slab.unpack(own, memory[:, :width], row=first)
        part = None if added is None else added[first : first + height]
        _product(in_e4m3, memory[: target.shape[1]], part, target)
        if activation not in (None, "swiglu"):
            target.copy_(naive.activate(target, activation))
    out = _whole(out, weight)
    return naive.activate(out, activation) if activation == "swiglu" else out


class Rows(NamedTuple):
    """X as the product takes it."""

    values: Tensor  # E4M3 [M, K], K rounded up to 16 with zeros
    scales: Tensor  # float32 [M, 1]
    rests: Tensor  # float32 [1, N of a slab]: what a column of the result is multiplied with, everywhere the same


def quantize_rows(x: Tensor, rest: Tensor, columns: int) -> Rows:
    """`naive.rows_in_e4m3` of x [M, K] in one launch, and `columns` copies of `rest` [1]."""
    from apt_model.ops.fp4.kernel_rows import rows_kernel  # noqa: PLC0415 - Triton's import

    x = x if x.stride(1) == 1 else x.contiguous()
    (count, width), across = x.shape, _padded(x.shape[1])
    values = torch.empty(count, across, dtype=naive.E4M3, device=x.device)
    begin = -(-count // 4) * 4  # both begin at a multiple of 16 bytes
    scales = torch.empty(begin + columns, dtype=torch.float32, device=x.device)
    rests = scales[begin:]
    size, once = block(across)
    share = 1 << (-(-columns // count) - 1).bit_length()
    constants = {"BLOCK": size, "ONCE": once, "SHARE": share}
    about = (share, x.get_device(), x.dtype, width, x.stride(0), x.data_ptr() % 16, rest.data_ptr() % 16)

    def make() -> Launch:
        # The same kernel serves other numbers of rows and of copies.
        kernel = known(("rows kernel", *about), lambda: Compiled(rows_kernel, constants, num_warps=warps(size)))
        return Launch(kernel, x.get_device(), (count, 1, 1), (width, across, x.stride(0), columns))

    known(("rows", *about, count, columns), make)((x, rest, values, scales, rests))
    return Rows(values, scales[:count, None], rests[None])


def block(across: int) -> tuple[int, bool]:
    """Values that a program holds, and whether these are a whole row of so many."""
    size = min(1 << (across - 1).bit_length(), _WIDEST)
    return size, across <= size


def warps(size: int) -> int:
    """Warps of a program that holds so many values."""
    return min(16, max(1, size // _PER_WARP))


def _product(x: Rows, part: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write x part^T + bias into `out`, some columns of the result."""
    rests, fast = x.rests[:, : len(part)], FAST_ACCUMULATION
    product = torch._scaled_mm  # noqa: SLF001 - `torch.nn.functional.scaled_mm` has no `out`, and is not in 2.11
    if out.dtype == torch.float32:  # with scales of rows torch gives it on some GPUs only, and with a bias on none
        rest = rests[:, :1]
        product(x.values, part.T, rest, torch.ones_like(rest), out_dtype=out.dtype, use_fast_accum=fast, out=out)
        out.mul_(x.scales)
        if bias is not None:
            out.add_(bias)
        return
    target = out
    if not _by_cublas(out.device):
        # torch's CUTLASS kernels write rows side by side whatever the pitch of `out`, and bf16 where there is no bias.
        target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        bias = out.new_zeros(len(part)) if bias is None and out.dtype == torch.float16 else bias
    product(x.values, part.T, x.scales, rests, bias, out_dtype=out.dtype, use_fast_accum=fast, out=target)
    if target is not out:
        out.copy_(target)


@functools.cache
def _by_cublas(device: torch.device) -> bool:
    """Whether torch's product with scales of rows is cuBLAS's on `device`."""
    return launch.facts(device.index)[0][0] == _HOPPER and CudaDevice.toolkit() >= _SCALES_OF_ROWS


def _whole(out: Tensor, weight: Operand) -> Tensor:
    """The result without what was added to its columns, gate and up side by side."""
    rows = weight.shape[0]
    if isinstance(weight, Shuffled) and weight.gated:
        return take_turns_back(out.T, rows).T
    return out if out.shape[1] == rows else out[:, :rows].contiguous()


def _in_order(bias: Tensor, weight: Operand, columns: int) -> Tensor:
    """The bias of each of `columns` columns, of which those at the end may be no rows of the weight."""
    if isinstance(weight, Shuffled) and weight.gated:
        bias = take_turns(bias[:, None])[:, 0]
    return torch.nn.functional.pad(bias, (0, columns - len(bias)))


def _factors(weight: Operand) -> tuple[Tensor, Tensor]:
    """Float32 [1] each: what the sum is multiplied with beside the scale of its row, and the weights' unit."""
    if isinstance(weight, Shuffled):
        return weight.alpha[1:2], weight.alpha[2:]
    unit = naive.e4m3_unit(weight)
    return unit if weight.global_scale is None else unit / weight.global_scale, unit


def _padded(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE
