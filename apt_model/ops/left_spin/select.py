"""The three steps with the signatures of `naive.py`: one fused launch where that applies, the definition elsewhere."""

from torch import Tensor

from apt_model.ops.left_spin import fused, naive


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
    if fused.applies(u, delta, previous_delta, previous_phi, detach=detach):
        gate = fused.Gate(design=True, alpha=alpha, tau=tau, beta=beta, w1=w1, w2=w2)
        return fused.step(u, delta, None, previous_delta, previous_phi, gate)
    options = {"alpha": alpha, "tau": tau, "beta": beta, "w1": w1, "w2": w2}
    return naive.design_step(u, delta, previous_delta, previous_phi, **options, detach=detach)


def trust_step(u: Tensor, delta: Tensor, scale: Tensor, *, alpha: float, detach: bool = True) -> Tensor:
    """Take the step u + g v with v = scale * delta, scale [D]: a step is shorter than |u| / alpha (up to eps)."""
    if fused.applies(u, delta, scale, detach=detach):
        return fused.step(u, delta, scale, None, None, fused.Gate(design=False, alpha=alpha))[0]
    return naive.trust_step(u, delta, scale, alpha=alpha, detach=detach)


def guard_step(u: Tensor, delta: Tensor, *, alpha: float, tau: float, detach: bool = True) -> Tensor:
    """Take the step u + g delta; exactly u + delta, bit for bit, for a token whose |delta| <= tau |u|."""
    if fused.applies(u, delta, detach=detach):
        return fused.step(u, delta, None, None, None, fused.Gate(design=False, alpha=alpha, tau=tau))[0]
    return naive.guard_step(u, delta, alpha=alpha, tau=tau, detach=detach)
