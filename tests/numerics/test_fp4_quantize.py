"""The quantiser: nearest codes, the best scales in exact arithmetic, the quality that it is for, and its edges."""

import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import noise
from tolerances import TOLERANCES

from apt_model.core.errors import InputError
from apt_model.ops.fp4 import MXFP4, NVFP4, check, dequantize, get_format, quantize
from apt_model.ops.fp4.format import MAGNITUDES, unpack
from apt_model.ops.fp4.quantize import quantize_rows

# The package gives its function the module's name.
quantizer = sys.modules["apt_model.ops.fp4.quantize"]
FORMATS = ("nvfp4", "mxfp4")
BLOCK = {"nvfp4": 16, "mxfp4": 32}
# What is to be searched: neighbours in E4M3's codes, in exponents.
WINDOWS = {"nvfp4": range(-2, 7), "mxfp4": range(-1, 2)}
# Two errors that differ by less may be ordered either way.
ROUNDING = TOLERANCES["fp4_choice_of_scale"].relative


def uint8(scale):
    return scale.view(torch.uint8)


def assert_same(got, expected):
    assert torch.equal(got.packed, expected.packed)
    assert torch.equal(uint8(got.scale), uint8(expected.scale))
    assert (got.global_scale is None) == (expected.global_scale is None)
    assert got.global_scale is None or torch.equal(got.global_scale, expected.global_scale)


def squared_error(weight, packed, importance=1.0):
    """Sum over the weight of what quantising lost, relative to the weight's own sum of squares."""
    weight = weight.double()
    lost = (dequantize(packed, torch.float64) - weight).square()
    return float((lost * importance).sum() / (weight.square() * importance).sum())


def round_to_nearest(monkeypatch):
    """No search: each block's scale maps its largest weight to the largest code."""
    monkeypatch.setattr(quantizer, "WINDOWS", dict.fromkeys(FORMATS, (0, 0)))


def samples(name):
    """2^21 weights; Laplace as the difference of two exponentials."""
    if name == "gaussian":
        return noise(2048, 1024, seed=1)
    first, second = torch.rand(2, 2048, 1024, generator=torch.Generator().manual_seed(1)).clamp_min(1e-30).log()
    return first - second


def e4m3_values():
    return [Fraction(value) for value in torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()]


def nearest(ratio, values):
    """Index of the nearest of ascending `values`, the even one of two as near."""
    return min(range(len(values)), key=lambda index: (abs(values[index] - ratio), index % 2))


def exact_candidates(block, form, divisor):
    """(code, scale) of each neighbour of the base scale, in exact arithmetic."""
    largest = max(abs(value) for value in block)
    if form == "nvfp4":
        values = e4m3_values()
        base = nearest(min(largest * divisor / 6, 448), values)
        codes = {min(max(base + offset, 1), 126) for offset in WINDOWS[form]}
        return [(code, values[code] / divisor) for code in sorted(codes)]
    base = next(code for code in range(255) if largest <= 6 * Fraction(2) ** (code - 127))
    codes = {min(max(base + offset, 0), 254) for offset in WINDOWS[form]}
    return [(code, Fraction(2) ** (code - 127)) for code in sorted(codes)]


def exact_error(block, scale):
    """Sum of squares that the nearest codes leave, and those codes."""
    magnitudes = [Fraction(value) for value in MAGNITUDES]
    codes = [nearest(abs(value) / scale, magnitudes) for value in block]
    return sum((magnitudes[code] * scale - abs(value)) ** 2 for code, value in zip(codes, block, strict=True)), codes


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "spread", "bfloat16"])
@pytest.mark.parametrize("form", FORMATS)
def test_the_scale_is_the_best_of_its_neighbours_and_codes_are_the_nearest(form, kind):
    size = BLOCK[form]
    weight = noise(4, 6 * size, seed=3)
    if kind == "heavy":
        weight = weight**3
    elif kind == "spread":  # over 14 decades, down to blocks whose scales E4M3 has no normal numbers for
        weight *= torch.logspace(-7, 7, 6).repeat_interleave(size)
    elif kind == "bfloat16":
        weight = weight.bfloat16()
    made = quantize(weight, form)
    divisor = Fraction(made.global_scale.item()) if form == "nvfp4" else None
    codes = unpack(made.packed, weight.shape[1])
    for row, group in torch.cartesian_prod(torch.arange(4), torch.arange(6)).tolist():
        inside = slice(group * size, (group + 1) * size)
        block = [Fraction(value) for value in weight[row, inside].tolist()]
        errors = {code: exact_error(block, scale) for code, scale in exact_candidates(block, form, divisor)}
        chosen, wanted = errors[int(uint8(made.scale)[row, group])]
        assert chosen <= min(error for error, _ in errors.values()) * Fraction(1 + ROUNDING)
        assert (codes[row, inside] & 7).tolist() == wanted
        negative = [value < 0 and code > 0 for value, code in zip(block, wanted, strict=True)]
        assert (codes[row, inside] >= 8).tolist() == negative


