"""What is launched for a product of one kind: which kernel, its grid and numbers, and what the result looks like."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apt_model.core.system import cuda
from apt_model.ops.fp4.compiled import Box, Compiled, Launch, View, known
from apt_model.ops.fp4.counters import take
from apt_model.ops.fp4.layout import Shuffled
from apt_model.ops.fp4.tables import Decode, Tile

# Pieces of x that programs take at once.
GROUP = 8
CODES = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "swiglu": 5}


def likeness(x: Tensor, weight: Shuffled, bias: Tensor | None, activation: str | None) -> tuple[Any, ...]:
    """All that a product's launch depends on, and what Triton would look at to find the kernel again."""
    return (
        weight.exact, x.shape, x.stride(), x.dtype, x.data_ptr() % 16, x.get_device(), weight.words.get_device(),
        weight.dtype, weight.block, weight.out_features, weight.in_features, weight.gated, activation,
        None if bias is None else (bias.dtype, bias.data_ptr() % 16),
    )  # fmt: skip


class Plan(NamedTuple):
    """What is launched for x of one shape, and what it writes to."""

    launch: Launch | None  # None: x has to be copied before
    shape: tuple[int, ...] = ()  # of the result
    strides: tuple[int, ...] = ()
    sums: int = 0  # floats for sums over parts of the inputs
    counters: int = 0  # for them

    def run(self, x: Tensor, weight: Shuffled, bias: Tensor | None) -> Tensor:
        """The product; of x only its type and its memory matter."""
        assert self.launch is not None
        if self.launch.index != cuda.current_index():
            with cuda.device_index(self.launch.index):
                return self.run(x, weight, bias)
        out = cuda.empty(self.shape, self.strides, x.dtype)
        sums = cuda.empty((self.sums,), (1,), torch.float32) if self.sums else None
        counters = take(self.counters, weight.counters, self.launch.index) if self.sums else weight.counters
        self.launch((x, weight.words, weight.scales, weight.alpha, bias, out, sums, counters))
        return out


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor with no gaps."""
    steps = [1]
    for size in shape[:0:-1]:
        steps.append(steps[-1] * size)
    return tuple(steps[::-1])


def make(
    x: Tensor, weight: Shuffled, bias: Tensor | None, activation: str | None, setting: Decode | Tile, *, early: bool,
    turned: bool = False,
) -> Plan:  # fmt: skip
    """How x [M, K] is multiplied by a launch of this setting; `early`: it may begin before the one in front ends.

    With `turned` it is x [M, N] by the weight with rows for columns, a gradient.
    """
    if not (is_aligned(x, setting) if described(setting) else x.is_contiguous()):
        return Plan(None)
    (m, k), pitch, index = x.shape, x.stride(0), x.get_device()
    tiles, groups = weight.words.shape[:2]
    # In tiles of 64: the result's columns, and what is summed over.
    across, along = (groups * 4, tiles) if turned else (tiles, -(-k // 64))
    setting = _fitted(setting, across, groups, along)
    width = weight.in_features if turned else weight.out_features // 2 if weight.gated else weight.out_features
    rows, pieces = across // setting.wg, -(-m // setting.bm)
    spots = rows * pieces
    views: tuple[View, ...] = ()
    if isinstance(setting, Tile):
        grid = (pieces, rows, setting.split)
        steps = -(-along // setting.c)
        numbers: tuple[int, ...] = (m, width, along, -(-steps // setting.split))
        codes, scales = (tiles, groups * 8, 256), (tiles, groups * 4, 1024 // weight.block)
        views = ((m, k), (pitch, 1)), (codes, contiguous(codes)), (scales, contiguous(scales))
    else:
        grid = (rows, setting.split, 1)
        numbers = (m, width, k, pitch, groups, -(-groups // setting.split))
        if setting.kept:
            views = (((k // 64, m, 64), (64, pitch, 1)),)
    # The same kernel serves other numbers of rows.
    key = ("product", turned, setting, k, pitch, *likeness(x, weight, bias, activation)[4:])
    group = GROUP if pieces > GROUP else 0
    kernel = known(
        (*key, group),
        lambda: _product(setting, weight, bias is not None, activation, early=early, turned=turned, group=group),
    )
    sums = spots * setting.split * setting.wg * 64 * setting.bm if setting.split > 1 else 0
    shape = (m, width)
    return Plan(Launch(kernel, index, grid, numbers, views), shape, contiguous(shape), sums, spots if sums else 0)


def boxes(setting: Decode | Tile, block: int, turned: bool) -> tuple[Box, ...]:
    """What a kernel's descriptors bring to shared memory at once."""
    from triton.experimental.gluon import language as gl  # noqa: PLC0415 - Triton is not everywhere

    if isinstance(setting, Decode):
        return (([setting.kept * 4, setting.bm, 64], gl.NVMMASharedLayout(128, 16, 3)),)
    plain, (down, across) = gl.NVMMASharedLayout(0, 32, 3), (setting.wg, setting.c)
    if turned:
        down, across = across, down
    return (
        ([setting.bm, 64 * setting.c], gl.NVMMASharedLayout(128, 16, 2)),
        ([down, across * 2, 256], plain),
        ([down, across, 1024 // block], plain),
    )


def _product(
    setting: Decode | Tile,
    weight: Shuffled,
    has_bias: bool,
    activation: str | None,
    *,
    early: bool,
    turned: bool,
    group: int,
) -> Compiled:
    """One of the two kernels."""
    from apt_model.ops.fp4.kernel_decode import decode_kernel  # noqa: PLC0415 - Triton is not everywhere
    from apt_model.ops.fp4.kernel_tile import tile_kernel  # noqa: PLC0415

    options: dict[str, Any] = {"num_warps": setting.warps, "launch_pdl": early}
    own: dict[str, Any] = {"SPLIT": setting.split, "WG": setting.wg, "BM": setting.bm}
    if isinstance(setting, Tile):
        function: Any = tile_kernel
        own |= {"C": setting.c, "STAGES": setting.stages, "TURNED": turned, "GROUP": group}
    else:
        function = decode_kernel
        own |= {"REP": setting.rep, "KEPT": setting.kept, "AHEAD": setting.ahead}
        if setting.ahead == 4 and setting.rep == 1:
            options["maxnreg"] = 64
    common = {
        "BLOCK": weight.block, "FP16": weight.dtype == torch.float16, "HAS_BIAS": has_bias,
        "ACTIVATION": CODES[activation], "PDL": early,
    }  # fmt: skip
    return Compiled(function, {**own, **common}, boxes=boxes(setting, weight.block, turned), **options)


@functools.cache
def _fitted(setting: Decode | Tile, tiles: int, groups: int, chunks: int) -> Decode | Tile:
    """Every warpgroup has its 64 rows, and no slice of the inputs is empty or shorter than what is loaded ahead."""
    while tiles % setting.wg:
        setting = setting._replace(wg=setting.wg // 2)
    if isinstance(setting, Tile):
        steps = -(-chunks // setting.c)
        return setting._replace(split=-(-steps // -(-steps // setting.split)))
    return _whole_slices(setting._replace(rep=min(setting.rep, setting.wg)), groups)


def _whole_slices(setting: Decode, groups: int) -> Decode:
    """No slice of the inputs is empty, and each has as many groups as are loaded ahead, or a multiple."""
    per = -(-groups // setting.split)
    setting = setting._replace(split=-(-groups // per))
    fits = per % (setting.ahead // 4) == 0 and groups % (setting.ahead // 4) == 0
    return setting if fits else setting._replace(ahead=4)


def described(setting: Decode | Tile) -> bool:
    """Whether the kernel takes x as a tensor descriptor."""
    return isinstance(setting, Tile) or setting.kept > 0


def whole(setting: Decode | Tile) -> int:
    """What the width of x has to be a multiple of, for a tensor descriptor."""
    return 8 if isinstance(setting, Tile) else 64


def is_aligned(x: Tensor, setting: Decode | Tile) -> bool:
    """Whether a tensor descriptor takes x as it is."""
    (_, k), (pitch, step) = x.shape, x.stride()
    return k % whole(setting) == 0 and step == 1 and pitch % 8 == 0 and pitch >= k and x.data_ptr() % 16 == 0
