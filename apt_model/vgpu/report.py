"""What a stack would do with a model: what lives where, how long a pass takes, and what bounds it. Pure."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from apt_model.vgpu.layout import Layout
from apt_model.vgpu.policy import CYCLIC
from apt_model.vgpu.predict import SLOWER, UNKNOWN, Forecast, Prediction
from apt_model.vgpu.rates import Rates
from apt_model.vgpu.units import MB
from apt_model.vgpu.work import Facts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Prediction):
    """A plan, and its prediction."""

    levels: list[dict[str, Any]]
    """Of each: device, capacity_mb, planned_mb, and how many blocks live there."""
    slots: int
    streamed_mb: float
    tokens: int
    foreseen: bool = True
    """Whether blocks come in an order that repeats; else no time can be said."""

    def __str__(self) -> str:
        lines = [f"{'level':<8} {'capacity MB':>12} {'planned MB':>12} {'blocks':>7}"]
        lines += [
            f"{each['device']:<8} {each['capacity_mb']:>12,.1f} {each['planned_mb']:>12,.1f} {each['blocks']:>7}"
            for each in self.levels
        ]
        lines.append(
            f"{self.streamed_mb:,.1f} MB {'a pass' if self.foreseen else 'at most'} through {self.slots} slots"
        )
        parts = {"compute": self.compute_s, "link": self.link_s, "disk": self.disk_s}
        shown = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in parts.items() if seconds is not None)
        if not self.foreseen:
            lines.append("blocks come in an order that is not known: no time is said")
        elif self.pass_s is None:
            lines.append(f"{self.tokens} tokens: not all rates are known ({shown or 'none'})")
        else:
            lines.append(f"{self.tokens} tokens: {self.pass_s:.3g} s a pass, bound by {self.bound} ({shown})")
        if self.tokens_for_slow_down is not None:
            lines.append(f"within {SLOWER} of compute alone from {self.tokens_for_slow_down} tokens a pass on")
        return "\n".join(lines)


def report(
    layout: Layout, levels: Sequence[tuple[str, int] | None], facts: Facts, rates: Rates, *, tokens: int, length: int,
    element: int,
) -> Report:  # fmt: skip
    """What `layout` means on these levels.

    Args:
        layout: of a model.
        levels: the name and the capacity (bytes) of the device, the host and the disk; None where there is none.
        facts: what the model's configuration tells.
        rates: of the machine.
        tokens: of a pass.
        length: of its sequences.
        element: bytes of an activation's element.
    """
    plan = layout.plan
    planned = (plan.device_bytes, plan.host_bytes, plan.disk_bytes)
    rows = [
        {
            "device": level[0],
            "capacity_mb": level[1] / MB,
            "planned_mb": planned[number] / MB,
            "blocks": sum(1 for home in plan.homes if home == number),
        }
        for number, level in enumerate(levels)
        if level is not None
    ]
    foreseen = layout.policy == CYCLIC  # else how many blocks come from below depends on what is asked for
    said = Forecast(layout, facts, rates, element).predict(tokens, length) if foreseen else UNKNOWN
    return Report(
        levels=rows,
        slots=plan.slots,
        streamed_mb=plan.streamed_bytes / MB,
        tokens=tokens,
        foreseen=foreseen,
        **dataclasses.asdict(said),
    )