@pytest.mark.parametrize("form", FORMATS)
def test_each_neighbour_is_the_best_of_some_block(form, monkeypatch):
    weight = samples("gaussian")[:512]
    searched = uint8(quantize(weight, form).scale).int()
    round_to_nearest(monkeypatch)
    found = (searched - uint8(quantize(weight, form).scale).int()).unique().tolist()
    # Twice mxfp4's base scale has no value up to the largest weight that the base has not.
    assert found == [offset for offset in WINDOWS[form] if (form, offset) != ("mxfp4", 1)]


@pytest.mark.parametrize("form", FORMATS)
def test_ties_go_to_the_even_code(form, monkeypatch):
    round_to_nearest(monkeypatch)
    magnitudes = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    weight = torch.tensor([*magnitudes, *(-each for each in magnitudes)])[None]
    made = quantize(weight, form)
    assert squared_error(6 * torch.ones(1, 16), quantize(6 * torch.ones(1, 16), form)) == 0
    assert unpack(made.packed, 16)[0].tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 0, 10, 10, 12, 12, 14, 14, 15]
    above = torch.nextafter(weight, weight * 2)
    above[:, 7::8] = weight[:, 7::8]
    assert unpack(quantize(above, form).packed, 16)[0, :8].tolist() == [1, 2, 3, 4, 5, 6, 7, 7]
    below = torch.nextafter(weight, weight * 0)
    below[:, 7::8] = weight[:, 7::8]
    assert unpack(quantize(below, form).packed, 16)[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
@pytest.mark.parametrize("form", FORMATS)
def test_quality(form, name):
    weight = samples(name)
    error = squared_error(weight, quantize(weight, form))
    print(f"{form} {name}: {error:.5f}")
    assert error <= TOLERANCES[f"fp4_{form}_{name}"].relative


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_the_search_gains_on_rounding_to_nearest(name, monkeypatch):
    weight = samples(name)[:512]
    searched = squared_error(weight, quantize(weight))
    round_to_nearest(monkeypatch)
    assert searched <= TOLERANCES[f"fp4_search_{name}"].relative * squared_error(weight, quantize(weight))


@pytest.mark.parametrize(("form", "bound"), [("nvfp4", 3 / 17), ("mxfp4", 1 / 5)])
def test_rounding_to_nearest_keeps_its_bound(form, bound, monkeypatch):
    """Of a block's largest weight: half the gap from 4 to 6, at the worst place of the scale; it is reached."""
    round_to_nearest(monkeypatch)
    weight = torch.rand(2048, 1024) * torch.logspace(-1, 0, 2048)[:, None]
    lost = (dequantize(quantize(weight, form), torch.float64) - weight).abs().unflatten(1, (-1, BLOCK[form]))
    worst = lost.amax(dim=-1) / weight.unflatten(1, (-1, BLOCK[form])).amax(dim=-1)
    assert 0.95 * bound < float(worst.max()) <= bound * (1 + ROUNDING)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMATS),
    rows=st.integers(1, 5),
    width=st.one_of(st.integers(1, 130), st.sampled_from([1000, 4097])),
    power=st.integers(-60, 60),
    seed=st.integers(0, 2**31),
)
def test_no_block_is_worse_than_rounded_to_nearest(form, rows, width, power, seed):
    weight = noise(rows, width, seed=seed) ** 3 * 2.0**power
    searched = check(quantize(weight, form))
    with pytest.MonkeyPatch.context() as patch:
        round_to_nearest(patch)
        plain = quantize(weight, form)
    assert searched.shape == weight.shape
    errors = [(dequantize(each, torch.float64) - weight.double()).square() for each in (searched, plain)]
    blocks = [torch.nn.functional.pad(each, (0, -width % 32)).unflatten(1, (-1, BLOCK[form])) for each in errors]
    searched_error, plain_error = (each.sum(dim=-1) for each in blocks)
    assert bool((searched_error <= plain_error * (1 + ROUNDING)).all())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_what_is_quantised_stays_as_it_is(form, scale):
    for power in (1, 3):
        weight = noise(64, 999, seed=power) ** power * scale
        values = dequantize(quantize(weight, form), torch.float32)
        assert torch.equal(dequantize(quantize(values, form), torch.float32), values)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("power", [-80, -1, 5, 90])
