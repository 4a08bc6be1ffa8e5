"""Which kernel for how many rows on which GPU, and its launch."""

import functools

import torch
from torch import Tensor

from apt_model.core.system.cuda import CudaDevice
from apt_model.ops.fp4.format import NVFP4, PackedWeight
from apt_model.ops.fp4.layout import Shuffled
from apt_model.ops.fp4.tables import HOPPER, Decode, Tile

# Above this many rows of x unpacking a slab and torch's own product are faster.
MOST_ROWS = 1536
CODES = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "swiglu": 5}
_BUCKETS = (8, 16, 32, 64, 128, 256, 1024)
_FEW = 16  # rows of x up to which a product is bound by reading the weights
_HOPPER = (9, 0)
_AMPERE = (8, 0)


def choose(rows: int, weight: PackedWeight, dtype: torch.dtype) -> Decode | Tile | None:
    """The launch for `rows` rows of x in `dtype`, or None where unpacking a slab is the way."""
    capability, processors = _facts(weight.packed.device.index)
    out_rows, in_features = weight.shape
    half = dtype == torch.bfloat16 or (dtype == torch.float16 and weight.format is NVFP4)
    if capability < _AMPERE or not half:
        return None
    if capability != _HOPPER:
        # wgmma and what reads x from shared memory are Hopper's own; the rest runs wherever mma.sync does.
        return _decode(rows, out_rows, in_features, processors, keep=False) if rows <= _FEW else None
    if rows > MOST_ROWS:
        return None
    bucket = next(each for each in (*_BUCKETS, MOST_ROWS) if rows <= each)
    return _hopper(bucket, out_rows, in_features, processors)


@functools.cache
def _facts(index: int | None) -> tuple[tuple[int, int], int]:
    device = CudaDevice(index)
    return device.compute_capability(), device.multiprocessors()


