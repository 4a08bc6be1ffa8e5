"""The two formats against tables and definitions that share nothing with the code."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_model.core.errors import InputError
from apt_model.core.fp4_storage import row_bytes
from apt_model.ops.fp4 import MXFP4, NVFP4, PackedWeight, check, dequantize, get_format
from apt_model.ops.fp4.format import code_values, pack, row_blocks, scale_values, spread, unpack
from apt_model.ops.fp4.naive import unscaled

# E2M1 by hand: sign, two bits of exponent with bias 1, one bit of mantissa.
TABLE = {
    0b0000: 0.0, 0b0001: 0.5, 0b0010: 1.0, 0b0011: 1.5, 0b0100: 2.0, 0b0101: 3.0, 0b0110: 4.0, 0b0111: 6.0,
    0b1000: -0.0, 0b1001: -0.5, 0b1010: -1.0, 0b1011: -1.5, 0b1100: -2.0, 0b1101: -3.0, 0b1110: -4.0, 0b1111: -6.0,
}  # fmt: skip
SIZES = (1, 15, 16, 17, 63, 1000, 4097)


def random_codes(*shape, seed=0):
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def random_weight(form, *shape, seed=0):
    """Any codes with any scales that are numbers, the larger E8M0 ones left out so that products stay finite."""
    generator = torch.Generator().manual_seed(seed)
    width, lead = shape[-1], shape[:-1]
    scale = torch.randint(0, 127 if form is NVFP4 else 250, (*lead, row_blocks(width, form)), generator=generator)
    divisor = torch.rand(*lead[:-1], 1, generator=generator) * 1000 + 0.1 if form is NVFP4 else None
    return PackedWeight(
        pack(random_codes(*shape, seed=seed)), scale.to(torch.uint8).view(form.scale_dtype), divisor, width
    )


def e4m3(byte):
    """OCP 8-bit floating point, E4M3: bias 7, no infinities, NaN where all bits below the sign are set."""
    sign, exponent, mantissa = -1 if byte & 128 else 1, byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return None
    if exponent == 0:
        return sign * Fraction(mantissa, 2**9)
    return sign * Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7)


def test_codes_stand_for_the_values_of_e2m1():
    values = code_values(torch.tensor(list(TABLE), dtype=torch.uint8))
    assert values.tolist() == list(TABLE.values())
    assert torch.signbit(values).tolist() == [code >= 8 for code in TABLE]


def test_every_e4m3_scale_is_read():
    values = scale_values(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)).tolist()
    for byte, value in enumerate(values):
        expected = e4m3(byte)
        assert math.isnan(value) if expected is None else Fraction(value) == expected, byte


def test_every_e8m0_scale_is_read():
    values = scale_values(torch.arange(256, dtype=torch.uint8)).tolist()
    assert [Fraction(value) for value in values[:255]] == [Fraction(2) ** (byte - 127) for byte in range(255)]
    assert math.isnan(values[255])


def test_the_even_input_is_in_the_low_half_of_a_byte():
    assert pack(torch.arange(1, 5, dtype=torch.uint8)).tolist() == [0x21, 0x43] + [0] * 6
    assert unpack(torch.tensor([0x21, 0xF3], dtype=torch.uint8), 4).tolist() == [1, 2, 3, 15]


@pytest.mark.parametrize("width", SIZES)
def test_packing_is_undone_and_fills_rows_with_zero_codes(width):
    codes = random_codes(2, 3, width)
    packed = pack(codes)
    assert packed.shape == (2, 3, row_bytes(width))
    assert row_bytes(width) == 8 * -(-width // 16)
    assert torch.equal(unpack(packed, width), codes)
    assert not unpack(packed, 2 * row_bytes(width))[..., width:].any()


@settings(max_examples=50, deadline=None)
@given(lead=st.lists(st.integers(0, 4), max_size=3), width=st.integers(1, 200), seed=st.integers(0, 2**31))
def test_packing_is_undone_for_any_shape(lead, width, seed):
    codes = random_codes(*lead, width, seed=seed)
    assert torch.equal(unpack(pack(codes), width), codes)


@pytest.mark.parametrize(("form", "blocks"), [(NVFP4, {1: 1, 16: 1, 17: 2, 33: 3}), (MXFP4, {1: 1, 32: 1, 33: 2})])
def test_a_scale_belongs_to_the_neighbours_of_a_block(form, blocks):
    for width, count in blocks.items():
        assert row_blocks(width, form) == count
        assert spread(torch.arange(count), form, width).tolist() == [k // form.block for k in range(width)]


def test_code_times_scale_is_exact_in_nvfp4_with_at_most_six_bits():
    """All 16 codes with all 127 scales, and after the division by a global scale that is a power of two."""
    scale = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    packed = pack(torch.arange(16, dtype=torch.uint8).expand(127, 16))
    products = unscaled(PackedWeight(packed, scale, torch.ones(1), 16))
    exact = [[Fraction(value) * e4m3(byte) for value in TABLE.values()] for byte in range(127)]
    assert [[Fraction(value) for value in row] for row in products.tolist()] == exact
    wholes = [abs(int(value * 2**10)) for row in exact for value in row if value]
    assert max((whole // (whole & -whole)).bit_length() for whole in wholes) == 6
    assert torch.equal(products.bfloat16().float(), products)
    for exponent in (-100, -1, 9, 100):
        weight = PackedWeight(packed, scale, torch.tensor([2.0**exponent]), 16)
        assert torch.equal(dequantize(weight, torch.bfloat16).double(), products.double() / 2.0**exponent)


def test_code_times_scale_is_exact_in_mxfp4():
    scale = torch.arange(253, dtype=torch.uint8)[:, None]  # 6 * 2^126 is beyond fp32
    weight = PackedWeight(pack(torch.arange(16, dtype=torch.uint8).expand(253, 16)), scale, None, 16)
    exact = torch.tensor(list(TABLE.values()), dtype=torch.float64) * 2.0 ** (torch.arange(253)[:, None] - 127).double()
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantize(weight, dtype).double(), exact)


@pytest.mark.parametrize("form", [NVFP4, MXFP4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 1), (2, 63), (2, 3, 1000), (1, 4097)])
def test_dequantising_is_compressed_tensors_own(form, dtype, shape):
    weight = check(random_weight(form, *shape))
    assert (weight.format, weight.shape) == (form, shape)
    codes = torch.stack((weight.packed & 15, weight.packed >> 4), dim=-1).flatten(-2)[..., : shape[-1]]
    values = torch.tensor(list(TABLE.values()))[codes.int()]
    scale = weight.scale.float() if form is NVFP4 else 2.0 ** (weight.scale.double() - 127)
    if form is NVFP4:
        scale = scale / weight.global_scale[..., None]
    scale = torch.stack([scale.float()] * form.block, dim=-1).flatten(-2)[..., : shape[-1]]
    assert torch.equal(dequantize(weight, dtype), (values * scale).to(dtype))


def test_formats_are_known_by_name():
    assert (get_format("nvfp4"), get_format("mxfp4")) == (NVFP4, MXFP4)
    assert [form.bits for form in (NVFP4, MXFP4)] == [4 + 8 / form.block for form in (NVFP4, MXFP4)]
    with pytest.raises(InputError, match="expected nvfp4 or mxfp4, got 'nf4'"):
        get_format("nf4")


@pytest.mark.parametrize("form", [NVFP4, MXFP4])
@pytest.mark.parametrize("shape", [(5, 40), (2, 5, 40), (0, 40)])
def test_what_fits_together_passes(form, shape):
    weight = random_weight(form, *shape)
    assert check(weight) is weight


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        (NVFP4, {"in_features": 49}, r"down_packed: expected torch.uint8 \[5, 32\] for 49 inputs in nvfp4, got .*24"),
        (NVFP4, {"packed": torch.zeros(5, 24)}, "down_packed: expected torch.uint8 .* got torch.float32"),
        (NVFP4, {"packed": torch.zeros(24, dtype=torch.uint8)}, r"down_packed: expected \[..., N, P\], got \[24\]"),
        (NVFP4, {"scale": torch.zeros(5, 2).to(torch.float8_e4m3fn)}, r"down_scale: .*\[5, 3\] .* got .*\[5, 2\]"),
        (NVFP4, {"scale": torch.zeros(5, 3, dtype=torch.uint8)}, "down_global_scale: mxfp4 has none"),
        (NVFP4, {"global_scale": None}, "down_global_scale: nvfp4 needs it"),
        (NVFP4, {"global_scale": torch.tensor(1.0)}, r"down_global_scale: expected torch.float32 \[1\] .* got .*\[\]"),
        (NVFP4, {"global_scale": torch.ones(1).double()}, "down_global_scale: .* got torch.float64"),
        (MXFP4, {"scale": torch.zeros(5, 3, dtype=torch.uint8)}, r"down_scale: expected torch.uint8 \[5, 2\] .* mxfp4"),
        (MXFP4, {"scale": torch.zeros(5, 2)}, "down_scale: expected torch.uint8 .* got torch.float32"),
        (MXFP4, {"global_scale": torch.ones(1)}, "down_global_scale: mxfp4 has none"),
    ],
)
def test_what_does_not_fit_is_named(form, change, message):
    with pytest.raises(InputError, match=message):
        check(random_weight(form, 5, 40)._replace(**change), "down")