def test_a_power_of_two_goes_into_the_scales_alone(form, power):
    weight = noise(8, 1000)
    plain, scaled = quantize(weight, form), quantize(weight * 2.0**power, form)
    assert torch.equal(scaled.packed, plain.packed)
    if form == "nvfp4":
        assert torch.equal(uint8(scaled.scale), uint8(plain.scale))
        assert torch.equal(scaled.global_scale * 2.0**power, plain.global_scale)
    else:
        assert torch.equal(scaled.scale.int(), plain.scale.int() + power)


def test_the_global_scale_is_the_largest_power_of_two_that_fits():
    """So code * scale / global_scale is exact in bf16, and no block's scale is beyond E4M3's largest."""
    for exponent in (-115, -100, -1, 0, 1, 100, 114):
        edge = torch.tensor([2688 * 2.0**exponent])
        for largest in (edge, torch.nextafter(edge, edge * 0), torch.nextafter(edge, edge * 2), edge * 1.9):
            made = quantize(torch.cat((largest, torch.zeros(15)))[None])
            divisor = Fraction(made.global_scale.item())
            assert divisor.numerator == 1 or divisor.denominator == 1
            assert divisor.numerator.bit_count() == divisor.denominator.bit_count() == 1
            assert 1344 < Fraction(largest.item()) * divisor <= 2688
            assert made.scale.float().max() <= 448
            values = dequantize(made, torch.float32)
            assert torch.equal(dequantize(made, torch.bfloat16).float(), values)
            assert abs(values.max() / largest - 1) <= 2**-4


