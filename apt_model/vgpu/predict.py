"""How long a pass takes: what each block computes (`work.py`), run by a clock (`steady.py`). Pure."""

import dataclasses
from collections.abc import Sequence

from apt_model.vgpu import steady
from apt_model.vgpu.layout import Layout
from apt_model.vgpu.planner import DISK
from apt_model.vgpu.rates import Rates
from apt_model.vgpu.steady import Passes, Steady
from apt_model.vgpu.work import Facts, Work, seconds, work_of

SLOWER = 1.15
"""What counts as slowed down."""
_MOST_TOKENS = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of one pass in the middle of others like it; None where a rate is not known."""

    pass_s: float | None
    compute_s: float | None
    """Were all weights on level 1."""
    link_s: float | None
    """In which the link is busy; None also where nothing is streamed."""
    disk_s: float | None
    bound: str | None
    """'compute', 'link' or 'disk': which of the three takes longest."""
    tokens_for_slow_down: int | None
    """Tokens a pass from which streaming takes at most 1.15 of what compute takes; None where nothing waits."""


UNKNOWN = Prediction(
    pass_s=None, compute_s=None, link_s=None, disk_s=None, bound=None, tokens_for_slow_down=None
)  # fmt: skip


class Forecast:
    """Predicts passes of one layout.

    Args:
        layout: what lives where.
        facts: of the model.
        rates: of the machine.
        element: bytes of an activation's element.
    """

    def __init__(self, layout: Layout, facts: Facts, rates: Rates, element: int) -> None:
        self._layout, self._facts, self._rates = layout, facts, rates
        self._works: list[Work] = [work_of(window.node, facts, element) for window in layout.windows]
        plan = layout.plan
        self._on_disk = [home == DISK for home in plan.homes]
        streamed = set(layout.streamed)
        self._needs = [[blob for blob in need if blob in streamed] for need in layout.needs]
        self._uses_disk = any(self._on_disk)
        self._uses_link = any(plan.staging or not self._on_disk[blob] for blob in streamed)

    def predict(self, tokens: int, length: int) -> Prediction:
        """A pass of `tokens` tokens in sequences of `length`."""
        costs = self._costs(tokens, length)
        compute = None if costs is None else self._resident(costs)
        idle = Steady(0.0, 0.0, 0.0)
        lanes = self._run([(0.0, 0.0)] * len(self._works)) if self._lanes_known() else None
        whole = None if costs is None or lanes is None else self._run(costs)
        link_s = self._busy(whole or lanes or idle, "link") if self._uses_link else None
        disk_s = self._busy(whole or lanes or idle, "disk") if self._uses_disk else None
        parts = {"compute": compute, "link": link_s, "disk": disk_s}
        known = compute is not None and lanes is not None
        return Prediction(
            pass_s=whole.pass_s if whole is not None else None,
            compute_s=compute,
            link_s=link_s,
            disk_s=disk_s,
            bound=max(parts, key=lambda name: parts[name] or 0.0) if known else None,
            tokens_for_slow_down=self._enough(length) if known and (link_s or disk_s) else None,
        )

    def _busy(self, run: Steady, lane: str) -> float | None:
        speed = self._rates.link_gbps if lane == "link" else self._rates.disk_gbps
        return None if speed is None else run.link_s if lane == "link" else run.disk_s

    def _lanes_known(self) -> bool:
        link = self._rates.link_gbps is not None or not self._uses_link
        return link and (self._rates.disk_gbps is not None or not self._uses_disk)

    def _costs(self, tokens: int, length: int) -> list[tuple[float, float]] | None:
        found = [seconds(work, tokens, length, self._rates, self._facts.top_k) for work in self._works]
        whole = [each for each in found if each is not None]
        return whole if len(whole) == len(found) else None

    def _resident(self, costs: Sequence[tuple[float, float]]) -> float:
        return self._run(costs, needs=[[]] * len(costs)).pass_s

    def _run(self, costs: Sequence[tuple[float, float]], needs: Sequence[Sequence[int]] | None = None) -> Steady:
        plan, rates = self._layout.plan, self._rates
        return steady.run(
            Passes(
                needs=self._needs if needs is None else needs,
                device_s=[device for device, _ in costs],
                host_s=[host for _, host in costs],
                nbytes=[blob.nbytes for blob in self._layout.blobs],
                on_disk=self._on_disk,
                slots=plan.slots,
                stages=plan.staging,
                link=(rates.link_gbps or 1.0) * 1e9,
                disk=(rates.disk_gbps or 1.0) * 1e9,
                hook_s=rates.hook_s or 0.0,
                serial=rates.kind == "cpu",
            )
        )

    def _enough(self, length: int) -> int | None:
        """The fewest tokens with which a pass takes at most `SLOWER` of compute; None where no number does."""

        def slow(tokens: int) -> bool:
            costs = self._costs(tokens, min(length, tokens))
            assert costs is not None
            return self._run(costs).pass_s > SLOWER * self._resident(costs)

        high = 1
        while slow(high):
            high *= 2
            if high > _MOST_TOKENS:
                return None
        low = high // 2
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if slow(middle) else (low, middle)
        return high
