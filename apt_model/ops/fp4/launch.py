"""Which kernel for how many rows on which GPU, and its launch."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apt_model.core.system.cuda import CudaDevice
from apt_model.ops.fp4.compiled import Compiled, known, on_device
from apt_model.ops.fp4.format import NVFP4, Format, PackedWeight
from apt_model.ops.fp4.layout import COUNTERS, Shuffled
from apt_model.ops.fp4.tables import HOPPER, Decode, Tile

# Above this many rows of x unpacking a slab and torch's own product are faster.
MOST_ROWS = 6144
CODES = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "swiglu": 5}
_BUCKETS = (8, 16, 32, 64, 128, 256, 1024)
FEW = 16  # rows of x up to which a product is bound by reading the weights
_HOPPER = (9, 0)
_AMPERE = (8, 0)


class Choice(NamedTuple):
    """A launch, or None where unpacking a slab is the way; and where that comes from."""

    setting: Decode | Tile | None
    why: str


BY_RULE, SHIPPED, MEASURED = "by rule", "from the shipped table", "measured on this machine"


def choose(rows: int, weight: PackedWeight | Shuffled, dtype: torch.dtype) -> Decode | Tile | None:
    """The launch for `rows` rows of x in `dtype`, or None where unpacking a slab is the way."""
    return choice(rows, weight, dtype).setting


def choice(rows: int, weight: PackedWeight | Shuffled, dtype: torch.dtype) -> Choice:
    """`choose`, and why: what was measured on this machine comes before what is shipped."""
    if rows > MOST_ROWS:
        return Choice(None, BY_RULE)
    if isinstance(weight, Shuffled):
        return _choice(rows, weight.out_features, weight.in_features, weight.format, weight.words.device, dtype)
    return _choice(rows, *weight.shape, weight.format, weight.device, dtype)


@functools.cache
def _choice(  # noqa: PLR0917 - they are what it remembers by
    rows: int, out_rows: int, in_features: int, form: Format, device: torch.device, dtype: torch.dtype
) -> Choice:
    from apt_model.ops.fp4 import measured  # noqa: PLC0415 - it launches, so it imports this file

    if not serves(form, device, dtype):
        return Choice(None, BY_RULE)
    bucket = bucket_of(rows)
    kept = measured.find(bucket, out_rows, in_features, form, device, dtype)
    return shipped(bucket, out_rows, in_features, device) if kept is None else kept


def forget() -> None:
    """Choose anew from now on."""
    _choice.cache_clear()


def bucket_of(rows: int) -> int:
    """The most rows for which the same launch is taken as for `rows`."""
    return next(each for each in (*_BUCKETS, MOST_ROWS) if rows <= each)


def shipped(bucket: int, out_rows: int, in_features: int, device: torch.device) -> Choice:
    """What this package knows of itself: the table, and rules for what is not in it."""
    hopper, processors = is_hopper(device), facts(device.index)[1]
    known = HOPPER.get((out_rows, in_features, bucket if bucket < MOST_ROWS else 1024)) if hopper else None
    if known is not None:
        return Choice(known, SHIPPED)
    return Choice(_rule(bucket, out_rows, in_features, hopper, processors), BY_RULE)


def is_hopper(device: torch.device) -> bool:
    """Whether wgmma, and what reads x from shared memory, run on `device`."""
    return facts(device.index)[0] == _HOPPER


def serves(form: Format, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether some launch on `device` takes weights of this format for x in `dtype`."""
    half = dtype == torch.bfloat16 or (dtype == torch.float16 and form is NVFP4)
    return half and facts(device.index)[0] >= _AMPERE