@pytest.mark.parametrize("form", FORMATS)
def test_each_tensor_has_its_range(form):
    """Matrices of weights from 1e-30 to 1e30 (nvfp4: each with its own global scale), in blocks that share a scale."""
    weight = noise(13, 4, 64) * torch.logspace(-30, 30, 13)[:, None, None]
    made = check(quantize(weight, form))
    for each, values in zip(weight, dequantize(made, torch.float64), strict=True):
        assert float((values - each).square().sum() / each.double().square().sum()) < 0.02
    assert dequantize(made, torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("form", FORMATS)
def test_one_tensor_from_1e_minus_30_to_1e30(form):
    weight = noise(61, 64) * torch.logspace(-30, 30, 61)[:, None]
    made = check(quantize(weight, form))
    values = dequantize(made, torch.float64)
    assert bool(values.isfinite().all())
    assert made.scale.float().isfinite().all()
    lost = (values - weight).square().sum(dim=1) / weight.double().square().sum(dim=1)
    # Below the largest weight by 6 * 448 * 2^9 / 0.25 nothing is left in nvfp4; mxfp4's scales reach all of it.
    kept = lost > -1 if form == "mxfp4" else weight.abs().amax(dim=1) > weight.abs().max() / 2**16
    assert float(lost[kept].max()) < 0.03
    assert bool((lost <= 1).all())


def test_subnormal_weights_keep_what_the_formats_can_say():
    weight = noise(8, 64) * 1e-39
    assert squared_error(weight, quantize(weight)) < 0.02
    assert squared_error(weight * 1e-3, quantize(weight * 1e-3)) <= 1
    tiny = quantize(weight, "mxfp4")  # its smallest value, 2^-128, is 3e-39
    assert squared_error(weight, tiny) < 1
    assert set(dequantize(tiny, torch.float64).unique().tolist()) <= {0.0, 2.0**-128, -(2.0**-128)}


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_stay_zeros(form):
    for zeros in (torch.zeros(3, 50), -torch.zeros(3, 50)):
        made = check(quantize(zeros, form))
        assert not made.packed.any()
        assert not uint8(made.scale).any()
        assert torch.equal(dequantize(made, torch.float32), torch.zeros(3, 50))
    weight = noise(3, 96)
    weight[1, 32:64] = 0
    made = quantize(weight, form)
    assert not unpack(made.packed, 96)[1, 32:64].any()
    assert torch.equal(uint8(made.scale)[1] == 0, torch.arange(made.scale.shape[1]) * BLOCK[form] // 32 == 1)


@pytest.mark.parametrize("form", FORMATS)
def test_a_negative_that_rounds_to_zero_has_no_sign(form):
    weight = torch.tensor([[6.0, -0.0, -0.01, 0.01, -1e-30] + [0.0] * 27])
    assert unpack(quantize(weight, form).packed, 32)[0, 1:].tolist() == [0] * 31


@pytest.mark.parametrize("form", FORMATS)
def test_a_huge_outlier_costs_its_own_block_alone(form):
    weight = noise(8, 256)
    clean = quantize(weight, form)
    weight[2, 40] = 1e4
    made = quantize(weight, form)
    assert abs(float(dequantize(made, torch.float32)[2, 40]) / 1e4 - 1) < 0.2
    before, after = (dequantize(each, torch.float64) for each in (clean, made))
    others = torch.ones(8, 256, dtype=torch.bool)
    others[2, 32:64] = False
    # nvfp4's scales are coarser far below the largest; mxfp4's are what they were.
    assert float((after - weight)[others].square().sum() / weight.double()[others].square().sum()) < 0.02
    assert form == "nvfp4" or torch.equal(after[others], before[others])


@pytest.mark.parametrize("form", FORMATS)
def test_rows_do_not_depend_on_each_other(form):
    weight = noise(9, 100)
    made = quantize(weight, form)
    order = torch.tensor([3, 1, 4, 0, 8, 2, 6, 5, 7])
    assert_same(quantize(weight[order], form), made._replace(packed=made.packed[order], scale=made.scale[order]))
    for row in range(9):
        packed, scale = quantize_rows(weight[row : row + 1], get_format(form), made.global_scale, None)
        assert torch.equal(packed[0], made.packed[row])
        assert torch.equal(scale[0], uint8(made.scale)[row])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", [1, 100, 350, 899])
def test_slabs_are_the_whole(form, size, monkeypatch):
    weight, importance = noise(2, 9, 100), noise(100, seed=1).square()
    whole = quantize(weight, form, importance=importance)
    monkeypatch.setattr(quantizer, "SLAB_WEIGHTS", size)
    assert_same(quantize(weight, form, importance=importance), whole)


@pytest.mark.parametrize("form", FORMATS)
def test_experts_are_quantised_each_alone(form):
    weight = noise(2, 3, 5, 70) * torch.logspace(-6, 6, 6).view(2, 3, 1, 1)
    made = check(quantize(weight, form))
    assert made.shape == weight.shape
    values = dequantize(made, torch.float32)
    for expert in [(i, j) for i in range(2) for j in range(3)]:
        alone = quantize(weight[expert], form)
        divisor = None if made.global_scale is None else made.global_scale[expert]
        assert_same(made._replace(packed=made.packed[expert], scale=made.scale[expert], global_scale=divisor), alone)
        assert torch.equal(values[expert], dequantize(alone, torch.float32))


@pytest.mark.parametrize("form", FORMATS)
def test_importance_lowers_the_error_that_it_weighs(form):
    weight, importance = noise(64, 250), noise(250, seed=1).square()
    plain, weighted = quantize(weight, form), quantize(weight, form, importance=importance)
    assert not torch.equal(uint8(plain.scale), uint8(weighted.scale))
    gain = squared_error(weight, weighted, importance) / squared_error(weight, plain, importance)
    assert gain < TOLERANCES[f"fp4_{form}_importance"].relative
    assert squared_error(weight, weighted) >= squared_error(weight, plain)


@pytest.mark.parametrize("form", FORMATS)
def test_importance_counts_inside_a_block_only(form):
    weight, importance = noise(8, 100), noise(100, seed=1).square()
    expected = quantize(weight, form, importance=importance)
    for factor in (2.0**-70, 2.0**70):
        assert_same(quantize(weight, form, importance=importance * factor), expected)
    assert_same(quantize(weight, form, importance=importance.double()), expected)
    for uniform in (0.0, 1.0, 3e38):  # none, some, or a lot: all alike
        assert_same(quantize(weight, form, importance=torch.full((100,), uniform)), quantize(weight, form))


@pytest.mark.parametrize("form", FORMATS)
def test_other_float_types_and_memory_orders_give_the_same(form):
    weight = noise(40, 70)
    for dtype in (torch.bfloat16, torch.float16):
        assert_same(quantize(weight.to(dtype), form), quantize(weight.to(dtype).float(), form))
    assert_same(quantize(weight.double(), form), quantize(weight, form))
    assert_same(quantize(weight.T.contiguous().T, form), quantize(weight, form))
    experts = noise(3, 40, 70)
    assert_same(quantize(experts.transpose(1, 2).contiguous().transpose(1, 2), form), quantize(experts, form))
    parameter = quantize(torch.nn.Parameter(weight), form)
    assert not any(each is not None and each.requires_grad for each in parameter[:3])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 2.0**127, -(2.0**127)])
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_not_finite_is_refused(form, value):
    for dtype in (torch.float32, torch.bfloat16):
        weight = noise(2, 3, 40).to(dtype)
        weight[1, 2, 39] = value
        with pytest.raises(InputError, match="not finite, or not below 2\\^127"):
            quantize(weight, form)
    largest = torch.full((1, 32), 2.0**127).nextafter(torch.zeros(1))
    assert squared_error(largest, quantize(largest, form)) < 0.02
    with pytest.raises(InputError, match="not finite"):
        quantize(torch.full((1, 32), 1e300, dtype=torch.float64), form)


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.zeros(4, 16, dtype=torch.int8), {}, r"expected a weight .* got torch.int8 \[4, 16\]"),
        (torch.zeros(4, 16).to(torch.float8_e4m3fn), {}, "got torch.float8_e4m3fn"),
        (torch.zeros(16), {}, r"got torch.float32 \[16\]"),
        (torch.zeros(0, 16), {}, "that is not empty, got"),
        (torch.zeros(4, 0), {}, "that is not empty, got"),
        (torch.zeros(4, 16), {"format": "fp4"}, "expected nvfp4 or mxfp4, got 'fp4'"),
        (torch.zeros(4, 16), {"importance": torch.ones(4)}, r"importance: expected \[16\], got \[4\]"),
        (torch.zeros(4, 2), {"importance": torch.tensor([1.0, -1.0])}, "importance: expected finite values of 0"),
        (torch.zeros(4, 2), {"importance": torch.tensor([1.0, torch.nan])}, "importance: expected finite values"),
        (torch.zeros(4, 2), {"importance": torch.tensor([1.0, torch.inf])}, "importance: expected finite values"),
    ],
)
def test_bad_input_is_named(weight, options, message):
    with pytest.raises(InputError, match=message):
        quantize(weight, **options)


def test_formats_cost_what_they_say():
    for form in (NVFP4, MXFP4):
        made = quantize(noise(64, 1024), form.name)
        assert 8 * (made.packed.nbytes + made.scale.nbytes) == form.bits * 64 * 1024


def test_weights_may_share_a_global_scale():
    whole = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    whole[5, 7] = 40.0
    parts = [quantize(part, amax=whole.abs().amax()) for part in whole.split(4)]
    together = quantize(whole)
    assert torch.equal(torch.cat([part.packed for part in parts]), together.packed)
    assert all(torch.equal(part.global_scale, together.global_scale) for part in parts)
    assert not torch.equal(quantize(whole[:4]).global_scale, together.global_scale)
    assert torch.equal(quantize(whole[:4], amax=torch.tensor(1e-3)).global_scale, quantize(whole[:4]).global_scale)
    assert torch.equal(
        quantize(whole[:4], "mxfp4", amax=torch.tensor(99.0)).packed, quantize(whole[:4], "mxfp4").packed
    )
    with pytest.raises(InputError, match="not finite"):
        quantize(whole, amax=torch.tensor(torch.inf))
