"""Launches measured on this machine: which are tried, how they are timed, and what is taken from then on.

What is found lasts beyond the process (`core/system/measurements.py`), and `launch.py` asks here before anything else.
"""

import functools
import itertools
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apt_model.core.options import require
from apt_model.core.system import measurements
from apt_model.core.system.cuda import CudaDevice
from apt_model.core.system.measurements import Entries, Machine
from apt_model.ops.fp4 import launch, select, slab
from apt_model.ops.fp4.format import Format
from apt_model.ops.fp4.layout import Shuffled
from apt_model.ops.fp4.tables import Decode, Tile

LOG = logging.getLogger(__name__)
# None: slabs of the weight, unpacked for torch's own product.
Setting = Decode | Tile | None
# Launches that are tried for a shape and number of rows; each is compiled, which takes longer than to time it.
MOST_TRIED = 24
# Norm of the difference over the norm, from the definition in the type of x.
LARGEST_ERROR = 5e-3
# Bytes of shared memory that a program may take on Hopper.
_MOST_SHARED = 226_000
# Copies of the weight that take turns are so many times as large as the cache, unless that takes too many.
_CACHES, _MOST_COPIES = 4, 512


class Measured(NamedTuple):
    """The fastest launch for up to `rows` rows of x, and the one that would have been taken; None is slabs."""

    rows: int
    setting: Setting
    microseconds: float
    before: Setting
    before_microseconds: float | None  # None: it fails on this machine


def candidates(rows: int, out_features: int, in_features: int, hopper: bool, processors: int) -> list[Decode | Tile]:
    """Launches that may be the best for up to `rows` rows of x on a GPU with so many multiprocessors."""
    shape = (rows, out_features, in_features)
    found: list[Decode | Tile] = list(_decodes(*shape, hopper, processors)) if rows <= launch.FEW else []
    return [*found, *_tiles(*shape, processors)] if hopper else found


