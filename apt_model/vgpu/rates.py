"""What a machine does in a second, as far as it was measured or is believed; kept as JSON. Pure.

`apt-model plan --measure` makes them (`measure.py`) and keeps them in the user's cache folder.
"""

import dataclasses
import itertools
import json
import math
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt_model.core import env
from apt_model.core.errors import ConfigError
from apt_model.core.files import write_text
from apt_model.core.options import require, unknown_name
from apt_model.core.system.measurements import caches

# By rows of x, in rising order: TFLOP/s.
Curve = tuple[tuple[int, float], ...]
FP4 = "FP4"
ANY = "any"
"""The entry of `Rates.products` that is true for every type."""
UNKNOWN = "unknown"
"""The type of weights that others have quantised, of which nothing is known."""
VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one machine; None, or empty: not known, and nothing that needs it is predicted."""

    device: str = "given"
    """What they were measured on."""
    kind: str = "gpu"
    """'gpu', or 'cpu', whose copies and products take turns."""
    link_gbps: float | None = None
    """From host memory to level 1, GB/s."""
    disk_gbps: float | None = None
    """From the disk to host memory, GB/s."""
    memory_gbps: float | None = None
    """Of level 1's memory, read and written, GB/s."""
    chain_gbps: float | None = None
    """Of elementwise kernels in a row that convert and reduce (RMSNorm, rotary embeddings), GB/s; None: as memory."""
    products: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    """Of a linear layer, by its type ('BF16')."""
    fp4_products: Curve = ()
    """Of a linear layer with 4-bit weights."""
    narrow_products: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    """Of a layer of fewer elements, by type, `FP4` for 4-bit weights; between both on the line, in logarithms."""
    numels: tuple[int, int] | None = None
    """Elements of the layers that `narrow_products` and `products` are of."""
    attention_tflops: float | None = None
    """Of scaled dot product attention that is not causal."""
    launch_s: float | None = None
    """Seconds of the host for one kernel and the Python around it."""
    hook_s: float | None = None
    """Seconds of the host for having one block's weights in their place."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first value that is none."""
        require(self.kind in ("gpu", "cpu"), "rates: kind", "'gpu' or 'cpu'", self.kind)
        for name in ("link_gbps", "disk_gbps", "memory_gbps", "chain_gbps", "attention_tflops", "launch_s", "hook_s"):
            value = getattr(self, name)
            least = "a number above 0" if name != "hook_s" else "a number from 0 on"
            require(
                value is None or _is_rate(value, zero=name == "hook_s"), f"rates: {name}", f"{least} or null", value
            )
        for name, curve in (*self.products.items(), *self.narrow_products.items(), ("fp4_products", self.fp4_products)):
            require(_is_curve(curve), f"rates: {name}", "pairs of rows, rising, and TFLOP/s above 0", curve)

    def product_s(self, rows: float, numel: int, dtype: str, *, fp4: bool) -> float | None:
        """Seconds of a product of `rows` rows with a weight of `numel` elements."""
        if dtype == UNKNOWN:
            return None
        curve = self.fp4_products if fp4 else self.products.get(dtype) or self.products.get(ANY, ())
        if not curve:
            return None
        rate, narrow = at(curve, rows), self.narrow_products.get(FP4 if fp4 else dtype)
        if narrow and self.numels:
            low, high = self.numels
            share = min(1.0, max(0.0, math.log(numel / low) / math.log(high / low)))
            rate = at(narrow, rows) ** (1 - share) * rate**share
        return 2 * numel * rows / (rate * 1e12)

    def to_json(self) -> str:
        """As `read` takes it."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"


def at(curve: Curve, rows: float) -> float:
    """The rate at so many rows: between two that were measured on the line through both, in logarithms."""
    for (low, slow), (high, fast) in itertools.pairwise(curve):
        if low <= rows <= high:
            share = math.log(rows / low) / math.log(high / low)
            return slow * (fast / slow) ** share
    return curve[0][1] if rows < curve[0][0] else curve[-1][1]


def read(path: Path) -> Rates:
    """Rates of a file; `ConfigError` says what is wrong with it."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} holds no rates: {error}", remedy="apt-model plan --measure makes some") from error
    require(isinstance(held, dict), str(path), "a JSON object of rates", type(held).__name__)
    version = held.pop("version", VERSION)
    require(version == VERSION, f"{path}: version", str(VERSION), version, "apt-model plan --measure makes it anew")
    known = {field.name for field in dataclasses.fields(Rates)}
    for name in held:
        if name not in known:
            raise unknown_name(name, known, str(path))
    try:
        held["products"] = {name: _curve(each) for name, each in held.get("products", {}).items()}
        held["narrow_products"] = {name: _curve(each) for name, each in held.get("narrow_products", {}).items()}
        held["fp4_products"] = _curve(held.get("fp4_products", ()))
        held["numels"] = _numels(held.get("numels"))
        return Rates(**held)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{path} holds no rates: {error}", remedy="apt-model plan --measure makes some") from error


def kept_file(kind: str) -> Path:
    """Where this machine's rates are kept."""
    asked = env.PLAN_CACHE.get()
    folder = caches() / "plan" if asked is None else Path(asked).expanduser()
    return folder / f"rates-{re.sub(r'[^a-z0-9.]+', '-', platform.node().lower()) or 'here'}-{kind}.json"


def kept(kind: str) -> Rates | None:
    """What `--measure` has left here, if anything."""
    path = kept_file(kind)
    return read(path) if path.is_file() else None


def keep(rates: Rates, path: Path | None = None) -> Path:
    """Write rates, by default where `kept` finds them; returns where."""
    path = path or kept_file(rates.kind)
    write_text(path, rates.to_json())
    return path


def _numels(values: Any) -> tuple[int, int] | None:
    if values is None:
        return None
    low, high = values
    right = isinstance(low, int) and isinstance(high, int) and 0 < low < high
    require(right, "rates: numels", "two whole numbers above 0, rising, or null", values)
    return low, high


def _curve(values: Any) -> Curve:
    return tuple((rows, rate) for rows, rate in values)


def _is_rate(value: object, *, zero: bool = False) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return number and (value > 0 or (zero and value == 0))  # type: ignore[operator]


def _is_curve(curve: Curve) -> bool:
    rows = [pair[0] for pair in curve]
    return all(map(_is_rate, (each for pair in curve for each in pair))) and rows == sorted(set(rows))