@functools.cache
def _hopper(x_rows: int, out_rows: int, in_features: int, processors: int) -> Decode | Tile:
    known = HOPPER.get((out_rows, in_features, x_rows if x_rows < MOST_ROWS else 1024))
    if known is not None:
        return known
    if x_rows <= _FEW:
        return _decode(x_rows, out_rows, in_features, processors, keep=in_features % 64 == 0)
    tiles, chunks = -(-out_rows // 64), -(-in_features // 64)
    bm = 32 if x_rows <= 32 else 64 if x_rows <= 64 else 128 if x_rows <= 128 else 256
    wg = 1 if bm <= 64 else 2
    if bm == 256 and -(-x_rows // 256) * -(-tiles // 2) < processors:
        bm = 128
    c, stages = {32: (4, 3), 64: (4, 3), 128: (4, 3), 256: (2, 3)}[bm]
    programs = -(-x_rows // bm) * -(-tiles // wg)
    wanted = processors * (2 if bm <= 64 else 1)
    steps = -(-chunks // c)
    split = 1
    while split < 8 and programs * split * 2 <= wanted * 1.1 and steps // (split * 2) >= 4:
        split *= 2
    return Tile(wg, bm, c, stages, 5 if wg * bm <= 256 else 4, split)


def _decode(x_rows: int, out_rows: int, in_features: int, processors: int, *, keep: bool) -> Decode:
    """Enough warps for a third of what the GPU holds, in pieces that leave few idle at the end."""
    tiles, groups = -(-out_rows // 64), -(-in_features // 256)
    bm = 8 if x_rows <= 8 else 16
    wg = 4 if tiles >= processors // 2 and bm == 8 else 2 if tiles >= 2 else 1
    per = 1 << (groups - 1).bit_length()
    limit = 8 if bm == 8 else 4
    while per > 1 and (per > 2 * limit or (tiles * -(-groups // per) * 4 < processors * 24 and per > 2)):
        per //= 2
    return Decode(wg, bm, per if keep else 0, 4, -(-groups // per))


def run(x: Tensor, weight: Shuffled, bias: Tensor | None, activation: str | None, setting: Decode | Tile) -> Tensor:
    """act(x W^T + bias), x [M, K] -> [M, N] (swiglu: [M, N / 2])."""
    from triton.experimental.gluon import language as gl  # noqa: PLC0415 - Triton is not everywhere
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: PLC0415

    from apt_model.ops.fp4.kernel_decode import decode_kernel  # noqa: PLC0415
    from apt_model.ops.fp4.kernel_tile import tile_kernel  # noqa: PLC0415

    tiles, groups = weight.words.shape[:2]
    while tiles % setting.wg:  # every warpgroup has its 64 rows
        setting = setting._replace(wg=setting.wg // 2)
    if isinstance(setting, Decode):
        setting = _whole_slices(setting, groups)
    described = isinstance(setting, Tile) or setting.kept > 0
    x = _aligned(x) if described else x.contiguous()
    (m, k), index = x.shape, x.device.index
    out = x.new_empty(m, weight.out_features // (2 if weight.gated else 1))
    rows, capability = tiles // setting.wg, _facts(index)[0]
    spots = rows * (-(-m // setting.bm))
    partial = None
    if setting.split > 1:
        partial = x.new_empty(spots * setting.split * setting.wg * 64 * setting.bm, dtype=torch.float32)
    counters = weight.counters if spots <= len(weight.counters) else weight.counters.new_zeros(spots)
    common = {
        "SPLIT": setting.split, "WG": setting.wg, "BM": setting.bm, "AHEAD": setting.ahead, "BLOCK": weight.block,
        "FP16": weight.dtype == torch.float16, "HAS_BIAS": bias is not None, "ACTIVATION": CODES[activation],
        "PDL": capability >= _HOPPER, "launch_pdl": capability >= _HOPPER, "num_warps": 4 * setting.wg,
    }  # fmt: skip
    operands = (weight.words, weight.scales, weight.alpha, bias, out, partial, counters)
    with torch.accelerator.device_index(index):
        if isinstance(setting, Tile):
            shape, layout = [setting.bm, 64 * setting.c], gl.NVMMASharedLayout(128, 16, 2)
            chunks = -(-k // 64)
            steps = -(-chunks // setting.c)
            tile_kernel[(-(-m // setting.bm), rows, setting.split)](
                TensorDescriptor.from_tensor(x, shape, layout), *operands, m, out.shape[1], groups, chunks,
                -(-steps // setting.split), C=setting.c, STAGES=setting.stages, **common,
            )  # fmt: skip
        else:
            source = x
            if setting.kept:
                block, layout = [setting.kept * 4, setting.bm, 64], gl.NVMMASharedLayout(128, 16, 3)
                source = TensorDescriptor(x, [k // 64, m, 64], [64, x.stride(0), 1], block, layout)
            decode_kernel[(rows, setting.split)](
                source, *operands, m, out.shape[1], k, x.stride(0), groups, -(-groups // setting.split),
                KEPT=setting.kept, maxnreg=64 if setting.ahead == 4 else None, **common,
            )  # fmt: skip
    return out


def _whole_slices(setting: Decode, groups: int) -> Decode:
    """No slice of the inputs is empty, and each has as many groups as are loaded ahead, or a multiple."""
    per = -(-groups // setting.split)
    setting = setting._replace(split=-(-groups // per))
    fits = per % (setting.ahead // 4) == 0 and groups % (setting.ahead // 4) == 0
    return setting if fits else setting._replace(ahead=4)


def _aligned(x: Tensor) -> Tensor:
    """X as a tensor descriptor takes it: rows side by side, each at a multiple of 16 bytes, whole chunks wide."""
    pad = -x.shape[1] % 64
    if pad:
        return torch.nn.functional.pad(x, (0, pad))
    if x.stride(1) != 1 or x.stride(0) % 8 or x.stride(0) < x.shape[1] or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x
