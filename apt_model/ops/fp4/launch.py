"""Which kernel for how many rows on which GPU, and its launch."""

import functools
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from apt_model.core.system.cuda import CudaDevice
from apt_model.ops.fp4.compiled import MOST_KNOWN, known
from apt_model.ops.fp4.format import NVFP4, Format, PackedWeight
from apt_model.ops.fp4.layout import Shuffled, take_turns
from apt_model.ops.fp4.plan import Plan, contiguous, described, is_aligned, likeness, make, whole
from apt_model.ops.fp4.tables import Decode, Table, Tile, of_card

# Above this many rows of x unpacking a slab and torch's own product are faster, unless sums have so many terms.
MOST_ROWS, LONG = 6144, 8192
# For any number of rows beyond a thousand.
_MOST = Tile(2, 256, 2, 3, 1)
_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024)
FEW = 16  # rows of x up to which a product is bound by reading the weights
_HOPPER = (9, 0)
_AMPERE = (8, 0)
ADA = (8, 9)  # the first with matrix units for FP8, and instructions that round to it


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
        long = weight.in_features >= LONG and _takes_tiles(weight, dtype)
        return Choice(_MOST if long else None, BY_RULE)
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
    _served.clear()


def bucket_of(rows: int) -> int:
    """The most rows for which the same launch is taken as for `rows`."""
    return next(each for each in (*_BUCKETS, MOST_ROWS) if rows <= each)


def shipped(bucket: int, out_rows: int, in_features: int, device: torch.device) -> Choice:
    """What this package knows of itself: the table, and rules for what is not in it."""
    hopper, processors = is_hopper(device), facts(device.index)[1]
    known = table(device.index).get((out_rows, in_features, bucket if bucket < MOST_ROWS else 1024)) if hopper else None
    if known is not None:
        return Choice(known, SHIPPED)
    return Choice(_rule(bucket, out_rows, in_features, hopper, processors), BY_RULE)


@functools.cache
def table(index: int | None) -> Table:
    """The shipped table of a GPU of compute capability 9.0."""
    return of_card(CudaDevice(index).name())


def is_hopper(device: torch.device) -> bool:
    """Whether wgmma, and what reads x from shared memory, run on `device`."""
    return facts(device.index)[0] == _HOPPER