@functools.cache
def facts(index: int | None) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors."""
    device = CudaDevice(index)
    return device.compute_capability(), device.multiprocessors()


def _rule(x_rows: int, out_rows: int, in_features: int, hopper: bool, processors: int) -> Decode | Tile | None:
    if not hopper:
        # wgmma and what reads x from shared memory are Hopper's own; the rest runs wherever mma.sync does.
        return _decode(x_rows, out_rows, in_features, processors) if x_rows <= FEW else None
    return (
        _few(x_rows, out_rows, in_features, processors)
        if x_rows <= 64
        else _many(x_rows, out_rows, in_features, processors)
    )


def _few(x_rows: int, out_rows: int, in_features: int, processors: int) -> Tile:
    """One piece of x; inputs are split where there are few tiles of the weight, which costs an exchange of sums."""
    tiles, chunks = -(-out_rows // 64), -(-in_features // 64)
    bm = next(each for each in (8, 16, 32, 64) if x_rows <= each)
    c, stages = (8 if chunks >= 32 else 4, 3) if bm <= 16 else (4, 3) if bm == 32 else (2, 4)
    return Tile(1, bm, c, stages, _split(tiles, -(-chunks // c), processors * 3 // 2))


def _many(x_rows: int, out_rows: int, in_features: int, processors: int) -> Tile:
    """The largest pieces that still give nearly every multiprocessor one."""
    tiles, chunks = -(-out_rows // 64), -(-in_features // 64)
    for wg, bm, c, stages in ((2, 256, 2, 3), (2, 128, 2, 3), (1, 128, 4, 3)):
        programs = -(-x_rows // bm) * -(-tiles // wg)
        if (bm < 256 or x_rows > 128) and programs >= processors * 4 // 5:
            return Tile(wg, bm, c, stages, 1)
    return Tile(wg, bm, c, stages, _split(programs, -(-chunks // c), processors))


def _split(programs: int, steps: int, wanted: int) -> int:
    """Parts of the inputs that make `programs` as many as are wanted, none of them empty."""
    split = max(1, min(-(-wanted // programs), 8, -(-steps // 2)))
    return -(-steps // -(-steps // split))


def _decode(x_rows: int, out_rows: int, in_features: int, processors: int) -> Decode:
    """Enough warps for a third of what the GPU holds, in pieces that leave few idle at the end."""
    tiles, groups = -(-out_rows // 64), -(-in_features // 256)
    bm = 8 if x_rows <= 8 else 16
    wg = 4 if tiles >= processors // 2 and bm == 8 else 2 if tiles >= 2 else 1
    per = 1 << (groups - 1).bit_length()
    limit = 8 if bm == 8 else 4
    while per > 1 and (per > 2 * limit or (tiles * -(-groups // per) * 4 < processors * 24 and per > 2)):
        per //= 2
    return Decode(wg, bm, 0, 4, -(-groups // per))


def run(x: Tensor, weight: Shuffled, bias: Tensor | None, activation: str | None, setting: Decode | Tile) -> Tensor:
    """act(x W^T + bias), x [M, K] -> [M, N] (swiglu: [M, N / 2])."""
    described = isinstance(setting, Tile) or setting.kept > 0
    x = _aligned(x, 8 if isinstance(setting, Tile) else 64) if described else x.contiguous()
    (m, k), pitch, index = x.shape, x.stride(0), x.device.index
    # All that a launch is decided by, and what Triton would look at to find the kernel again.
    key = (
        setting, m, k, pitch, index, weight.dtype, weight.block, weight.out_features, activation,
        None if bias is None else (bias.dtype, bias.data_ptr() % 16), described or x.data_ptr() % 16,
    )  # fmt: skip
    plan = known(key, lambda: _plan(key, weight, has_bias=bias is not None))
    out = x.new_empty(plan.out)
    partial = x.new_empty(plan.sums, dtype=torch.float32) if plan.sums else None
    counters = weight.counters.new_zeros(plan.counters) if plan.counters else weight.counters
    operands = plan.product.described(plan.views, x, weight.words, weight.scales)
    with on_device(index):
        plan.product(plan.grid, *operands, weight.alpha, bias, out, partial, counters, *plan.numbers)
    return out


class _View(NamedTuple):
    """A tensor as a descriptor of it says."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Plan(NamedTuple):
    """One launch, for so many rows of x."""

    product: "_Product"
    grid: tuple[int, int, int]
    numbers: tuple[int, ...]  # the kernel's own, after its tensors
    views: tuple["_View | None", ...]  # of x, words and scales, where the kernel takes a descriptor
    out: tuple[int, int]
    sums: int  # floats for sums over parts of the inputs
    counters: int  # where the weight's own do not suffice