def _decodes(rows: int, out_features: int, in_features: int, hopper: bool, processors: int) -> list[Decode]:
    """With x in shared memory where that is possible, else read where it is needed."""
    tiles, groups = -(-out_features // 64), -(-in_features // 256)
    bm = 8 if rows <= 8 else 16
    keep = hopper and in_features % 64 == 0
    pieces = sorted({-(-groups // split) for split in range(1, 17)})
    least = min(processors * 8, tiles * min(groups, 16) * 2)  # warps; a small weight cannot fill the GPU
    found = []
    for (wg, rep), per, ahead in itertools.product(((1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (8, 2)), pieces, (4, 8)):
        split = -(-groups // per)
        kept = 1 << (per - 1).bit_length() if keep else 0
        warps = tiles * split * 4 // rep
        if rep * ahead > 8 or tiles % wg or (ahead == 8 and (per % 2 or groups % 2)):
            continue
        if bm * 512 * kept <= _MOST_SHARED * 3 // 5 and least // rep <= warps <= processors * 96 // rep:
            found.append(Decode(wg, bm, kept, ahead, split, rep))
    return found


def _tiles(rows: int, out_features: int, in_features: int, processors: int) -> list[Tile]:
    tiles, chunks = -(-out_features // 64), -(-in_features // 64)
    found = []
    for wg, bm, c, stages, split in itertools.product(
        (1, 2, 4), (8, 16, 32, 64, 128, 256), (2, 4, 8, 16), (2, 3, 4), (1, 2, 3, 4, 6, 8)
    ):
        steps = -(-chunks // c)
        per = -(-steps // split)
        programs = -(-rows // bm) * (tiles // wg) * split
        shared = (bm * 128 + wg * 2304) * c * stages
        if tiles % wg or wg * bm > 512 or (wg, bm) == (1, 256) or shared > _MOST_SHARED:
            continue
        if (
            not (bm >= 128 or rows <= bm)
            or bm >= 2 * max(rows, 5)
            or not 32 <= c * bm <= 512
            or (c == 16 and bm > 16)
            or (c < 4 and bm < 64)
        ):
            continue
        if -(-steps // per) != split or stages > max(per + 1, 2):
            continue
        if programs < min(processors * 2 // 3, tiles // wg * 2) or (split > 1 and programs * wg > processors * 8):
            continue
        found.append(Tile(wg, bm, c, stages, split))
    return found


# What is remembered.


def find(  # noqa: PLR0917 - they are what it is remembered by
    bucket: int, out_features: int, in_features: int, form: Format, device: torch.device, dtype: torch.dtype
) -> launch.Choice | None:  # fmt: skip
    """What was measured best on this machine, or None where nothing was."""
    name = _name(bucket, out_features, in_features, form, dtype)
    entry = _known(_machine(device.index)).get(name)
    if entry is None:
        return None
    written = {field: value for field, value in entry.items() if field != "microseconds"}
    for setting in (*_offered(bucket, out_features, in_features, device), None):
        if written == _written(setting):
            return launch.Choice(setting, launch.MEASURED)
    # Only what this version may try itself is launched: a wrong number could read beyond the weight.
    measurements.say_once(f"measured launches: expected one that is tried for {name}, got {written}; it is ignored")
    return None


def forget() -> None:
    """Read what is kept anew."""
    _known.cache_clear()
    launch.forget()


@functools.cache
def _known(machine: Machine) -> Entries:
    return measurements.load(machine)


@functools.cache
def _machine(index: int | None) -> Machine:
    import triton  # noqa: PLC0415 - Triton is not everywhere

    device = CudaDevice(index)
    return Machine(device.name(), ".".join(map(str, device.compute_capability())), triton.__version__)


def _offered(bucket: int, out_features: int, in_features: int, device: torch.device) -> list[Setting]:
    """What the package takes unmeasured, and all that is tried."""
    tried = candidates(bucket, out_features, in_features, launch.is_hopper(device), launch.facts(device.index)[1])
    return [launch.shipped(bucket, out_features, in_features, device).setting, *tried]


def _name(bucket: int, out_features: int, in_features: int, form: Format, dtype: torch.dtype) -> str:
    return f"{out_features} x {in_features}, block {form.block}, {str(dtype).partition('.')[2]}, {bucket} rows"


def _written(setting: Setting) -> dict[str, Any]:
    if setting is None:
        return {"launch": "slabs"}
    return {"launch": type(setting).__name__.lower(), **setting._asdict()}


# Measuring.


def measure(weight: Shuffled, rows: Sequence[int]) -> list[Measured]:
    """Time launches for x of so many rows, once for each bucket of rows; the fastest are taken from then on.

    One that fails, or is further from the definition than rounding explains, is left out. Slabs are always tried.
    """
    check_rows(rows, "measure")
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        copies = _copies(weight)
        counts = {launch.bucket_of(count): count for count in sorted(rows)}
        found = [each for bucket, count in counts.items() if (each := _best(bucket, count, copies)) is not None]
    shape = (weight.out_features, weight.in_features)
    entries = {
        _name(each.rows, *shape, weight.format, weight.dtype): {
            **_written(each.setting), "microseconds": round(each.microseconds, 3),
        }
        for each in found
    }  # fmt: skip
    machine = _machine(weight.device.index)
    known = _known(machine)
    known.update({**measurements.keep(machine, entries), **entries})
    launch.forget()
    return found


def check_rows(rows: Sequence[int], where: str) -> None:
    """Raise `ConfigError` unless these are numbers of rows for which there is a launch to choose."""
    good = len(rows) > 0 and all(type(count) is int and 0 < count <= launch.MOST_ROWS for count in rows)
    require(good, f"{where}.rows", f"numbers from 1 to {launch.MOST_ROWS}", tuple(rows))


def _best(bucket: int, count: int, copies: list[Shuffled]) -> Measured | None:
    weight = copies[0]
    device, width = weight.device, weight.in_features
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(count, width, device=device, generator=draw).to(weight.dtype)
    expected = select.definition(x, weight, None, "swiglu" if weight.gated else None).float()
    before = launch.choose(count, weight, weight.dtype)
    usual, *tried = _offered(bucket, weight.out_features, width, device)
    if len(tried) > MOST_TRIED:
        tried = random.Random(0).sample(tried, MOST_TRIED)
    times: dict[Setting, float] = {}
    for setting in dict.fromkeys((before, usual, None, *tried)):
        microseconds = _microseconds(setting, x, copies, expected)
        if microseconds is not None:
            times[setting] = microseconds
    if not times:
        return None
    best = min(times, key=lambda setting: times[setting])
    LOG.info("%d rows: %s, %.1f us, the best of %d", bucket, best or "slabs", times[best], len(times))
    return Measured(bucket, best, times[best], before, times.get(before))


def _microseconds(setting: Setting, x: Tensor, copies: list[Shuffled], expected: Tensor) -> float | None:
    """Time of one product on the GPU, or None where the launch is of no use, which the log then has."""
    try:
        out = _product(x, copies[0], setting).float()
        error = float((out - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
        if not error < LARGEST_ERROR:
            LOG.warning("%s is left out: %.1e off the definition for %d rows", setting or "slabs", error, len(x))
            return None
        return _seconds(lambda: [_product(x, each, setting) for each in copies], x.device) * 1e6 / len(copies)
    except Exception as problem:  # noqa: BLE001 - of the compiler, the driver or memory: it does not fit this machine
        reason = f"{type(problem).__name__}: {problem}".partition("\n")[0]
        LOG.info("%s is left out: it fails for %d rows: %s", setting or "slabs", len(x), reason)
        return None


def _product(x: Tensor, weight: Shuffled, setting: Setting) -> Tensor:
    activation = "swiglu" if weight.gated else None
    if setting is None:
        return slab.linear(x, weight, None, activation)
    return launch.run(x, weight, None, activation, setting)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    return CudaDevice(device.index).seconds(work)


def _copies(weight: Shuffled) -> list[Shuffled]:
    """The weight and copies, so that the GPU's cache holds none when its turn comes; in half of what is free."""
    device = CudaDevice(weight.device.index)
    held = weight.words.nbytes + weight.scales.nbytes
    count = max(2, -(-_CACHES * device.cache_bytes() // held))
    count = max(1, min(count, _MOST_COPIES, device.free_memory() // 2 // held))
    clones = ((weight.words.clone(), weight.scales.clone()) for _ in range(count - 1))
    return [weight, *(weight._replace(words=words, scales=scales) for words, scales in clones)]
