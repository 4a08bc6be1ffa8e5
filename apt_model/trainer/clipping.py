"""Three ways to bound gradients, as pure functions of norms: each says by what to multiply, and its next state.

Legend: P trainable parameters, in the model's order. Scalars are tensors of shape []; all is fp32 on the device, and
nothing waits for it. A caller that skips a step keeps the old state instead of the new one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class Clipper(Protocol):
    """What the three have in common."""

    def initial(self, parameters: int, device: torch.device) -> State:
        """The state before the first step; a key that ends in `_P` holds one number a parameter."""
        ...

    def __call__(self, state: State, norms_P: Tensor, norm: Tensor) -> tuple[Tensor, State]:
        """The factor ([] for all gradients, or [P]) and the next state, from the norms of each gradient and of all."""
        ...


@dataclass(frozen=True)
class GlobalClip:
    """The norm of all gradients together is at most `max_norm`; bit for bit `torch.nn.utils.clip_grad_norm_`."""

    max_norm: float

    def initial(self, parameters: int, device: torch.device) -> State:  # noqa: ARG002 - it remembers nothing
        """Nothing."""
        return {}

    def __call__(self, state: State, norms_P: Tensor, norm: Tensor) -> tuple[Tensor, State]:  # noqa: ARG002
        """min(1, max_norm / (norm + 1e-6))."""
        return torch.clamp(self.max_norm / (norm + 1e-6), max=1.0), state


@dataclass(frozen=True)
class AdaGC:
    """Each tensor's norm is at most `ratio` times the running mean of its own clipped norms (arXiv 2502.11034).

    During the warm-up all are clipped by the global norm, and the running value is the least norm seen. Unlike the
    paper's algorithm, a norm of exactly zero teaches nothing: a factor that starts behind a zero factor (a low-rank
    pair, say) has a zero gradient on the first step, and a bound learned from it would hold the tensor at zero for
    good. Until a tensor's first nonzero gradient it is not bounded by itself.
    """

    max_norm: float
    ratio: float = 1.05
    decay: float = 0.98
    warmup: int = 100

    def initial(self, parameters: int, device: torch.device) -> State:
        """No steps, and no bound yet."""
        return {
            "count": torch.zeros((), dtype=torch.int64, device=device),
            "norm_P": torch.full((parameters,), torch.inf, device=device),
        }

    def __call__(self, state: State, norms_P: Tensor, norm: Tensor) -> tuple[Tensor, State]:
        """The factors [P]; the running norms move towards the clipped norms, so that one spike does not lift them."""
        warm, running_P = state["count"] < self.warmup, state["norm_P"]
        together, _ = GlobalClip(self.max_norm)({}, norms_P, norm)
        factor_P = torch.where(warm, together, torch.clamp(self.ratio * running_P / norms_P, max=1.0))
        clipped_P = norms_P * factor_P
        mean_P = self.decay * running_P + (1 - self.decay) * clipped_P
        next_P = torch.where(warm, torch.minimum(running_P, clipped_P), mean_P)
        next_P = torch.where(running_P.isinf(), clipped_P, next_P)
        next_P = torch.where(norms_P > 0, next_P, running_P)
        return factor_P, {"count": state["count"] + 1, "norm_P": next_P}


@dataclass(frozen=True)
class ZClip:
    """A global norm more than `threshold` deviations above its running mean is an outlier (arXiv 2504.02507).

    An outlier with the score z is brought to mean + threshold^2 / z * deviation (the paper's reciprocal clipping), so
    the further out, the nearer to the mean. During the warm-up the mean and the variance of the raw norms are
    gathered, and gradients are clipped globally.
    """

    max_norm: float
    threshold: float = 2.5
    decay: float = 0.97
    warmup: int = 25

    def initial(self, parameters: int, device: torch.device) -> State:  # noqa: ARG002 - one norm for all parameters
        """No steps yet."""
        count = torch.zeros((), dtype=torch.int64, device=device)
        return {"count": count, "mean": torch.zeros((), device=device), "variance": torch.zeros((), device=device)}

    def __call__(self, state: State, norms_P: Tensor, norm: Tensor) -> tuple[Tensor, State]:
        """The factor []; the statistics follow the clipped norm once the warm-up is over."""
        warm, mean = state["count"] < self.warmup, state["mean"]
        together, _ = GlobalClip(self.max_norm)({}, norms_P, norm)
        deviation = state["variance"].sqrt()
        score = (norm - mean) / (deviation + 1e-6)
        bound = mean + self.threshold**2 / score * deviation
        outlier = score > self.threshold
        factor = torch.where(warm, together, torch.where(outlier, bound / norm, 1.0))
        value = torch.where(outlier & ~warm, bound, norm)
        return factor, {"count": state["count"] + 1, **self._statistics(state, value, warm)}

    def _statistics(self, state: State, value: Tensor, warm: Tensor) -> State:
        """Mean and variance with `value` taken in: over all steps while warm (Welford), exponential afterwards."""
        rate = torch.where(warm, 1.0 / (state["count"] + 1), 1 - self.decay)
        away = value - state["mean"]
        mean = state["mean"] + rate * away
        left = value - mean
        square = torch.where(warm, away * left, left * left)
        return {"mean": mean, "variance": state["variance"] + rate * (square - state["variance"])}


def gradient_norms(parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Norm of each gradient [P] (zero where there is none) and of all together [], fp32, on the first's device."""
    device = parameters[0].device
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    zero = torch.zeros((), device=device)
    if not gradients:
        return zero.expand(len(parameters)), zero
    # fp32 whatever the gradients are: a bf16 norm would have 8 bits.
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # noqa: SLF001 - torch has no public name for it
    norms = tuple(norm.to(device) for norm in norms)
    total = torch.linalg.vector_norm(torch.stack(norms))
    waiting = iter(norms)
    return torch.stack([zero if parameter.grad is None else next(waiting) for parameter in parameters]), total


def scale_gradients(parameters: Sequence[nn.Parameter], factor: Tensor) -> None:
    """Multiply the gradients in place by `factor`: [] for all, or [P] for each its own."""
    factors = factor.expand(len(parameters)).unbind()
    pairs = [(p.grad, f) for p, f in zip(parameters, factors, strict=True) if p.grad is not None]
    if factor.ndim:
        torch._foreach_mul_([g for g, _ in pairs], [f.to(g.device) for g, f in pairs])
        return
    for device in {gradient.device for gradient, _ in pairs}:
        here = [gradient for gradient, _ in pairs if gradient.device == device]
        torch._foreach_mul_(here, factor.to(device))