def _plan(key: tuple[Any, ...], weight: Shuffled, *, has_bias: bool) -> _Plan:
    setting, m, k, pitch, index = key[:5]
    activation = key[8]
    tiles, groups = weight.words.shape[:2]
    setting = _fitted(setting, tiles, groups)
    width = weight.out_features // 2 if weight.gated else weight.out_features
    rows = tiles // setting.wg
    spots = rows * -(-m // setting.bm)
    if isinstance(setting, Tile):
        chunks = -(-k // 64)
        grid = (-(-m // setting.bm), rows, setting.split)
        steps = -(-chunks // setting.c)
        numbers: tuple[int, ...] = (m, width, chunks, -(-steps // setting.split))
        views: tuple[_View | None, ...] = (
            _View((m, k), (pitch, 1)),
            _rows_of(tiles, groups * 8, 256),
            _rows_of(tiles, groups * 4, 1024 // weight.block),
        )
    else:
        grid = (rows, setting.split, 1)
        numbers = (m, width, k, pitch, groups, -(-groups // setting.split))
        views = (_View((k // 64, m, 64), (64, pitch, 1)) if setting.kept else None, None, None)
    sums = spots * setting.split * setting.wg * 64 * setting.bm if setting.split > 1 else 0
    # The same kernel serves other numbers of rows.
    product = known((setting, *key[2:]), lambda: _Product(setting, weight, has_bias, activation, index))
    counters = spots if sums and spots > tiles * COUNTERS else 0
    return _Plan(product, grid, numbers, views, (m, width), sums, counters)


def _rows_of(tiles: int, rows: int, size: int) -> _View:
    return _View((tiles, rows, size), (rows * size, size, 1))


class _Product(Compiled):
    """One of the two kernels, with the descriptors of its operands."""

    def __init__(
        self, setting: Decode | Tile, weight: Shuffled, has_bias: bool, activation: str | None, index: int
    ) -> None:
        from triton.experimental.gluon import language as gl  # noqa: PLC0415 - Triton is not everywhere
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: PLC0415

        from apt_model.ops.fp4.kernel_decode import decode_kernel  # noqa: PLC0415
        from apt_model.ops.fp4.kernel_tile import tile_kernel  # noqa: PLC0415

        early = facts(index)[0] >= _HOPPER
        options: dict[str, Any] = {"num_warps": setting.warps, "launch_pdl": early}
        if isinstance(setting, Tile):
            function: Any = tile_kernel
            own = {"SPLIT": setting.split, "WG": setting.wg, "C": setting.c, "BM": setting.bm, "STAGES": setting.stages}
            plain = gl.NVMMASharedLayout(0, 32, 3)
            self.boxes: tuple[tuple[list[int], Any], ...] = (
                ([setting.bm, 64 * setting.c], gl.NVMMASharedLayout(128, 16, 2)),
                ([setting.wg, setting.c * 2, 256], plain),
                ([setting.wg, setting.c, 1024 // weight.block], plain),
            )
        else:
            function = decode_kernel
            own = {
                "SPLIT": setting.split, "WG": setting.wg, "REP": setting.rep, "BM": setting.bm, "KEPT": setting.kept,
                "AHEAD": setting.ahead,
            }  # fmt: skip
            self.boxes = (([setting.kept * 4, setting.bm, 64], gl.NVMMASharedLayout(128, 16, 3)),)
            if setting.ahead == 4 and setting.rep == 1:
                options["maxnreg"] = 64
        common = {
            "BLOCK": weight.block, "FP16": weight.dtype == torch.float16, "HAS_BIAS": has_bias,
            "ACTIVATION": CODES[activation], "PDL": early,
        }  # fmt: skip
        super().__init__(function, {**own, **common}, **options)
        self.descriptor: Any = TensorDescriptor
        self.made: dict[int, dict[str, Any]] = {}

    def described(self, views: tuple[_View | None, ...], *tensors: Tensor) -> list[Any]:
        """The tensors as the kernel takes them; Triton checks a descriptor once, then it is made without asking."""
        return [
            tensor if view is None else self._descriptor(i, tensor, view)
            for i, (tensor, view) in enumerate(zip(tensors, views, strict=True))
        ]

    def _descriptor(self, i: int, tensor: Tensor, view: _View) -> Any:
        if i not in self.made:
            made = self.descriptor(tensor, list(view.shape), list(view.strides), *self.boxes[i])
            self.made[i] = {**vars(made), "base": None}
            return made
        made = self.descriptor.__new__(self.descriptor)
        made.__dict__.update(self.made[i], base=tensor, shape=view.shape, strides=view.strides)
        return made


@functools.cache
def _fitted(setting: Decode | Tile, tiles: int, groups: int) -> Decode | Tile:
    """Every program has all of its rows, and no slice of the inputs is empty or shorter than what is loaded ahead."""
    while tiles % setting.wg:
        setting = setting._replace(wg=setting.wg // 2)
    if isinstance(setting, Decode):
        setting = setting._replace(rep=min(setting.rep, setting.wg))
    return _whole_slices(setting, groups) if isinstance(setting, Decode) else setting


def _whole_slices(setting: Decode, groups: int) -> Decode:
    """No slice of the inputs is empty, and each has as many groups as are loaded ahead, or a multiple."""
    per = -(-groups // setting.split)
    setting = setting._replace(split=-(-groups // per))
    fits = per % (setting.ahead // 4) == 0 and groups % (setting.ahead // 4) == 0
    return setting if fits else setting._replace(ahead=4)


def _aligned(x: Tensor, whole: int) -> Tensor:
    """X as a tensor descriptor takes it: rows at multiples of 16 bytes, a multiple of `whole` wide."""
    pad = -x.shape[1] % whole
    if pad:
        return torch.nn.functional.pad(x, (0, pad))
    if x.stride(1) != 1 or x.stride(0) % 8 or x.stride(0) < x.shape[1] or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x