def serves(form: Format, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether some launch on `device` takes weights of this format for x in `dtype`."""
    half = dtype == torch.bfloat16 or (dtype == torch.float16 and form is NVFP4)
    return half and facts(device.index)[0] >= _AMPERE


def _takes_tiles(weight: PackedWeight | Shuffled, dtype: torch.dtype) -> bool:
    """Whether `kernel_tile` multiplies this weight, where it is, and x in `dtype`."""
    return is_hopper(weight.device) and serves(weight.format, weight.device, dtype)


@functools.cache
def facts(index: int | None) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors."""
    device = CudaDevice(index)
    return device.compute_capability(), device.multiprocessors()


def _rule(x_rows: int, out_rows: int, in_features: int, hopper: bool, processors: int) -> Decode | Tile | None:
    if not hopper:
        # wgmma and what reads x from shared memory are Hopper's own; the rest runs wherever mma.sync does.
        return _decode(x_rows, out_rows, in_features, processors) if x_rows <= FEW else None
    return _tile(x_rows, out_rows, in_features, processors)


def _tile(x_rows: int, out_rows: int, in_features: int, processors: int) -> Tile:
    return (_few if x_rows <= 64 else _many)(x_rows, out_rows, in_features, processors)


def _few(x_rows: int, out_rows: int, in_features: int, processors: int) -> Tile:
    """One piece of x; inputs are split where there are few tiles of the weight, which costs an exchange of sums."""
    tiles, chunks = -(-out_rows // 64), -(-in_features // 64)
    bm = next(each for each in (8, 16, 32, 64) if x_rows <= each)
    c, stages = (8 if chunks >= 32 else 4, 3) if bm <= 16 else (4, 3) if bm == 32 else (2, 4)
    return Tile(1, bm, c, stages, _split(tiles, -(-chunks // c), processors * 3 // 2))


def _many(x_rows: int, out_rows: int, in_features: int, processors: int) -> Tile:
    """The largest pieces that still give nearly every multiprocessor one; sums are exchanged for half of them only."""
    tiles, chunks = -(-out_rows // 64), -(-in_features // 64)
    for wg, bm, c, stages in ((2, 256, 2, 3), (2, 128, 2, 3), (1, 128, 4, 3)):
        programs = -(-x_rows // bm) * -(-tiles // wg)
        if (bm < 256 or x_rows > 128) and programs >= processors * 4 // 5:
            return Tile(wg, bm, c, stages, 1)
    return Tile(wg, bm, c, stages, min(4, _split(programs, -(-chunks // c), processors // 2)))


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


def again(x: Tensor, weight: PackedWeight | Shuffled, bias: Tensor | None, activation: str | None) -> Tensor | None:
    """act(x W^T + bias) for x [..., K] the way that the like was remembered with, or None where none was."""
    if not x.is_cuda or not isinstance(weight, Shuffled):
        return None
    way = _served.get(likeness(x, weight, bias, activation))
    return None if way is None else way.run(x, weight, bias)


class Way(Protocol):
    """How a product of one kind is computed."""

    def run(self, x: Tensor, weight: Shuffled, bias: Tensor | None) -> Tensor:
        """act(x W^T + bias) for x [..., K]."""


def remember(x: Tensor, weight: Shuffled, bias: Tensor | None, activation: str | None, way: Way) -> None:
    """Let `again` serve the like of these this way."""
    if len(_served) >= MOST_KNOWN:
        _served.clear()
    _served[likeness(x, weight, bias, activation)] = way


def way(x: Tensor, weight: Shuffled, bias: Tensor | None, activation: str | None, setting: Decode | Tile) -> Way | None:
    """How the like of x [..., K] is computed by this launch, or None where x would have to be copied."""
    if x.dim() != 2 and not x.is_contiguous():
        return None
    plan = _plan_of(x if x.dim() == 2 else x.view(-1, x.shape[-1]), weight, bias, activation, setting)
    if plan.launch is None:
        return None
    shape = (*x.shape[:-1], plan.shape[-1])
    return plan._replace(shape=shape, strides=contiguous(shape))


def run(
    x: Tensor, weight: Shuffled, bias: Tensor | None, activation: str | None, setting: Decode | Tile, *,
    turned: bool = False,
) -> Tensor:  # fmt: skip
    """act(x W^T + bias), x [M, K] -> [M, N] (swiglu: [M, N / 2]); with `turned` x W, x [M, N] -> [M, K]."""
    plan = _plan_of(x, weight, bias, activation, setting, turned=turned)
    if plan.launch is None:
        x = _aligned(x, setting) if described(setting) else x.contiguous()
        plan = _plan_of(x, weight, bias, activation, setting, turned=turned)
    return plan.run(x, weight, bias)


def gradient(upstream: Tensor, weight: PackedWeight | Shuffled) -> Tensor | None:
    """Upstream W for upstream [M, N] -> [M, K] by a kernel that turns the weight, or None where there is none."""
    if not isinstance(weight, Shuffled) or upstream.dtype != weight.dtype or not _takes_tiles(weight, weight.dtype):
        return None
    rows, processors = len(upstream), facts(weight.device.index)[1]
    if rows > MOST_ROWS:  # slabs are faster
        return None
    if weight.gated:
        upstream = take_turns(upstream.T).T
    setting = _tile(rows, weight.in_features, weight.out_features, processors)
    return run(upstream, weight, None, None, setting, turned=True)


# By what `likeness` tells.
_served: dict[tuple[Any, ...], Way] = {}


def _plan_of(
    x: Tensor, weight: Shuffled, bias: Tensor | None, activation: str | None, setting: Decode | Tile, *,
    turned: bool = False,
) -> Plan:  # fmt: skip
    key = (setting, turned, *likeness(x, weight, bias, activation))
    early = facts(x.get_device())[0] >= _HOPPER
    plan: Plan = known(key, lambda: make(x, weight, bias, activation, setting, early=early, turned=turned))
    return plan


def _aligned(x: Tensor, setting: Decode | Tile) -> Tensor:
    """X as a tensor descriptor takes it: rows at multiples of 16 bytes, in whole chunks if the kernel wants those."""
    pad = -x.shape[1] % whole(setting)
    if pad:
        return torch.nn.functional.pad(x, (0, pad))
    return x if is_aligned(x, setting) else x.clone(memory_format=torch.contiguous_format)
