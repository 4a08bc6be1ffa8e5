"""Residual connections: plain, and with the left-spin gate."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from apt_model.core.options import require
from apt_model.ops.left_spin import design_step, guard_step, trust_step


class LeftSpinState(NamedTuple):
    """What a sublayer hands to the next one of the same stack, for the same tokens: its step and the running angle.

    It is an input and an output of every block, never kept by a module: so checkpointing, pipelines and decoding see
    the same function.
    """

    delta: Tensor  # [..., D]
    phi: Tensor  # [..., 1]


class PlainResidual(nn.Module):
    """u + delta, with the signature of `LeftSpinResidual`."""

    def forward(
        self, u: Tensor, delta: Tensor, state: LeftSpinState | None = None
    ) -> tuple[Tensor, LeftSpinState | None]:
        """`u` and `delta` [..., D] -> (u + delta in the type of `u`, `state` untouched)."""
        return (u + delta).to(u.dtype), state


class LeftSpinResidual(nn.Module):
    """A residual whose step is gated by its size relative to the stream: u + g(u, delta) delta.

    Usable in any model: `u, state = residual(u, sublayer(norm(u)), state)`, with `state=None` at the first sublayer.

    Args:
        dim: width D of the stream.
        mode: "design" (stateful along depth), "trust" (learned per-channel branch scale, no state) or "guard" (plain
            residual up to `tau`, no parameters, no state).
        alpha: strength of the gate; in trust and guard a step is shorter than |u| / alpha (guard: alpha <= 1 / tau).
        tau: threshold on |delta| / |u| (design, guard).
        beta, w1, w2: inertia and score weights (design).
        detach: stop the gradient at the gate.
        num_sublayers: residuals in the stack; the branch scale of trust starts at 1 / sqrt(num_sublayers).
    """

    def __init__(
        self,
        dim: int,
        *,
        mode: Literal["design", "trust", "guard"] = "design",
        alpha: float = 0.5,
        tau: float = 0.3,
        beta: float = 0.7,
        w1: float = 1.0,
        w2: float = 0.5,
        detach: bool = True,
        num_sublayers: int = 1,
    ) -> None:
        super().__init__()
        require(mode in ("design", "trust", "guard"), "LeftSpinResidual.mode", "design, trust or guard", mode)
        require(alpha > 0, "LeftSpinResidual.alpha", "above 0", alpha)
        require(0 < beta <= 1, "LeftSpinResidual.beta", "0 < beta <= 1", beta)
        if mode == "guard":
            require(tau > 0, "LeftSpinResidual.tau", "a threshold above 0 in guard mode", tau)
            require(alpha <= 1 / tau, "LeftSpinResidual.alpha", f"at most 1 / tau = {1 / tau:g} in guard mode", alpha)
        self.dim, self.mode, self.detach = dim, mode, detach
        self.alpha, self.tau, self.beta, self.w1, self.w2 = alpha, tau, beta, w1, w2
        self.num_sublayers = num_sublayers
        self.scale = nn.Parameter(torch.empty(dim)) if mode == "trust" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the branch scale of trust mode to 1 / sqrt(num_sublayers)."""
        if self.scale is not None:
            nn.init.constant_(self.scale, self.num_sublayers**-0.5)

    def forward(
        self, u: Tensor, delta: Tensor, state: LeftSpinState | None = None
    ) -> tuple[Tensor, LeftSpinState | None]:
        """`u` and `delta` [..., D] -> (new stream in the type of `u`, state for the next sublayer)."""
        if self.scale is not None:
            return trust_step(u, delta, self.scale, alpha=self.alpha, detach=self.detach), None
        if self.mode == "guard":
            return guard_step(u, delta, alpha=self.alpha, tau=self.tau, detach=self.detach), None
        previous_delta, previous_phi = state if state is not None else (None, None)
        u_next, phi = design_step(
            u,
            delta,
            previous_delta,
            previous_phi,
            alpha=self.alpha,
            tau=self.tau,
            beta=self.beta,
            w1=self.w1,
            w2=self.w2,
            detach=self.detach,
        )
        return u_next, LeftSpinState(delta.detach() if self.detach else delta, phi)

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return f"{self.dim}, mode={self.mode!r}, alpha={self.alpha:g}, tau={self.tau:g}, detach={self.detach}"
