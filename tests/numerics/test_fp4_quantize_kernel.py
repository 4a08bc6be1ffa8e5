"""The quantiser's kernel against its definition, bit for bit: in Triton's interpreter where there is no GPU."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import noise

from apt_model.core.fp4_storage import row_bytes
from apt_model.ops.fp4 import fused_quantize, get_format, quantize
from apt_model.ops.fp4.format import row_blocks
from apt_model.ops.fp4.quantize import quantize_rows

triton = pytest.importorskip("triton", reason="the kernels need Triton")
from apt_model.ops.fp4.kernel_quantize import _sum  # noqa: E402 - Triton is there

tl = triton.language
# The package gives its function the module's name.
quantizer = sys.modules["apt_model.ops.fp4.quantize"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = ("nvfp4", "mxfp4")
WIDTHS = (1, 63, 512, 1000, 4097)


@triton.jit
def sum_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, ROWS)
    x = tl.load(x_ptr + row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    tl.store(out_ptr + row[:, None], _sum(tl.reshape(x, [ROWS, 1, BLOCK]), ROWS, 1, BLOCK))


def assert_equal(weight, name, importance=None, *, factor=1):
    """Bytes and scales are the definition's, for `factor` of the weight's own global scale; nothing else is written."""
    form, (rows, width) = get_format(name), weight.shape
    cost = None if importance is None else quantizer._cost(importance, weight, form)
    largest = weight.abs().amax().float()[None]
    divisor = quantizer._global_scale(largest) * factor if form.has_global_scale else None
    expected = quantize_rows(weight, form, divisor, cost)
    sizes = (row_bytes(width), row_blocks(width, form))
    around = [torch.full((rows + 2, size), 0xA5, dtype=torch.uint8, device=weight.device) for size in sizes]
    fused_quantize.quantize_rows(weight, form, quantizer.WINDOWS[name], divisor, cost, *(each[1:-1] for each in around))
    for each, wanted in zip(around, expected, strict=True):
        assert torch.equal(each[1:-1], wanted)
        assert bool((each[[0, -1]] == 0xA5).all())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMATS)
def test_bytes_and_scales_are_the_definition_s(form, dtype, width):
    assert_equal((noise(5, width) ** 3).to(DEVICE, dtype), form)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("form", FORMATS)
def test_with_an_importance_too(form, width):
    weight, importance = noise(5, width).to(DEVICE), noise(width, seed=1).square().to(DEVICE)
    importance[: width // 2 : 3] = 0
    assert_equal(weight, form, importance)


@settings(max_examples=30, deadline=None)
@given(
    form=st.sampled_from(FORMATS),
    rows=st.integers(1, 70),
    width=st.integers(1, 300),
    power=st.integers(-120, 110),
    seed=st.integers(0, 2**31),
)
def test_for_any_shape_and_range(form, rows, width, power, seed):
    assert_equal((noise(rows, width, seed=seed) * 2.0**power).to(DEVICE), form)


@pytest.mark.parametrize("form", FORMATS)
def test_extremes_and_zeros(form):
    weight = noise(130, 96)
    weight[:-6] *= torch.logspace(-37, 37, 124)[:, None]
    weight[-5] = 0
    weight[-4] = -torch.zeros(96)
    weight[-3] *= 1e-40
    weight[-2, 7] = 2.0**127 * (1 - 2.0**-24)
    assert_equal(weight.to(DEVICE), form)
    for one in (weight[-5:-4], weight[-3:-2], weight[-2:-1], weight[:20]):
        assert_equal(one.to(DEVICE), form)


def test_every_tie_and_every_edge_between_scales(monkeypatch):
    """Without a search, so that the base scale shows: E4M3 is rounded to as torch does it, subnormals included."""
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    edges = 6 * torch.cat((scales, (scales[1:] + scales[:-1]) / 2))
    largest = torch.cat((edges, edges.nextafter(torch.zeros(1)), edges.nextafter(torch.full((1,), 2688.0))))
    weight = largest[:, None] * torch.cat((torch.ones(1), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]) / 6))
    assert quantizer._global_scale(weight.amax()[None]).item() == 1
    for window in ((0, 0), (-2, 6)):
        monkeypatch.setitem(quantizer.WINDOWS, "nvfp4", window)
        assert_equal(torch.cat((weight, -weight), dim=1).to(DEVICE), "nvfp4")


def test_every_edge_between_powers_of_two(monkeypatch):
    edges = torch.cat([each * 2.0 ** torch.arange(-126, 123).float() for each in (1, 1.5)])
    largest = torch.cat((edges, edges.nextafter(torch.zeros(1)), edges.nextafter(2 * edges)))
    for window in ((0, 0), (-1, 0), (-1, 1)):
        monkeypatch.setitem(quantizer.WINDOWS, "mxfp4", window)
        assert_equal((largest[:, None] * (noise(len(largest), 32).tanh())).to(DEVICE), "mxfp4")
        assert_equal(largest[:, None].to(DEVICE), "mxfp4")


@pytest.mark.parametrize("block", [16, 32])
def test_errors_are_summed_in_the_definition_s_order(block):
    errors = (noise(512, block) ** 4).to(DEVICE)
    out = torch.full((512,), torch.nan, device=DEVICE)
    sum_kernel[(1,)](errors, out, ROWS=512, BLOCK=block, enable_fp_fusion=False)
    assert torch.equal(out, quantizer._sum(errors))
    assert not torch.equal(out, quantizer._sum(errors.roll(1, dims=1)))


@pytest.mark.parametrize("factor", [2.0**-20, 0.75, 2.0, 2.0**20])
def test_a_global_scale_that_is_not_the_weight_s_own(factor):
    """Saturates where it is too large; no power of two where it comes from elsewhere."""
    assert_equal(noise(20, 200).to(DEVICE), "nvfp4", factor=factor)


@pytest.mark.parametrize("form", FORMATS)
def test_any_memory_order(form):
    assert_equal(noise(70, 40).to(DEVICE).T, form)
    assert_equal(noise(6, 3, 50).to(DEVICE)[:, 1], form)
    assert_equal(noise(9, 200).to(DEVICE)[::2, 1::3], form)


@pytest.mark.parametrize("form", FORMATS)
def test_quantising_takes_the_kernel_where_it_applies(form, monkeypatch):
    weight, importance = noise(2, 3, 5, 70).to(DEVICE), noise(70, seed=1).square().to(DEVICE)
    monkeypatch.setattr(fused_quantize, "applies", lambda _: False)
    expected = quantize(weight, form, importance=importance)
    monkeypatch.setattr(fused_quantize, "applies", lambda _: True)
    monkeypatch.setattr(quantizer, "quantize_rows", None)
    got = quantize(weight, form, importance=importance)
    assert torch.equal(got.packed, expected.packed)
    assert torch.equal(got.scale.view(torch.uint8), expected.scale.view(torch.uint8))


def test_where_it_applies():
    assert not fused_quantize.applies(torch.ones(2, 16))
    if DEVICE == "cuda":
        assert fused_quantize.applies(torch.ones(2, 16, device="cuda", dtype=torch.bfloat16))
        assert not fused_quantize.applies(torch.ones(2, 16, device="cuda", dtype=torch.float64))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: without one there is nothing to compare")
@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS)
def test_a_gpu_gives_what_a_cpu_gives(form):
    for weight in (noise(300, 1000), noise(300, 1000).double(), noise(300, 1000).bfloat16()):
        here, there = quantize(weight, form), quantize(weight.cuda(), form)
        assert torch.equal(there.packed.cpu(), here.packed)
        assert torch.equal(there.scale.view(torch.uint8).cpu(), here.scale.view(torch.uint8))
        assert here.global_scale is None or torch.equal(there.global_scale.cpu(), here.global_scale)
