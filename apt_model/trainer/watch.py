"""Watches a run's loss and gradients for divergence, without making the device wait at every step."""

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apt_model.core.errors import DivergenceError
from apt_model.trainer.config import TrainConfig
from apt_model.trainer.gradients import GradientReport

_SMOOTHING, _UPHILL_STEPS = 0.98, 50


class Step(NamedTuple):
    """What an optimizer step came to; the tensors are still on the device."""

    loss: Tensor
    """Nats a token, a scalar."""
    report: GradientReport
    tokens: int
    """Positions that the model read, padding included."""


class Watch:
    """Keeps an eye on loss and gradients; reads the device only when asked for a row."""

    def __init__(self, config: TrainConfig) -> None:
        self.skipped = 0
        self._config = config
        self._pending: list[Tensor] = []
        self._losses: list[float] = []  # since the last row, without skipped steps
        self._smooth: float | None = None
        self._best, self._uphill, self._skipped_in_a_row = float("inf"), 0, 0
        self._loss = self._norm = float("nan")
        self._fault: str | None = None
        self._restart_clock()

    def add(self, step: Step) -> None:
        """Note a step; nothing is read yet."""
        self._pending.append(torch.stack([step.loss, step.report.norm, step.report.found_inf]))
        self._tokens += step.tokens

    def leave_out(self, seconds: float) -> None:
        """Do not count so much of the time since the last row: it went into something else than steps."""
        self._since += seconds

    def _restart_clock(self) -> None:
        self._since, self._tokens = time.monotonic(), 0

    def _drain(self) -> None:
        rows: list[list[float]] = torch.stack(self._pending).tolist() if self._pending else []
        self._pending.clear()
        for loss, norm, found_inf in rows:
            self._see(loss, norm, bool(found_inf))

    def _see(self, loss: float, norm: float, skipped: bool) -> None:
        self._loss, self._norm = loss, norm
        self.skipped += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row >= self._config.max_skipped:
            self._fault = f"{self._skipped_in_a_row} steps in a row had gradients that were not finite"
        if skipped:
            return
        self._losses.append(loss)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._fault = f"the loss was {loss} and the gradient's norm {norm}, and nothing guarded the weights"
            return
        self._smooth = loss if self._smooth is None else _SMOOTHING * self._smooth + (1 - _SMOOTHING) * loss
        self._best = min(self._best, self._smooth)
        self._uphill = self._uphill + 1 if self._smooth > self._best + self._config.divergence_margin else 0
        if self._uphill >= _UPHILL_STEPS:
            self._fault = (
                f"the smoothed loss has been {self._smooth - self._best:.2f} nats above its best ({self._best:.3f}) "
                f"for {self._uphill} steps"
            )

    def row(self) -> dict[str, Any]:
        """Figures of the steps since the last row: mean loss, last gradient norm, skipped steps so far, pace."""
        self._drain()
        losses, self._losses = self._losses or [self._loss], []
        tokens, seconds = self._tokens, time.monotonic() - self._since
        self._restart_clock()
        return {
            "loss": sum(losses) / len(losses), "grad_norm": self._norm, "skipped": self.skipped,
            "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / max(seconds, 1e-9),
        }  # fmt: skip

    def check(self) -> None:
        """Raise `DivergenceError` when training has gone wrong."""
        self._drain()
        if self._fault is not None:
            raise DivergenceError(
                f"training diverged: {self._fault}",
                state=f"no checkpoint of it was saved; those in {self._config.out}, if any, are from before",
                remedy=f"a lower --optimizer.lr (it was {self._config.optimizer.lr:g}), or a longer "
                f"--optimizer.warmup-steps (it was {self._config.optimizer.warmup_steps})",
            )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to judge as this one would."""
        best = None if self._best == float("inf") else self._best
        return {
            "smooth": self._smooth, "best": best, "uphill": self._uphill,
            "skipped": self.skipped, "skipped_in_a_row": self._skipped_in_a_row, "losses": self._losses,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._smooth, self._uphill = state["smooth"], state["uphill"]
        self._best = float("inf") if state["best"] is None else state["best"]
        self.skipped, self._skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self._losses = list(state["losses"])
