"""What `apt-model plan` prints for people."""

from collections.abc import Mapping

from apt_model.cli import output
from apt_model.vgpu.predict import SLOWER
from apt_model.vgpu.rates import Curve, Rates
from apt_model.vgpu.report import Report
from apt_model.vgpu.units import MB

_COUNTED = {"memory_gbps": "memory traffic", "attention_tflops": "attention", "launch_s": "launches"}


def tell(title: str, made: Report, rates: Rates, least: Mapping[str, int], *, batch: int) -> None:
    """The levels, a row each, and what is to be said of a pass."""
    rows = [
        (
            each["device"], output.size(each["capacity_mb"] * MB), output.size(each["planned_mb"] * MB),
            f"{each['blocks']:,}",
        )
        for each in made.levels
    ]  # fmt: skip
    output.write_table(("level", "capacity", "planned", "blocks"), rows, title)
    streamed = f"{output.size(made.streamed_mb * MB)} a pass through {made.slots} slots"
    output.write_facts([
        ("streamed", streamed if made.streamed_mb else "nothing: all weights stay on the first level"),
        *_times(made, rates, batch),
        ("least", f"--gpu {enough(least['gpu'])} --ram {enough(least['ram'])}"),
    ])  # fmt: skip


def enough(count: int) -> str:
    """Bytes in MB, rounded up, as the options take them."""
    return f"{-(-count // 10**4) / 100:.2f}MB"


def _times(made: Report, rates: Rates, batch: int) -> list[tuple[str, str]]:
    parts = {"compute": made.compute_s, "link": made.link_s, "disk": made.disk_s}
    shown = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in parts.items() if seconds is not None)
    what = f"{made.tokens:,} token{'s'[: made.tokens > 1]}" + (f" in {batch:,} sequences" if batch > 1 else "")
    if made.pass_s is None:
        known = f"; known: {shown}" if shown else ""
        return [("a pass", f"{what}: not predicted, as not all rates are known{known}")]
    facts = [("a pass", f"{what}: {made.pass_s:.3g} s, bound by {made.bound} ({shown})")]
    if made.tokens_for_slow_down is not None:
        said = f"{made.tokens_for_slow_down:,} tokens a pass on, streaming takes at most {SLOWER} of compute"
        facts.append(("from", said))
    left_out = [told for name, told in _COUNTED.items() if getattr(rates, name) is None]
    return [*facts, ("rates", rates.device + (f"; not counted: {', '.join(left_out)}" if left_out else ""))]


def tell_rates(rates: Rates, kept_in: str) -> None:
    """What was measured, and where it is kept."""
    curves: dict[str, Curve] = {**rates.products, **({"4-bit": rates.fp4_products} if rates.fp4_products else {})}
    curves |= {f"{name}, narrow": curve for name, curve in rates.narrow_products.items()}
    counts = sorted({count for curve in curves.values() for count, _ in curve})
    rows = [
        (name, *(output.figure(dict(curve).get(count), ".3g") for count in counts)) for name, curve in curves.items()
    ]
    output.write_table(("TFLOP/s by rows", *(f"{count:,}" for count in counts)), rows, rates.device)
    output.write_facts([
        ("link", f"{output.figure(rates.link_gbps, '.2f')} GB/s"),
        ("disk", f"{output.figure(rates.disk_gbps, '.2f')} GB/s"),
        ("memory", f"{output.figure(rates.memory_gbps, '.1f')} GB/s"),
        ("RMSNorm and rotary", f"{output.figure(rates.chain_gbps, '.1f')} GB/s"),
        ("attention", f"{output.figure(rates.attention_tflops, '.3g')} TFLOP/s"),
        ("launch", f"{_microseconds(rates.launch_s)} us of the host for a kernel"),
        ("hook", f"{_microseconds(rates.hook_s)} us of the host for a streamed block"),
        ("kept in", kept_in),
    ])  # fmt: skip


def _microseconds(seconds: float | None) -> str:
    return output.figure(None if seconds is None else seconds * 1e6, ".1f")
