"""The fused step as a function with a gradient, and the rule that says when it stands in for `naive.py`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apt_model.core.system import cuda
from apt_model.ops import HAS_TRITON
from apt_model.ops.left_spin.naive import EPS

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# One program holds a whole row in registers.
_WIDEST = 16384
# Programs of the gradient, each with a partial sum of the scale's: a few a multiprocessor, fixed so that the order of
# the sum is too.
_PROGRAMS = 512


class Gate(NamedTuple):
    """Which gate, with its numbers; those that a form does not know keep their defaults."""

    design: bool
    alpha: float
    tau: float = 0.0
    beta: float = 1.0
    w1: float = 0.0
    w2: float = 0.0


def applies(u: Tensor, delta: Tensor, *others: Tensor | None, detach: bool) -> bool:
    """Whether the kernel computes this step: plain GPU tensors, the gradient stopped at the gate or not wanted.

    While torch.compile traces, the plain form is better: it is fused with the norm that follows.
    """
    return (
        u.is_cuda
        and HAS_TRITON
        and not torch.compiler.is_compiling()
        and (detach or not torch.is_grad_enabled())
        and u.shape == delta.shape
        and u.numel() > 0
        and u.shape[-1] <= _WIDEST
        and all(x is None or (type(x) in (Tensor, nn.Parameter) and x.dtype in _TYPES) for x in (u, delta, *others))
    )


def step(  # noqa: PLR0917 - the operands of the three forms, in one order
    u: Tensor, delta: Tensor, scale: Tensor | None, before: Tensor | None, phi_before: Tensor | None, gate: Gate
) -> tuple[Tensor, Tensor]:
    """Return u + g v with v = scale * delta, and the angle [..., 1] (of use in the design form alone)."""
    stepped, phi, _ = _Step.apply(u, delta, scale, before, phi_before, gate)  # type: ignore[no-untyped-call]
    return stepped, phi


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd hands the operands over by position
        u: Tensor, delta: Tensor, scale: Tensor | None, before: Tensor | None, phi_before: Tensor | None, gate: Gate
    ) -> tuple[Tensor, Tensor, Tensor]:
        from apt_model.ops.left_spin.kernel import step_kernel  # noqa: PLC0415 - Triton is not everywhere

        width, column = u.shape[-1], (*u.shape[:-1], 1)
        u, delta = u.contiguous(), delta.contiguous()
        scale, before, phi_before = (None if x is None else x.contiguous() for x in (scale, before, phi_before))
        out = torch.empty_like(u)
        gates, phi = (torch.empty(column, device=u.device, dtype=torch.float32) for _ in range(2))
        with cuda.device_index(u.device.index):
            step_kernel[(u.numel() // width,)](
                u, delta, scale, before, phi_before, out, gates, phi, width,
                gate.alpha, gate.tau, gate.beta, gate.w1, gate.w2, EPS,
                DESIGN=gate.design, HAS_SCALE=scale is not None, HAS_BEFORE=before is not None,
                HAS_PHI=phi_before is not None, **_launch(width),
            )  # fmt: skip
        return out, phi, gates

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, delta, scale, *_ = inputs
        _, phi, gates = output
        ctx.mark_non_differentiable(phi, gates)
        ctx.set_materialize_grads(False)
        ctx.delta_dtype = delta.dtype
        ctx.save_for_backward(gates, scale, None if scale is None else delta)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 6
        gates, scale, delta = ctx.saved_tensors
        wants_scale = ctx.needs_input_grad[2]
        return (upstream, *_gradient(upstream, gates, scale, delta, ctx.delta_dtype, wants_scale), None, None, None)


def _gradient(  # noqa: PLR0917 - as they were saved
    upstream: Tensor,
    gates: Tensor,
    scale: Tensor | None,
    delta: Tensor | None,
    dtype: torch.dtype,
    wants_scale: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of delta and of scale."""
    if torch.is_grad_enabled():  # a gradient of this gradient is wanted: operations that have one
        step = gates * upstream
        if scale is None or delta is None:
            return step.to(dtype), None
        return (scale * step).to(dtype), (step * delta).flatten(0, -2).sum(dim=0).to(scale.dtype)
    from apt_model.ops.left_spin.kernel import gradient_kernel  # noqa: PLC0415 - Triton is not everywhere

    upstream, width = upstream.contiguous(), upstream.shape[-1]
    rows = upstream.numel() // width
    grad_delta = torch.empty_like(upstream, dtype=dtype)
    programs = min(rows, _PROGRAMS) if scale is not None else rows
    shares = None if scale is None else torch.empty(programs, width, device=scale.device, dtype=torch.float32)
    delta, scale = (None if x is None else x.contiguous() for x in (delta, scale))
    with cuda.device_index(upstream.device.index):
        gradient_kernel[(programs,)](
            upstream, delta, scale, gates, grad_delta, shares, rows, width,
            HAS_SCALE=scale is not None, **_launch(width),
        )  # fmt: skip
    if shares is None or scale is None or not wants_scale:
        return grad_delta, None
    return grad_delta, shares.sum(dim=0).to(scale.dtype)


def _launch(width: int) -> dict[str, int]:
    block = 1 << max(width - 1, 1).bit_length()
    return {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8}
