"""Left spin against its formulas, written out again here with Python's own numbers, and its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES, assert_close
from torch import nn

from apt_model.core.errors import ConfigError
from apt_model.layers.left_spin import LeftSpinResidual, LeftSpinState, PlainResidual
from apt_model.ops.left_spin import design_step, guard_step, trust_step
from apt_model.ops.left_spin.naive import design_gate, trust_gate

EPS = 1e-6
DESIGN = {"alpha": 0.5, "tau": 0.3, "beta": 0.7, "w1": 1.0, "w2": 0.5}
MODES = ("design", "trust", "guard")

sizes = {"rows": st.integers(1, 5), "width": st.integers(1, 65), "seed": st.integers(0, 2**31)}


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spread(rows, width, seed):
    """A stream and steps whose relative lengths reach from 1e-3 to 1e3."""
    u, delta = noise(rows, width, seed=seed), noise(rows, width, seed=seed + 1)
    return u, delta * 10 ** (6 * torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed)).double() - 3)


def length(row):
    return math.sqrt(math.fsum(x * x for x in row))


def design_by_hand(u, delta, before, phi_before, *, alpha, tau, beta, w1, w2):
    size = length(delta)
    change = 0.0
    if before is not None:
        change = length([a - b for a, b in zip(delta, before, strict=True)]) / (EPS + size + length(before))
    score = w1 * size / (EPS + length(u)) + w2 * change
    softplus = max(score - tau, 0.0) + math.log1p(math.exp(-abs(score - tau)))
    phi = (1 - beta) * phi_before + beta * alpha * softplus
    gate = 1 / math.sqrt(1 + phi * phi)
    return [a + gate * b for a, b in zip(u, delta, strict=True)], phi


def guard_by_hand(u, delta, *, alpha, tau):
    excess = max(length(delta) ** 2 - tau * tau * length(u) ** 2, 0.0)
    gate = 1 / math.sqrt(1 + alpha * alpha * excess / (length(u) ** 2 + EPS * len(u)))
    return [a + gate * b for a, b in zip(u, delta, strict=True)]


def trust_by_hand(u, delta, scale, *, alpha):
    return guard_by_hand(u, [a * b for a, b in zip(scale, delta, strict=True)], alpha=alpha, tau=0.0)


def step_of(mode, u, delta, *, alpha=0.5, detach=True):
    """The new stream in any mode; trust with a branch scale of 1."""
    if mode == "design":
        return design_step(u, delta, None, None, **{**DESIGN, "alpha": alpha}, detach=detach)[0]
    if mode == "guard":
        return guard_step(u, delta, alpha=alpha, tau=0.3, detach=detach)
    return trust_step(u, delta, torch.ones(u.shape[-1], dtype=u.dtype), alpha=alpha, detach=detach)


def relative_step(u, stepped):
    return torch.linalg.vector_norm(stepped - u, dim=-1) / torch.linalg.vector_norm(u, dim=-1)


def sweep(width=33, points=400):
    """One stream repeated, and steps in one direction of growing relative length, 1e-3 .. 1e3."""
    u, direction = noise(1, width), noise(1, width, seed=1)
    relative = torch.logspace(-3, 3, points, dtype=torch.float64)[:, None]
    unit = direction / torch.linalg.vector_norm(direction) * torch.linalg.vector_norm(u)
    return u.expand(points, width).contiguous(), relative * unit, relative[:, 0]


# The definition.


@settings(max_examples=30, deadline=None)
@given(**sizes, alpha=st.floats(0.1, 8), tau=st.floats(0, 2), beta=st.floats(0.1, 1), first=st.booleans())
def test_design_is_its_formula(*, rows, width, seed, alpha, tau, beta, first):
    u, delta = spread(rows, width, seed)
    before, phi_before = spread(rows, width, seed + 7)[1], noise(rows, 1, seed=seed + 3).abs()
    options = {"alpha": alpha, "tau": tau, "beta": beta, "w1": 1.3, "w2": 0.4}
    got, phi = design_step(u, delta, None if first else before, None if first else phi_before, **options)
    for row in range(rows):
        by_hand, angle = design_by_hand(
            u[row].tolist(),
            delta[row].tolist(),
            None if first else before[row].tolist(),
            0.0 if first else float(phi_before[row]),
            **options,
        )
        assert_close("softplus_fp64", got[row], torch.tensor(by_hand, dtype=torch.float64))
        assert_close("softplus_fp64", phi[row, 0], torch.tensor(angle, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(**sizes, alpha=st.floats(0.1, 8))
def test_trust_is_its_formula(rows, width, seed, alpha):
    (u, delta), scale = spread(rows, width, seed), noise(width, seed=seed + 5)
    got = trust_step(u, delta, scale, alpha=alpha)
    for row in range(rows):
        by_hand = trust_by_hand(u[row].tolist(), delta[row].tolist(), scale.tolist(), alpha=alpha)
        assert_close("definition_fp64", got[row], torch.tensor(by_hand, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(**sizes, tau=st.floats(0.01, 3), strength=st.floats(0.1, 1))
def test_guard_is_its_formula(rows, width, seed, tau, strength):
    u, delta = spread(rows, width, seed)
    got = guard_step(u, delta, alpha=strength / tau, tau=tau)
    for row in range(rows):
        by_hand = guard_by_hand(u[row].tolist(), delta[row].tolist(), alpha=strength / tau, tau=tau)
        assert_close("definition_fp64", got[row], torch.tensor(by_hand, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_computed_in_fp32_and_rounded_once(mode, dtype):
    u, delta = (x.to(dtype) for x in spread(64, 65, 11))
    layer = LeftSpinResidual(65, mode=mode, num_sublayers=3).to(dtype)
    got, _ = layer(u, delta)
    assert got.dtype == dtype
    exact, _ = layer.double()(u.double(), delta.double())
    assert_close("definition_fp32", layer.float()(u.float(), delta.float())[0], exact.float())
    if dtype != torch.float32:
        # Half a unit in the last place, and where fp32 itself stands on the edge between two values, one.
        off = (got != exact.to(dtype)).double().mean()
        assert off < 1e-3
        assert_close("one_rounding_bf16", got.double(), exact)


def test_a_chain_of_sublayers_hands_on_step_and_angle():
    u, deltas = noise(4, 17), [noise(4, 17, seed=seed) for seed in range(1, 5)]
    by_hand, angles, before = u.tolist(), [0.0] * 4, None
    layer, state = LeftSpinResidual(17, mode="design"), None
    for delta in deltas:
        u, state = layer(u, delta, state)
        for row in range(4):
            earlier = None if before is None else before[row].tolist()
            by_hand[row], angles[row] = design_by_hand(
                by_hand[row], delta[row].tolist(), earlier, angles[row], **DESIGN
            )
        before = delta
        assert isinstance(state, LeftSpinState)
        assert torch.equal(state.delta, delta)
        assert_close("definition_fp64", state.phi[:, 0], torch.tensor(angles, dtype=torch.float64))
        assert_close("definition_fp64", u, torch.tensor(by_hand, dtype=torch.float64))


def test_the_first_sublayer_has_no_change_of_step():
    u, delta = noise(4, 17), noise(4, 17, seed=1)
    first, phi = design_gate(u, delta, None, None, **DESIGN)
    assert torch.equal(first, design_gate(u, delta, delta, torch.zeros(4, 1).double(), **DESIGN)[0])
    assert torch.equal(first, design_gate(u, delta, None, None, **{**DESIGN, "w2": 99.0})[0])
    _, state = LeftSpinResidual(17)(u, delta)
    assert torch.equal(state.phi, phi)


@pytest.mark.parametrize("mode", ["trust", "guard"])
def test_the_other_modes_carry_no_state(mode):
    u, delta = noise(4, 17), noise(4, 17, seed=1)
    layer = LeftSpinResidual(17, mode=mode).double()
    alone, state = layer(u, delta)
    assert state is None
    after_another, state = layer(u, delta, LeftSpinState(noise(4, 17, seed=2), noise(4, 1)))
    assert state is None
    assert torch.equal(alone, after_another)


# What the formulas promise.


@settings(max_examples=30, deadline=None)
@given(**sizes, alpha=st.floats(0.2, 8))
def test_a_step_of_trust_is_shorter_than_the_stream_over_alpha(rows, width, seed, alpha):
    u, delta = spread(rows, width, seed)
    step = torch.linalg.vector_norm(trust_gate(u, delta, alpha=alpha) * delta, dim=-1)
    radius = (u.square().sum(dim=-1) + EPS * width).sqrt() / alpha
    assert bool((step < radius).all())


@settings(max_examples=30, deadline=None)
@given(**sizes, tau=st.floats(0.01, 3), strength=st.floats(0.1, 1))
def test_a_step_of_guard_is_plain_up_to_tau_and_bounded_beyond(rows, width, seed, tau, strength):
    u, delta = spread(rows, width, seed)
    alpha = strength / tau
    gate = trust_gate(u, delta, alpha=alpha, tau=tau)[:, 0]
    step = gate * torch.linalg.vector_norm(delta, dim=-1)
    radius = (u.square().sum(dim=-1) + EPS * width).sqrt() / alpha
    assert bool((step <= radius * (1 + TOLERANCES["bound"].relative)).all())
    inside = torch.linalg.vector_norm(delta, dim=-1) < 0.999 * tau * torch.linalg.vector_norm(u, dim=-1)
    assert bool((gate[inside] == 1).all())


@pytest.mark.parametrize("mode", ["trust", "guard"])
@pytest.mark.parametrize("alpha", [0.25, 1.0, 3.0])
def test_a_longer_increment_never_makes_a_shorter_step(mode, alpha):
    u, delta, relative = sweep()
    taken = relative_step(u, step_of(mode, u, delta, alpha=alpha))
    assert bool((taken.diff() > -TOLERANCES["definition_fp64"].absolute).all())
    radius = math.sqrt(1 + EPS / float(u[0].square().mean())) / alpha
    assert float(taken.max()) < radius
    if mode == "guard":
        below = relative < 0.3
        assert_close("definition_fp64", taken[below], relative[below])


def test_guard_beyond_its_limit_would_not_be_monotone():
    u, delta, _ = sweep()
    too_strong = relative_step(u, guard_step(u, delta, alpha=2.0, tau=1.0))
    assert float(too_strong.max()) > 0.9
    assert float(too_strong[-1]) < 0.51
    with pytest.raises(ConfigError, match="alpha: expected at most 1 / tau = 1 in guard mode, got 2"):
        LeftSpinResidual(8, mode="guard", alpha=2.0, tau=1.0)
    LeftSpinResidual(8, mode="guard", alpha=1.0, tau=1.0)


@pytest.mark.parametrize(("alpha", "limit", "highest"), [(0.5, 2.0, 2.02), (4.0, 0.25, 0.269)])
def test_design_overshoots_its_limit_and_comes_back(alpha, limit, highest):
    """Known: softplus(d - tau) stays below d for long increments, so a step exceeds 1 / alpha before it returns to it.

    Without inertia (beta = 1). With it, at the first sublayer, alpha counts beta times as much.
    """
    u, delta, _ = sweep(points=2000)
    stepped, _ = design_step(u, delta, None, None, **{**DESIGN, "alpha": alpha, "beta": 1.0})
    taken = relative_step(u, stepped)
    assert highest < float(taken.max()) < 1.15 * limit
    assert bool((taken.diff() < 0).any())
    assert float(taken[-1]) == pytest.approx(limit, rel=1e-3)


def test_design_shortens_even_a_step_of_no_length():
    """Known: softplus(-tau) is not 0, so the gate of the smallest step is not 1 but about 0.98."""
    u = noise(1, 9)
    gate, _ = design_gate(u, 1e-12 * u, None, None, **DESIGN)
    assert float(gate) == pytest.approx(1 / math.sqrt(1 + (0.35 * math.log1p(math.exp(-0.3))) ** 2), abs=1e-9)
    assert 0.975 < float(gate) < 0.985


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_no_increment_changes_nothing(mode, dtype):
    u = noise(5, 33, dtype=dtype)
    assert torch.equal(step_of(mode, u, torch.zeros_like(u)), u)


@pytest.mark.parametrize("factor", [3.0, 1e3, 1e6])
@pytest.mark.parametrize("mode", ["trust", "guard"])
def test_scaling_both_scales_the_result(mode, factor):
    u, delta = spread(20, 65, 3)
    u = u / u.square().mean(dim=-1, keepdim=True).sqrt()
    assert_close("scale_equivariance", step_of(mode, u * factor, delta * factor) / factor, step_of(mode, u, delta))


@pytest.mark.parametrize("mode", ["trust", "guard"])
def test_turning_both_turns_the_result(mode):
    (u, delta), rotation = spread(20, 65, 3), torch.linalg.qr(noise(65, 65))[0]
    assert_close(
        "rotation_equivariance", step_of(mode, u @ rotation, delta @ rotation), step_of(mode, u, delta) @ rotation
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=20, deadline=None)
@given(**sizes, tau=st.floats(0.01, 3))
def test_guard_equals_plain_bit_for_bit_below_tau(dtype, rows, width, seed, tau):
    u, delta = noise(rows, width, seed=seed), noise(rows, width, seed=seed + 1)
    delta *= (
        0.98
        * tau
        * torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        / torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
    )
    u, delta = u.to(dtype), delta.to(dtype)
    layer = LeftSpinResidual(width, mode="guard", tau=tau, alpha=1 / tau)
    assert torch.equal(layer(u, delta)[0], PlainResidual()(u, delta)[0])
    if width > 4:
        assert not torch.equal(layer(u, 50 * delta)[0], PlainResidual()(u, 50 * delta)[0])


# Where numbers end.


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_an_empty_stream_is_finite_with_its_gradient(mode, detach):
    for start in (noise(3, 9), torch.zeros(3, 9, dtype=torch.float64)):
        u, delta = torch.zeros(3, 9, dtype=torch.float64, requires_grad=True), start.requires_grad_()
        stepped = step_of(mode, u, delta, detach=detach)
        stepped.sum().backward()
        assert all(bool(x.isfinite().all()) for x in (stepped, u.grad, delta.grad))


@pytest.mark.parametrize("mode", MODES)
def test_large_bf16_values_are_finite(mode):
    big = torch.full((1, 4096), 3e4, dtype=torch.bfloat16)
    for delta in (big, -big, big / 1e4):
        assert bool(step_of(mode, big, delta, alpha=2.0).isfinite().all())
    assert bool(step_of(mode, torch.zeros_like(big), big, alpha=2.0).isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["stream", "step"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_stays_visible_and_in_its_token(mode, where, value):
    u, delta = noise(3, 9), noise(3, 9, seed=1)
    clean = step_of(mode, u, delta)
    (u if where == "stream" else delta)[1, 4] = value
    stepped = step_of(mode, u, delta)
    assert not stepped[1].isfinite().all()
    assert torch.equal(stepped[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_was_not_finite_shows_in_the_next_sublayer(value):
    u, delta, before = noise(2, 9), noise(2, 9, seed=1), noise(2, 9, seed=2)
    before[0, 0] = value
    stepped, _ = design_step(u, delta, before, noise(2, 1).abs(), **DESIGN)
    assert not stepped[0].isfinite().any()
    assert stepped[1].isfinite().all()


# Gradients.


def test_detached_gradients_are_their_formulas():
    u, delta, scale = noise(4, 17), noise(4, 17, seed=1), noise(17, seed=2)
    upstream, before, phi_before = noise(4, 17, seed=3), noise(4, 17, seed=4), noise(4, 1, seed=5).abs()
    inputs = [x.requires_grad_() for x in (u, delta, scale, before, phi_before)]
    trust = torch.autograd.grad(trust_step(u, delta, scale, alpha=2.0), inputs[:3], upstream)
    gate = trust_gate(u, scale * delta, alpha=2.0).detach()
    assert torch.equal(trust[0], upstream)
    assert_close("closed_form_fp64", trust[1], gate * scale * upstream)
    assert_close("closed_form_fp64", trust[2], (gate * delta * upstream).sum(dim=0))
    guard = torch.autograd.grad(guard_step(u, delta, alpha=2.0, tau=0.3), inputs[:2], upstream)
    assert torch.equal(guard[0], upstream)
    assert_close("closed_form_fp64", guard[1], trust_gate(u, delta, alpha=2.0, tau=0.3) * upstream)
    stepped, phi = design_step(u, delta, before, phi_before, **DESIGN)
    assert not phi.requires_grad
    design = torch.autograd.grad(stepped, [u, delta, before, phi_before], upstream, allow_unused=True)
    gate = design_gate(u, delta, before, phi_before, **DESIGN)[0]
    assert torch.equal(design[0], upstream)
    assert_close("closed_form_fp64", design[1], gate * upstream)
    assert design[2:] == (None, None)


@pytest.mark.parametrize("detach", [True, False])
def test_the_carried_state_has_a_gradient_only_where_the_gate_has(detach):
    delta = noise(4, 17, seed=1).requires_grad_()
    _, state = LeftSpinResidual(17, detach=detach)(noise(4, 17), delta)
    assert state.delta.requires_grad == state.phi.requires_grad == (not detach)


def test_full_gradients_by_finite_differences():
    u, delta, scale = noise(3, 5), noise(3, 5, seed=1), noise(5, seed=2)
    before, phi_before = noise(3, 5, seed=3), noise(3, 1, seed=4).abs()
    inputs = tuple(x.requires_grad_() for x in (u, delta, scale, before, phi_before))
    assert torch.autograd.gradcheck(lambda u, d, s: trust_step(u, d, s, alpha=2.0, detach=False), inputs[:3])
    assert torch.autograd.gradcheck(lambda u, d: guard_step(u, d, alpha=2.0, tau=0.3, detach=False), inputs[:2])
    design = (*inputs[:2], *inputs[3:])
    assert torch.autograd.gradcheck(lambda u, d, b, p: design_step(u, d, b, p, **DESIGN, detach=False), design)


def test_the_full_gradient_of_trust_is_its_closed_form():
    u, v, upstream = noise(4, 17).requires_grad_(), noise(4, 17, seed=1).requires_grad_(), noise(4, 17, seed=2)
    stepped = trust_step(u, v, torch.ones(17).double(), alpha=2.0, detach=False)
    got_u, got_v = torch.autograd.grad(stepped, [u, v], upstream)
    below = u.square().sum(dim=-1, keepdim=True) + EPS * 17
    phi_squared = 4 * v.square().sum(dim=-1, keepdim=True) / below
    gate = (1 + phi_squared).rsqrt()
    turn = (upstream * v).sum(dim=-1, keepdim=True) * gate**3
    assert_close("closed_form_fp64", got_v, gate * upstream - turn * 4 / below * v)
    assert_close("closed_form_fp64", got_u, upstream + turn * phi_squared / below * u)


# As a module.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_a_token_does_not_depend_on_the_batch_around_it(mode, dtype):
    u, delta = (x.to(dtype) for x in spread(60, 65, 5))
    layer = LeftSpinResidual(65, mode=mode, num_sublayers=4)
    _, state = layer(u, delta.flip(0))
    whole, _ = layer(u.view(3, 20, 65), delta.view(3, 20, 65), _map(state, lambda x: x.view(3, 20, -1)))
    whole = whole.view(60, 65)
    others = torch.arange(60) % 3 > 0
    changed, _ = layer(*(torch.where(others[:, None], -7 * x, x) for x in (u, delta)), state)
    assert torch.equal(changed[~others], whole[~others])
    for row in range(0, 60, 7):
        alone, _ = layer(u[row], delta[row], _map(state, lambda x, row=row: x[row]))
        if mode == "design" and dtype == torch.float32:
            # On a CPU softplus runs in vectors, and the last few of a batch one by one by another routine.
            assert_close("definition_fp32", alone, whole[row])
        else:
            assert torch.equal(alone, whole[row])


def _map(state, function):
    return None if state is None else LeftSpinState(*(function(x) for x in state))


@pytest.mark.parametrize("mode", MODES)
def test_training_and_evaluation_are_one_function_without_memory(mode):
    u, delta = noise(4, 17), noise(4, 17, seed=1)
    layer = LeftSpinResidual(17, mode=mode)
    first = layer.train()(u, delta)[0]
    layer(1e3 * u, delta)
    assert torch.equal(first, layer.eval()(u, delta)[0])
    assert not list(layer.buffers())
    assert list(layer.state_dict()) == (["scale"] if mode == "trust" else [])


def test_the_branch_scale_starts_at_one_over_the_root_of_the_sublayers():
    layer = LeftSpinResidual(5, mode="trust", num_sublayers=16)
    assert torch.equal(layer.scale, torch.full((5,), 0.25))
    with torch.no_grad():
        layer.scale.fill_(7.0)
    layer.reset_parameters()
    assert torch.equal(layer.scale, torch.full((5,), 0.25))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "trusty"}, "mode: expected design, trust or guard, got 'trusty'"),
        ({"alpha": 0.0}, "alpha: expected above 0, got 0.0"),
        ({"beta": 0.0}, "beta: expected 0 < beta <= 1, got 0.0"),
        ({"mode": "guard", "tau": 0.0}, "tau: expected a threshold above 0 in guard mode, got 0.0"),
    ],
)
def test_what_cannot_be_met_is_refused(options, message):
    with pytest.raises(ConfigError, match=f"LeftSpinResidual.{message}"):
        LeftSpinResidual(8, **options)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's import
def test_compiled_it_is_the_same_function():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(LeftSpinResidual(33, mode=mode) for mode in ("design", "trust"))

        def forward(self, u, delta):
            state = None
            for part in self.parts:
                u, state = part(u, delta, state)
            return u

    chain = Chain()
    compiled = torch.compile(chain, fullgraph=True)
    u, delta = (x.float() for x in spread(20, 33, 9))
    results = []
    for function in (chain, compiled):
        leaf = delta.clone().requires_grad_()
        stepped = function(u, leaf)
        stepped.square().sum().backward()
        results.append((stepped.detach(), leaf.grad, chain.parts[1].scale.grad.clone()))
        chain.zero_grad()
    for eager, fused in zip(*results, strict=True):
        assert_close("compiled", fused, eager)
