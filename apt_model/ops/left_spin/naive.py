"""The definition of left spin in plain torch; every faster form is compared with this one.

Shapes: `u` (the stream) and `delta` (a sublayer's output) are [..., D], any float type; gates and angles are [..., 1].
Norms, gates and the sum are computed in fp32 (fp64 for fp64 input) and rounded once, to the stream's type. A gate is a
function of its own token's vectors alone. Nothing is clamped: a non-finite input stays visible.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def _accumulate(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(x: Tensor) -> Tensor:
    # One pass over x without a wider copy of it; its gradient at x = 0 is 0, where a square root's would be NaN.
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


def _step(u: Tensor, gate: Tensor, v: Tensor) -> Tensor:
    return (_accumulate(u) + gate * _accumulate(v)).to(u.dtype)


def design_gate(
    u: Tensor,
    delta: Tensor,
    previous_delta: Tensor | None,
    previous_phi: Tensor | None,
    *,
    alpha: float,
    tau: float,
    beta: float,
    w1: float,
    w2: float,
) -> tuple[Tensor, Tensor]:
    """Gate and running angle of the design form, both [..., 1].

    The previous values are those of the sublayer before, for the same token in the same forward pass; None at the first
    sublayer of a stack, where the change of step counts as 0 and the running angle starts at 0.
    """
    size = _norm(delta)
    score = w1 * size / (EPS + _norm(u))
    if previous_delta is not None:
        change = _norm(_accumulate(delta) - _accumulate(previous_delta))
        score = score + w2 * change / (EPS + size + _norm(previous_delta))
    phi = beta * alpha * F.softplus(score - tau)
    if previous_phi is not None:
        phi = phi + (1 - beta) * previous_phi
    return torch.rsqrt(1 + phi.square()), phi


def design_step(
    u: Tensor,
    delta: Tensor,
    previous_delta: Tensor | None,
    previous_phi: Tensor | None,
    *,
    alpha: float,
    tau: float,
    beta: float,
    w1: float,
    w2: float,
    detach: bool = True,
) -> tuple[Tensor, Tensor]:
    """Take the step u + g delta with the design gate; returns the new stream and the next sublayer's previous angle."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
        gate, phi = design_gate(u, delta, previous_delta, previous_phi, alpha=alpha, tau=tau, beta=beta, w1=w1, w2=w2)
    return _step(u, gate, delta), phi


def trust_gate(u: Tensor, v: Tensor, *, alpha: float, tau: float = 0.0) -> Tensor:
    """Gate [..., 1] with phi^2 = alpha^2 max(|v|^2 - tau^2 |u|^2, 0) / (|u|^2 + eps D)."""
    stream, excess = _norm(u).square(), _norm(v).square()
    if tau:
        excess = (excess - tau * tau * stream).clamp_min(0)
    return torch.rsqrt(1 + alpha * alpha * excess / (stream + EPS * u.shape[-1]))


def trust_step(u: Tensor, delta: Tensor, scale: Tensor, *, alpha: float, detach: bool = True) -> Tensor:
    """Take the step u + g v with v = scale * delta, scale [D]: a step is shorter than |u| / alpha (up to eps)."""
    v = _accumulate(scale) * delta
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
        gate = trust_gate(u, v, alpha=alpha)
    return _step(u, gate, v)


def guard_step(u: Tensor, delta: Tensor, *, alpha: float, tau: float, detach: bool = True) -> Tensor:
    """Take the step u + g delta; exactly u + delta, bit for bit, for a token whose |delta| <= tau |u|."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
        gate = trust_gate(u, delta, alpha=alpha, tau=tau)
    return _step(u, gate, delta)
