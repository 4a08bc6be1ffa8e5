"""The check of products, and the 8-bit wire: no false alarm, and what is caught."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_model.cloud.freivalds import INT8_REPEATS, Freivalds
from apt_model.cloud.int8g64 import GROUP, pack, unpack
from apt_model.core.errors import InputError, IntegrityError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def problem(dtype, tokens=64, width=256, out=640, kind="normal"):
    x, weight, bias = torch.randn(tokens, width), torch.randn(out, width) / 16, torch.randn(out)
    if kind == "positive":
        x, weight = x.abs(), weight.abs()
    elif kind == "outliers":
        x[:, :3] *= 100
        weight[:, 3] *= 30
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "positive", "outliers"])
def test_right_products_are_never_called_wrong(dtype, kind):
    for seed in range(20):
        torch.manual_seed(seed)
        x, weight, bias = problem(dtype, kind=kind)
        y = torch.nn.functional.linear(x, weight, bias)
        assert not Freivalds(weight, bias).wrong(x, y).any()
        assert not Freivalds(weight.T).wrong(y, y @ weight).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_in_eight_bits_is_not_called_wrong(dtype):
    for seed in range(20):
        torch.manual_seed(seed)
        x, weight, bias = problem(dtype)
        read = unpack(*pack(x), x.shape[-1], dtype)
        y = torch.nn.functional.linear(read, weight, bias)
        came = unpack(*pack(y), y.shape[-1], dtype)
        check = Freivalds(weight, bias)
        assert not check.wrong(read, came, int8=True).any()
        came[3, 5] += 3
        assert check.wrong(read, came, int8=True).tolist() == [at == 3 for at in range(64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_small_output_beside_a_large_one_is_rounded_in_the_large_ones_steps(dtype):
    x, weight, bias = problem(dtype)
    weight[::3], bias[::3] = 0, 0.01
    read = unpack(*pack(x), x.shape[-1], dtype)
    y = torch.nn.functional.linear(read, weight, bias)
    came = unpack(*pack(y), y.shape[-1], dtype)
    check = Freivalds(weight, bias, fold=GROUP, repeats=INT8_REPEATS)
    assert not check.wrong(read, came, int8=True).any()
    came[5] = 1e4
    assert check.wrong(read, came, int8=True).nonzero().tolist() == [[5]]


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.999), (torch.float16, 0.9), (torch.bfloat16, 0.4)])
def test_one_flipped_bit_is_caught(dtype, least):
    """The highest bit of the fraction, in any element: what is let through is small beside the other elements."""
    x, weight, bias = problem(dtype, tokens=2000)
    y = torch.nn.functional.linear(x, weight, bias)
    check = Freivalds(weight, bias)
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    bit = {torch.float32: 22, torch.float16: 9, torch.bfloat16: 6}[dtype]
    flipped = y.clone()
    columns = torch.randint(0, y.shape[1], (len(y),))
    rows = torch.arange(len(y))
    flipped.view(integers)[rows, columns] ^= 1 << bit
    caught = check.wrong(x, flipped)
    assert float(caught.float().mean()) >= least
    missed = ~caught
    change = (flipped - y).float().norm(dim=-1) / y.float().norm(dim=-1)
    assert float(change[missed].max() if missed.any() else 0) < 0.02


def test_other_weights_other_rows_and_no_numbers_are_caught():
    x, weight, bias = problem(torch.float32)
    y = torch.nn.functional.linear(x, weight, bias)
    check = Freivalds(weight, bias)
    assert check.wrong(x, torch.nn.functional.linear(x, weight * 1.01, bias)).all()
    assert check.wrong(x, y.roll(1, 0)).all()
    assert check.wrong(x, torch.zeros_like(y)).all()
    for bad in (float("nan"), float("inf")):
        changed = y.clone()
        changed[7, 0] = bad
        assert check.wrong(x, changed).nonzero().tolist() == [[7]]
    x[0, 0] = float("nan")  # what it multiplies is no number either
    assert not check.wrong(x, torch.nn.functional.linear(x, weight, bias)).any()
    with pytest.raises(IntegrityError, match="server: 64 of 64 tokens are not"):
        check.check(x.nan_to_num(), y * 2, "server")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bit", range(8, 16))
def test_a_scale_with_a_flipped_bit_is_caught(dtype, bit):
    """The answer is wrong by a factor then, and what it allows itself grows with it; bit 8 is a quarter, and less."""
    x, weight, bias = problem(dtype, tokens=4000)
    read = unpack(*pack(x), x.shape[-1], dtype)
    q, scale = pack(torch.nn.functional.linear(read, weight, bias))
    flipped = scale.clone()
    flipped.view(torch.int16)[:, 1] ^= torch.tensor(1 << bit if bit < 15 else -(1 << 15), dtype=torch.int16)
    came = unpack(q, flipped, bias.shape[0], dtype)
    caught = Freivalds(weight, bias, fold=GROUP, repeats=INT8_REPEATS).wrong(read, came, int8=True)
    assert float(caught.float().mean()) >= (0.9 if bit == 8 else 0.99)
    good = unpack(q, scale, bias.shape[0], dtype)
    assert not Freivalds(weight, bias, fold=GROUP, repeats=INT8_REPEATS).wrong(read, good, int8=True).any()


def test_nothing_is_larger_than_the_weights_allow():
    x, weight, bias = problem(torch.float32)
    y = torch.nn.functional.linear(x, weight, bias)
    y[5] = 1e30  # all of one size, with any signs: the folds of such a row allow themselves as much
    assert Freivalds(weight, bias).wrong(x, y).nonzero().tolist() == [[5]]


def test_answers_of_next_to_nothing_are_no_false_alarm():
    x, weight, bias = problem(torch.float16)
    x, bias = x * 1e-6, bias * 0
    y = torch.nn.functional.linear(x.float(), weight.float(), bias.float()).half()
    assert not Freivalds(weight, bias).wrong(x, y).any()


def test_zeros_and_no_bias():
    weight = torch.randn(100, 50)
    x = torch.zeros(3, 50)
    assert not Freivalds(weight).wrong(x, torch.zeros(3, 100)).any()
    assert Freivalds(weight).wrong(x, torch.full((3, 100), 1e-3)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "out"), [(256, 640), (300, 64 * 17 + 5), (48, 4100)])
def test_few_right_tokens_need_a_verdict_and_nearly_all_that_it_calls_wrong_get_one(dtype, width, out):
    tokens = 1_280_000 // out
    x, weight, bias = problem(dtype, tokens=tokens, width=width, out=out)
    y = torch.nn.functional.linear(x, weight, bias)
    check = Freivalds(weight, bias)
    assert check._suspicion.of(x, y).float().mean() < 0.15
    called, passed = 0, 0
    for count in (1, 2, 64, out):
        for size in (1.0, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5, 3e-6):
            error = torch.randn(tokens, count)
            error *= size * y.float().norm(dim=1, keepdim=True) / error.norm(dim=1, keepdim=True)
            wrong = y.float()
            at = int(torch.randint(0, out - count + 1, ()))
            wrong[:, at : at + count] += error
            wrong = wrong.to(dtype)
            by_all = check._verdict(x, wrong, int8=False)
            found = check.wrong(x, wrong)
            assert not (found & ~by_all).any()
            called, passed = called + int(by_all.sum()), passed + int((by_all & ~found).sum())
    # These are near what is allowed: where their errors in two folds are of opposite signs, the sum may be small.
    assert passed < 0.02 * called


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e20, 1e36])
def test_numbers_whose_squares_leave_the_range_are_judged_as_others(dtype, size):
    x, weight, bias = problem(dtype)
    x, bias = x * size, bias * size
    y = torch.nn.functional.linear(x, weight, bias)
    assert y.isfinite().all()
    check = Freivalds(weight, bias)
    assert not check.wrong(x, y).any()
    assert check.wrong(x, y.roll(1, 0)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out", [640, 1000])
def test_many_tokens_are_looked_at_in_parts(dtype, out):
    x, weight, bias = problem(dtype, tokens=5000, out=out)
    check = Freivalds(weight, bias)
    with torch.inference_mode():  # what it keeps is used outside as well
        y = torch.nn.functional.linear(x, weight, bias)
        assert not check.wrong(x, y).any()
    y = y.clone()
    places = [0, 523, 524, 2500, 4999]
    y[places, 7] += 100
    assert check.wrong(x, y).nonzero()[:, 0].tolist() == places
    assert check.wrong(x[:0], y[:0]).shape == (0,)


# --- int8g64


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=130), elements=st.floats(-1e4, 1e4, width=32)
    )
)
def test_each_value_is_within_half_a_step_of_its_group(values):
    x = torch.from_numpy(values)
    q, scale = pack(x)
    width = x.shape[-1]
    assert (q.shape, scale.shape) == (x.shape, (*x.shape[:-1], -(-width // 64)))
    step = scale.float().repeat_interleave(64, -1)[..., :width]
    # The scale is rounded to fp16, so that the largest may be cut by half an fp16 step of it.
    bound = step * (0.5 + 127 * 2**-11) + 127 * 2**-25
    assert ((unpack(q, scale, width, torch.float32) - x).abs() <= bound).all()


def test_zero_groups_have_scale_zero_and_bytes_are_as_said():
    x = torch.zeros(2, 4096)
    x[0, 64:128] = torch.linspace(-1, 1, 64)
    q, scale = pack(x)
    assert scale.count_nonzero() == 1
    assert q.nbytes + scale.nbytes == 2 * 4224
    assert torch.equal(unpack(q, scale, 4096, torch.float32)[1], x[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_has_no_scale_is_refused(bad):
    with pytest.raises(InputError, match="int8g64"):
        pack(torch.tensor([1.0, bad]))


def test_shapes_that_do_not_belong_together_are_refused():
    q, scale = pack(torch.randn(2, 100))
    for wrong in ((q, scale, 99), (q, scale[:, :1], 100), (q.float(), scale, 100), (q, scale.float(), 100)):
        with pytest.raises(InputError, match="int8g64: expected"):
            unpack(*wrong, torch.float32)


def test_an_input_that_came_wrong_is_noticed():
    """It moves every output: a single fold lets one in a hundred of these pass, as their sum is near 0."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(96, 64, generator=generator)
    x = torch.randn(1, 64, generator=generator)
    came = x.clone()
    came[:, 5] += 0.004 * x.norm() / 8  # the product is off by 0.0005 of its length
    y = came @ weight.T
    passed = {
        repeats: sum(not Freivalds(weight, repeats=repeats).wrong(x, y) for _ in range(1500)) for repeats in (1, 3)
    }
    assert passed[1] > 3
    assert passed[3] <= 1
