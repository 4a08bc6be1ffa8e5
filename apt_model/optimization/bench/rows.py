"""What a benchmark finds: rows, each beside the ceiling of what bounds it, and only with numbers that were checked."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from apt_model.core.errors import AptError
from apt_model.core.system.timing import Stopwatch

# Norm of the difference over the norm: a rounding of the operands and one of the result, and of fp32 its sums.
_LARGEST_ERROR = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MEMORY = "memory"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceiling:
    """What a resource gives at most, measured in the same run."""

    unit: str
    """GB/s (10^9 bytes) or TFLOP/s (10^12 operations, a multiplication and an addition being two)."""
    how: str
    """What was measured."""
    rate: float | None = None
    why: str | None = None
    """Why there is no rate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. What was not measured is None, and `why` says the reason."""

    part: Literal["linear", "attention", "link", "disk"]
    what: str
    """What ran: a format of weights, a way to compute, a way to copy."""
    shape: str = ""
    rows: int | None = None
    """Of x, or positions of a sequence."""
    status: Literal["measured", "wrong", "not measured"] = "not measured"
    why: str | None = None
    error: float | None = None
    """Norm of the difference from what was expected over the norm of that; of copies, the share of wrong bytes."""
    seconds: float | None = None
    work: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Bytes, or operations, by the name of the ceiling that they need."""
    rate: float | None = None
    unit: str | None = None
    ceiling: str | None = None
    """The name of the ceiling that bounds it."""
    share: float | None = None
    """Of that ceiling; a copy reads and writes, so that what only reads may come to more than its rate."""
    peer: str | None = None
    """What `speed_up` compares with."""
    speed_up: float | None = None
    """Seconds of the peer over seconds of this."""


Ceilings = Mapping[str, Ceiling]
Told = Callable[[str], object]


class Course(NamedTuple):
    """What every part of a benchmark goes by."""

    watch: Stopwatch
    told: Told = lambda _: None
    """Hears of what is in hand."""


def product_name(dtype: torch.dtype) -> str:
    """The name of the ceiling of products in `dtype`."""
    return f"product {NAMES[dtype]}"


def limit_of(dtype: torch.dtype) -> float:
    """Largest error that rounding in `dtype` explains."""
    return _LARGEST_ERROR[dtype]


def squares(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """Sums of squares, of the difference and of what was expected."""
    expected = expected.float()
    return float((got.float() - expected).square().sum()), float(expected.square().sum())


def random_bytes(count: int) -> Tensor:
    """[count] uint8 on the CPU, drawn eight at a time."""
    return torch.randint(-(2**63), 2**63 - 1, (-(-count // 8),)).view(torch.uint8)[:count]


def wrong_share(got: Tensor, expected: Tensor) -> float:
    """Of bytes that are others than was expected."""
    return 0.0 if torch.equal(got, expected) else float((got != expected).sum()) / expected.numel()


def ratio(differing: float, expected: float) -> float:
    """The error of two sums of squares; infinite where there is no number."""
    found = (differing / expected) ** 0.5 if expected else 0.0 if differing == 0 else float("inf")
    return found if found == found else float("inf")  # noqa: PLR0124 - of NaN


def checked(row: Row, error: Callable[[], float], limit: float, seconds: Callable[[], float]) -> Row:
    """The row with its time, which is taken once the numbers are right; else with the reason that there is none."""
    try:
        found = error()
        if not found <= limit:
            why = f"wrong: {found:.1e} off what was expected, where rounding explains {limit:.0e}"
            return dataclasses.replace(row, status="wrong", error=found, why=why)
        return dataclasses.replace(row, status="measured", error=found, seconds=seconds())
    except Exception as problem:  # noqa: BLE001 - of the compiler, the driver, memory, the disk: the row says so
        return failed(row, problem)


def failed(row: Row, problem: BaseException) -> Row:
    """The row with what went wrong for a reason."""
    return dataclasses.replace(row, status="not measured", why=reason(problem))


def reason(problem: BaseException) -> str:
    """An exception in a line."""
    said = problem.message if isinstance(problem, AptError) else f"{type(problem).__name__}: {problem}"
    return said.partition("\n")[0][:300]


def beside(row: Row, ceilings: Ceilings) -> Row:
    """The row beside the ceiling that takes longest for its work; unchanged without a time, or a ceiling's rate."""
    if row.seconds is None:
        return row
    least = {name: amount / rate / _SCALE[ceilings[name].unit] for name, amount in row.work.items()
             if name in ceilings and (rate := ceilings[name].rate)}  # fmt: skip
    if not least:
        return row
    bound = max(least, key=lambda name: least[name])
    unit = ceilings[bound].unit
    rate = row.work[bound] / row.seconds / _SCALE[unit]
    return dataclasses.replace(row, rate=rate, unit=unit, ceiling=bound, share=least[bound] / row.seconds)


_SCALE = {"GB/s": 1e9, "TFLOP/s": 1e12}


def beside_peer(row: Row, peer: Row | None) -> Row:
    """The row with its speed over a peer that was measured."""
    if peer is None or peer.seconds is None or row.seconds is None:
        return row
    return dataclasses.replace(row, peer=peer.what, speed_up=peer.seconds / row.seconds)
