"""One launch a step on a GPU: the maths of `naive.py` with the gradient stopped at the gate.

A program holds one row in registers, so a step reads each operand once. Needs Triton; `fused.py` says when it is used.
"""

# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
import triton
import triton.language as tl


@triton.jit
def _softplus(x):
    large = x > 20
    return tl.where(large, x, tl.log(1 + tl.exp(tl.where(large, 0.0, x))))


@triton.jit
def step_kernel(
    u_ptr,
    delta_ptr,
    scale_ptr,
    before_ptr,
    phi_before_ptr,
    out_ptr,
    gate_ptr,
    phi_ptr,
    width,
    alpha,
    tau,
    beta,
    w1,
    w2,
    eps,
    DESIGN: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_PHI: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row `program_id(0)` of out = u + g v, v = scale * delta; the gate, and in design the angle, to their columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    u = tl.load(u_ptr + at, mask=inside, other=0).to(tl.float32)  # [BLOCK]
    v = tl.load(delta_ptr + at, mask=inside, other=0).to(tl.float32)
    if HAS_SCALE:
        v *= tl.load(scale_ptr + column, mask=inside, other=0).to(tl.float32)
    stream, step = tl.sum(u * u), tl.sum(v * v)
    if DESIGN:
        size = tl.sqrt_rn(step)
        score = w1 * size / (eps + tl.sqrt_rn(stream))
        if HAS_BEFORE:
            before = tl.load(before_ptr + at, mask=inside, other=0).to(tl.float32)
            change = v - before
            score += w2 * tl.sqrt_rn(tl.sum(change * change)) / (eps + size + tl.sqrt_rn(tl.sum(before * before)))
        phi = beta * alpha * _softplus(score - tau)
        if HAS_PHI:
            phi += (1 - beta) * tl.load(phi_before_ptr + row)
        tl.store(phi_ptr + row, phi)
        squared = phi * phi
    else:
        excess = step - tau * tau * stream
        excess = tl.where(excess < 0, 0.0, excess)  # keeps a NaN, as a maximum would not
        squared = alpha * alpha * excess / (stream + eps * width)
    gate = tl.rsqrt(1 + squared)
    tl.store(gate_ptr + row, gate)
    tl.store(out_ptr + at, (u + gate * v).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_kernel(
    upstream_ptr,
    delta_ptr,
    scale_ptr,
    gate_ptr,
    grad_delta_ptr,
    grad_scale_ptr,
    rows,
    width,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows program_id(0), + num_programs, ... of dL/d delta = g scale t, and this program's share of dL/d scale."""
    program, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + column, mask=inside, other=0).to(tl.float32)
    wide = tl.full([1], width, dtype=tl.int64)
    for row in range(program, rows, tl.num_programs(0)):
        at = row * wide + column
        step = tl.load(gate_ptr + row) * tl.load(upstream_ptr + at, mask=inside, other=0).to(tl.float32)
        if HAS_SCALE:
            total += step * tl.load(delta_ptr + at, mask=inside, other=0).to(tl.float32)
            step *= scale
        tl.store(grad_delta_ptr + at, step.to(grad_delta_ptr.dtype.element_ty), mask=inside)
    if HAS_SCALE:
        tl.store(grad_scale_ptr + program.to(tl.int64) * width + column, total, mask=inside)
