"""The fused step against `naive.py` on the same operands: in Triton's interpreter without a GPU, compiled with one."""

import pytest
import torch
from small_models import noise
from tolerances import assert_close

from apt_model.ops.left_spin import fused, naive, select

pytest.importorskip("triton", reason="the kernels need Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cuts bits off where a GPU rounds.
ONE_ROUNDING = "one_rounding_bf16" if DEVICE == "cuda" else "one_truncation_bf16"
ROWS, WIDTHS = 5, (1, 63, 257, 1000)
DESIGN = {"alpha": 0.5, "tau": 0.3, "beta": 0.7, "w1": 1.0, "w2": 0.5}
FORMS = ("first", "design", "trust", "guard")


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Memory that nobody wrote reads as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: like(x, **options).fill_(torch.nan))


def operands(width, dtype=torch.float32, rows=ROWS):
    """A stream, steps of relative lengths 0.01 to 100, a scale, the step before, its angle, an upstream gradient."""
    u, delta, before, upstream = (noise(rows, width, seed=seed) for seed in range(4))
    delta *= torch.logspace(-2, 2, rows, dtype=torch.float64)[:, None]
    delta = delta.to(dtype)
    scale, phi = noise(width, seed=4).float(), noise(rows, 1, seed=5).abs().float()
    return tuple(x.to(DEVICE) for x in (u.to(dtype), delta, scale, before.to(dtype), phi, upstream.to(dtype)))


def both(form, u, delta, scale, before, phi):  # noqa: PLR0917 - what `operands` makes, in its order
    """The stepped stream and the angle, by the definition and by the kernel."""
    if form in ("first", "design"):
        before, phi = (before, phi) if form == "design" else (None, None)
        gate = fused.Gate(design=True, **DESIGN)
        return naive.design_step(u, delta, before, phi, **DESIGN), fused.step(u, delta, None, before, phi, gate)
    if form == "trust":
        plain = naive.trust_step(u, delta, scale, alpha=2.0)
        return (plain, None), fused.step(u, delta, scale, None, None, fused.Gate(design=False, alpha=2.0))
    plain = naive.guard_step(u, delta, alpha=2.0, tau=0.3)
    return (plain, None), fused.step(u, delta, None, None, None, fused.Gate(design=False, alpha=2.0, tau=0.3))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradients_are_the_definition_s(form, width):
    u, delta, scale, before, phi, upstream = operands(width)
    leaves = [x.requires_grad_() for x in (u, delta, scale)]
    naive_out, fused_out = both(form, u, delta, scale, before, phi)
    assert_close("definition_fp32", fused_out[0], naive_out[0])
    if naive_out[1] is not None:
        assert_close("definition_fp32", fused_out[1], naive_out[1])
        assert not fused_out[1].requires_grad
    expected, got = (torch.autograd.grad(out[0], leaves, upstream, allow_unused=True) for out in (naive_out, fused_out))
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close("other_shape", ours, theirs)


@pytest.mark.parametrize("types", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")])
@pytest.mark.parametrize("form", FORMS)
def test_it_rounds_once_to_the_type_of_the_stream(form, types):
    stream, step = (getattr(torch, name) for name in types)
    u, delta, scale, before, phi, upstream = operands(257, torch.float32)
    u, delta, before = u.to(stream), delta.to(step).requires_grad_(), before.to(step)
    naive_out, fused_out = both(form, u, delta, scale, before, phi)
    assert fused_out[0].dtype == stream
    assert_close(ONE_ROUNDING, fused_out[0].float(), naive_out[0].float())
    expected, got = (torch.autograd.grad(out[0], delta, upstream.to(stream))[0] for out in (naive_out, fused_out))
    assert got.dtype == step
    assert_close(ONE_ROUNDING, got.float(), expected.float())


def test_the_shares_of_the_scale_s_gradient_are_all_counted(monkeypatch):
    monkeypatch.setattr(fused, "_PROGRAMS", 3)
    u, delta, scale, before, phi, upstream = operands(63, rows=11)
    scale.requires_grad_()
    results = [torch.autograd.grad(out[0], scale, upstream)[0] for out in both("trust", u, delta, scale, before, phi)]
    assert_close("other_shape", results[1], results[0])


@pytest.mark.parametrize("form", ["design", "trust"])
def test_a_gradient_of_the_gradient(form):
    u, delta, scale, before, phi, upstream = operands(63)
    scale.requires_grad_()
    upstream.requires_grad_()
    results = []
    for out in both(form, u, delta.requires_grad_(), scale, before, phi):
        (first,) = torch.autograd.grad(out[0], delta, upstream, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), upstream)[0])
    assert_close("other_shape", results[1], results[0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, under the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_stays_visible_and_in_its_token(form, value):
    u, delta, scale, before, phi, _ = operands(63)
    clean = both(form, u, delta, scale, before, phi)[1][0]
    for poisoned in (u, delta):
        kept = poisoned[2, 5].item()
        poisoned[2, 5] = value
        stepped = both(form, u, delta, scale, before, phi)[1][0]
        assert not stepped[2].isfinite().all()
        others = torch.arange(ROWS, device=DEVICE) != 2
        assert torch.equal(stepped[others], clean[others])
        poisoned[2, 5] = kept


@pytest.mark.parametrize("form", FORMS)
def test_no_increment_and_no_stream_are_exact(form):
    u, delta, scale, before, phi, _ = operands(63)
    assert torch.equal(both(form, u, torch.zeros_like(delta), scale, before, phi)[1][0], u)
    assert bool(both(form, torch.zeros_like(u), delta, scale, before, phi)[1][0].isfinite().all())


def test_guard_equals_plain_bit_for_bit_below_tau():
    u, delta, *_ = operands(257, torch.bfloat16)
    u = u + 400 * delta
    gate = fused.Gate(design=False, alpha=2.0, tau=0.5)
    if DEVICE == "cuda":
        assert torch.equal(fused.step(u, delta, None, None, None, gate)[0], u + delta)
    u, delta = u.float(), delta.float()
    assert torch.equal(fused.step(u, delta, None, None, None, gate)[0], u + delta)


def test_operands_need_not_lie_in_order():
    u, delta, _, before, phi, _ = operands(6, rows=6)
    gate = fused.Gate(design=True, **DESIGN)
    crossed = fused.step(u.T, delta.T, None, before.T, phi, gate)[0]
    assert_close("definition_fp32", crossed, naive.design_step(u.T, delta.T, before.T, phi, **DESIGN)[0])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: without one the definition is used")
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
def test_on_a_gpu_a_step_is_one_launch_and_so_is_its_gradient():
    u, delta, scale, before, phi, upstream = operands(256)
    delta.requires_grad_()

    def kernels(run):
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
        on_device = [each.name for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
        return [name for name in on_device if "FillFunctor" not in name]  # the poison of this file

    for run in (
        lambda: select.design_step(u, delta, before, phi, **DESIGN),
        lambda: select.guard_step(u, delta, alpha=2.0, tau=0.3),
        lambda: select.trust_step(u, delta, scale, alpha=2.0),
    ):
        assert kernels(run) == ["step_kernel"]
        assert kernels(lambda run=run: _gradient(run(), delta, upstream)) == ["step_kernel", "gradient_kernel"]
    assert len(kernels(lambda: select.design_step(u, delta, before, phi, **DESIGN, detach=False))) > 5


def _gradient(out, delta, upstream):
    return torch.autograd.grad(out if isinstance(out, torch.Tensor) else out[0], delta, upstream)
