"""FP4 products with both operands in E4M3: the definition by hand, and the kernels against it.

Triton's interpreter rounds to E4M3 wrongly, so there the kernels write fp32, which torch rounds.
"""

import itertools

import pytest
import torch
from test_fp4_kernels import CUDA, DEVICE, _poisoned_memory, as_a_layer_has_it, on_gpu, packed, rows_of  # noqa: F401
from tolerances import TOLERANCES

from apt_model.core.errors import ConfigError, DeviceError, InputError
from apt_model.ops import fp4
from apt_model.ops.fp4 import fp8, launch, naive, select, slab
from apt_model.ops.fp4.format import PackedWeight
from apt_model.ops.fp4.layout import shuffle

needs_triton = pytest.mark.skipif(not fp8.slab.HAS_TRITON, reason="the kernels need Triton")
E4M3, LARGEST = torch.float8_e4m3fn, 448.0
HAS_FP8 = CUDA and torch.cuda.get_device_capability() >= (8, 9)
FORMATS = ("nvfp4", "mxfp4")
MANY = fp8.FP8_ROWS + 6


def on_fp8_units(test):
    """Mark what needs a GPU with FP8 units."""
    return on_gpu(pytest.mark.skipif(CUDA and not HAS_FP8, reason="needs compute capability 8.9")(test))


@pytest.fixture
def _few_rows(monkeypatch):
    """FP8 from one row on."""
    monkeypatch.setattr(fp8, "FP8_ROWS", 1)


@pytest.fixture
def _rounded_by_torch(monkeypatch):
    """Where there are no FP8 units, kernels write fp32 and torch rounds and multiplies."""
    if HAS_FP8:
        return
    monkeypatch.setattr(naive, "E4M3", torch.float32)

    def product(x, part, bias, out):
        y = x.values.to(E4M3).double() @ part.to(E4M3).double().T * x.scales * x.rests[:, : len(part)]
        out.copy_(y if bias is None else y + bias)

    monkeypatch.setattr(fp8, "_product", product)


def exact(x, weight, bias=None, activation=None):
    """The definition with its sums in fp64."""
    x8, scale = naive.rows_in_e4m3(x)
    unit = naive.e4m3_unit(weight)
    rest = unit if weight.global_scale is None else unit / weight.global_scale
    y = x8.double() @ naive.weight_in_e4m3(weight, unit).double().T * scale.double() * rest.double()
    return naive.activate(y if bias is None else y + bias.double(), activation)


def error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


# The definition.


def test_rows_by_hand():
    x = torch.tensor([[448.0, 17, 19, -21, 0], [7, 0, -3.5, 0, 0], [0, 0, 0, 0, 0]])
    x8, scale = naive.rows_in_e4m3(x)
    assert scale.tolist()[0] == [1.0]
    assert x8[0].tolist() == [448, 16, 20, -20, 0]  # steps of 2 from 16 to 32, ties to even
    assert x8[1].tolist() == [448, 0, -224, 0, 0]
    assert scale[1].item() == pytest.approx(7 / 448)
    assert scale[2].item() == 2.0**-126
    assert not x8[2].float().any()


def weight_by_hand(form, scales, codes=(1, 2, 3, 4, 5, 6, 7, 15)):
    """Each of the codes under each of the scales, a block a scale."""
    block, each = (16, torch.float8_e4m3fn) if form == "nvfp4" else (32, torch.uint8)
    row = torch.tensor([code for _ in scales for code in (*codes, *[0] * (block - len(codes)))], dtype=torch.uint8)
    scale = torch.tensor([scales], dtype=torch.float32).to(each)
    divisor = torch.full((1,), 4.0) if form == "nvfp4" else None
    return PackedWeight(row[None, ::2] | row[None, 1::2] << 4, scale, divisor, block * len(scales))


def test_nvfp4_is_rounded_a_second_time():
    weight = weight_by_hand("nvfp4", [9, 448])
    unit = naive.e4m3_unit(weight)
    assert unit.tolist() == [8]
    w8 = (naive.weight_in_e4m3(weight, unit).float() * unit)[0].view(2, 16)[:, :8].tolist()
    assert w8[0] == [4.5, 9, 14, 18, 28, 36, 56, -56]  # 13.5, 27 and 54 lie between two
    assert w8[1] == [224, 448, 640, 896, 1280, 1792, 2560, -2560]  # 672, 1344 and 2688, of which 7 * 3 = 21 is 20


def test_mxfp4_is_exact_to_fourteen_powers_of_two_below_its_largest():
    weight = weight_by_hand("mxfp4", [150, 136, 135, 100])
    unit = naive.e4m3_unit(weight)
    assert unit.tolist() == [2.0 ** (150 - 127 - 6)]
    w8 = (naive.weight_in_e4m3(weight, unit).double() * unit)[0].view(4, 32)[:, :8]
    plain = naive.dequantize(weight, torch.float64)[0].view(4, 32)[:, :8]
    assert torch.equal(w8[:2], plain[:2])
    assert (w8[2] / unit * 2**9).tolist() == [0, 1, 2, 2, 3, 4, 6, -6]  # halves go to the even one
    assert not w8[3].any()


def test_a_scale_that_is_no_number_does_not_make_the_others_zero():
    weight = weight_by_hand("mxfp4", [120, 255])
    assert naive.e4m3_unit(weight).tolist() == [2.0 ** (120 - 127 - 6)]
    weight.scale.fill_(0)
    assert naive.e4m3_unit(weight).tolist() == [2.0**-126]


@pytest.mark.parametrize("form", FORMATS)
def test_the_linear_by_hand(form):
    weight = weight_by_hand(form, [9] if form == "nvfp4" else [130])
    x = torch.zeros(1, weight.in_features)
    x[0, :4] = torch.tensor([448.0, 17, 19, 3])
    values = [4.5, 9, 14, 18] if form == "nvfp4" else [4.0, 8, 12, 16]
    divisor = 4 if form == "nvfp4" else 1
    expected = sum(a * b for a, b in zip([448, 16, 20, 3], values, strict=True)) / divisor
    assert naive.linear_in_e4m3(x, weight).item() == expected
    assert naive.linear_in_e4m3(x, weight, torch.tensor([-expected - 1]), "relu").item() == 0


@pytest.mark.parametrize("form", FORMATS)
def test_what_the_rounding_costs(form):
    """Beside W4A16, on Gaussian operands."""
    draw = torch.Generator().manual_seed(1)
    plain, x = (torch.randn(1024, 1024, generator=draw) for _ in range(2))
    weight = fp4.quantize(plain, form)
    unit = naive.e4m3_unit(weight)
    rest = unit if weight.global_scale is None else unit / weight.global_scale
    w8 = naive.weight_in_e4m3(weight, unit).float() * rest
    if form == "nvfp4":
        squared = float((w8 - plain).square().sum() / plain.square().sum())
        assert squared < TOLERANCES["fp8_nvfp4_weight"].relative
    else:
        assert torch.equal(w8, naive.dequantize(weight, torch.float32))
    limit = TOLERANCES[f"fp8_{form}_output"].relative
    assert error(naive.linear_in_e4m3(x, weight), naive.linear(x, weight)) < limit


def test_a_weight_in_slabs_has_one_unit(monkeypatch):
    weight = packed(8, 64, "mxfp4")
    weight = PackedWeight(*(None if part is None else part.cpu() for part in weight[:3]), 64)
    weight.scale[:4] -= 20
    x = rows_of(fp8.FP8_ROWS, 64, torch.float32).cpu()
    expected = naive.linear_in_e4m3(x, weight)
    monkeypatch.setattr(naive, "SLAB_WEIGHTS", 128)
    got = select.definition(x, weight, None, None, in_fp8=True)
    assert error(got[:, :4], expected[:, :4]) < 1e-6
    alone = weight._replace(packed=weight.packed[:4], scale=weight.scale[:4])
    assert error(naive.linear_in_e4m3(x, alone), expected[:, :4]) > 0.01


@pytest.mark.parametrize("form", FORMATS)
def test_torch_s_default_type_changes_no_number_of_an_order(form):
    weight = packed(8, 64, form)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        alpha = shuffle(weight, torch.bfloat16).alpha
        assert naive.e4m3_unit(weight).dtype == alpha.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(alpha, shuffle(weight, torch.bfloat16).alpha)


# The kernels.


def strange_rows(width, dtype):
    """Rows that are zero, huge, tiny, and no numbers, beside common ones."""
    x = rows_of(12, width, torch.float32)
    x[1] = 0
    x[2] *= torch.finfo(dtype).max / 8
    # Triton's interpreter does not know bf16's subnormal numbers.
    least = torch.finfo(dtype).smallest_normal * (1 if CUDA or dtype != torch.bfloat16 else 2**20)
    x[3] *= least
    x[4] = least / 2
    x[5, width // 2] = torch.inf
    x[6, -1] = torch.nan
    x[7, 0] = -torch.inf
    x[8] = torch.finfo(dtype).max
    return x.to(dtype)


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.usefixtures("_rounded_by_torch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 63, 1000, 4097])
def test_rows_are_the_definition_bit_for_bit(width, dtype):
    x = strange_rows(width, dtype)
    rest = torch.full((1,), 3.5, device=DEVICE)
    got = fp8.quantize_rows(x, rest, 100)
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) * naive.TO_E4M3).clamp_min(naive.SMALLEST)
    expected = (wide * (1 / scale)).to(E4M3).float()
    assert got.values.shape == (12, -(-width // 16) * 16)
    assert not got.values[:5, width:].float().any()
    torch.testing.assert_close(got.values[:, :width].to(E4M3).float(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.scales, scale, rtol=0, atol=0, equal_nan=True)
    assert got.rests.tolist() == [[3.5] * 100]
    assert expected[5:8].isnan().any(-1).all()


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.usefixtures("_rounded_by_torch")
def test_rows_wider_than_a_program_are_read_twice(monkeypatch):
    monkeypatch.setattr(fp8, "_WIDEST", 64)
    assert fp8.block(64) == (64, True)
    assert fp8.block(1008) == (64, False)
    x = strange_rows(1000, torch.float32)
    got = fp8.quantize_rows(x, torch.ones(1, device=DEVICE), 5)
    monkeypatch.undo()
    x8, scale = naive.rows_in_e4m3(x)
    torch.testing.assert_close(got.values[:, :1000].to(E4M3).float(), x8.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.scales, scale, rtol=0, atol=0, equal_nan=True)
    assert not got.values[:5, 1000:].float().any()


@needs_triton
@pytest.mark.usefixtures("_rounded_by_torch")
@pytest.mark.parametrize(
    "cut",
    [lambda x: x[:, 3:67], lambda x: x[::2], lambda x: x.T, lambda x: x[:1].expand(7, -1)],
    ids=["columns", "every other row", "crossed", "repeated"],
)
def test_rows_from_any_memory(cut):
    x = cut(rows_of(100, 100, torch.float32))
    got = fp8.quantize_rows(x, torch.ones(1, device=DEVICE), 300)
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) * naive.TO_E4M3).clamp_min(naive.SMALLEST)
    assert torch.equal(got.values[:, : x.shape[1]].to(E4M3).float(), (wide * (1 / scale)).to(E4M3).float())
    assert torch.equal(got.scales, scale)
    assert got.rests.tolist() == [[1.0] * 300]


@needs_triton
@pytest.mark.parametrize("order", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 63), (70, 300), (130, 520)])
def test_unpacking_to_e4m3_is_the_definition_bit_for_bit(rows, width, form, order):
    if not CUDA and rows > 70:
        pytest.skip("Triton's interpreter is slow")
    weight = packed(rows, width, form)
    ready = weight if order is None else shuffle(weight, order)
    rest, unit = fp8._factors(ready)
    memory = torch.full((rows, width), torch.nan, device=DEVICE, dtype=E4M3 if HAS_FP8 else torch.float32)
    got = slab.unpack(ready._replace(global_scale=unit), memory).to(E4M3)
    assert torch.equal(got.float(), naive.weight_in_e4m3(weight, naive.e4m3_unit(weight)).float())
    assert torch.equal(unit, naive.e4m3_unit(weight))
    assert torch.equal(rest, unit if weight.global_scale is None else unit / weight.global_scale)


@needs_triton
@pytest.mark.usefixtures("_rounded_by_torch")
@pytest.mark.parametrize(
    ("order", "activation"),
    [
        (None, None),
        (None, "swiglu"),
        (False, None),
        (False, "relu"),
        (False, "gelu"),
        (False, "swiglu"),
        (True, "swiglu"),
    ],
)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("biased", [False, True])
def test_the_launches_together(form, order, activation, biased, monkeypatch):
    """Slabs of 256 rows, the last of them in part there; K and N no multiples of 16; `order` says whether gated."""
    monkeypatch.setattr(slab, "SLAB_BYTES", 2**14)
    weight = packed(300, 50, form)
    bias = rows_of(1, 300, torch.float32, seed=3)[0] if biased else None
    x = rows_of(9, 50, torch.float32) * 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(naive, "E4M3", E4M3)
        expected = exact(x, weight, bias, activation)
    ready = weight if order is None else shuffle(weight, torch.bfloat16, gated=order)
    got = fp8.linear(x, ready, bias, activation)
    assert got.shape == expected.shape
    assert got.is_contiguous() or order is True
    assert error(got, expected) < (TOLERANCES["fp8_fast_sums"].relative if HAS_FP8 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("cublas", [False, True])
def test_a_product_writes_its_columns_and_no_others(cublas, biased, dtype, monkeypatch):
    if CUDA and not HAS_FP8:
        pytest.skip("needs compute capability 8.9")
    if not (cublas and HAS_FP8 and fp8._by_cublas(torch.device(DEVICE, 0))):
        monkeypatch.setattr(fp8, "_by_cublas", lambda _: cublas and not CUDA)
    x8, part = (rows_of(count, 64, torch.float32, seed).to(E4M3) for count, seed in ((20, 1), (32, 2)))
    scales, rests = rows_of(20, 1, torch.float32, 3).abs() + 0.1, torch.full((1, 48), 0.25, device=DEVICE)
    bias = rows_of(1, 32, dtype, 4)[0] if biased else None
    out = torch.full((20, 80), 7.0, device=DEVICE, dtype=dtype)
    fp8._product(fp8.Rows(x8, scales, rests), part, bias, out[:, 16:48])
    expected = x8.double() @ part.double().T * scales * 0.25
    expected = expected if bias is None else expected + bias.double()
    assert error(out[:, 16:48], expected) < TOLERANCES["fp8_fast_sums"].relative
    assert (out[:, :16] == 7).all()
    assert (out[:, 48:] == 7).all()


def test_where_the_product_is_cublas_s(monkeypatch):
    for capability, toolkit, expected in (
        ((9, 0), (13, 0), True), ((9, 0), (12, 9), True), ((9, 0), (12, 8), False), ((8, 9), (13, 0), False),
        ((10, 0), (13, 0), False), ((12, 0), (13, 0), False),
    ):  # fmt: skip
        fp8._by_cublas.cache_clear()
        monkeypatch.setattr(launch, "facts", lambda _, found=capability: (found, 100))
        monkeypatch.setattr(fp8.CudaDevice, "toolkit", staticmethod(lambda found=toolkit: found))
        assert fp8._by_cublas(torch.device("cuda", 0)) is expected
    fp8._by_cublas.cache_clear()


# What is chosen.


def test_few_rows_are_taken_as_they_are():
    weight, x = fp4.quantize(rows_of(64, 96, torch.float32).cpu(), "nvfp4"), rows_of(fp8.FP8_ROWS, 96).cpu()
    many = fp4.linear(x, weight, activation_dtype="fp8")
    assert torch.equal(many, naive.linear_in_e4m3(x, weight))
    assert not torch.equal(many, fp4.linear(x, weight))
    assert torch.equal(fp4.linear(x[1:], weight, activation_dtype="fp8"), fp4.linear(x[1:], weight))
    stacked = fp4.linear(x.view(2, -1, 96), weight, activation_dtype="fp8")
    assert torch.equal(stacked.view(-1, 64), many)


def test_it_says_from_how_many_rows_on():
    weight = fp4.quantize(rows_of(64, 96, torch.float32).cpu(), "nvfp4")
    text = fp4.explain(fp8.FP8_ROWS, weight, torch.bfloat16, None, "fp8")
    assert text == (
        f"{fp8.FP8_ROWS} x 96 by 64 x 96 in nvfp4: the definition in torch with x and the weight in E4M3, from "
        f"{fp8.FP8_ROWS} rows on with activation_dtype 'fp8'"
    )
    few = fp4.explain(1, weight, torch.bfloat16, None, "fp8")
    assert few == fp4.explain(1, weight, torch.bfloat16) + f" (activation_dtype 'fp8' begins at {fp8.FP8_ROWS} rows)"


def test_types_that_do_not_go_to_e4m3_are_refused_whatever_the_number_of_rows():
    weight = fp4.quantize(torch.randn(8, 16), "nvfp4")
    for call in (
        lambda: fp4.linear(torch.ones(1, 16, dtype=torch.float64), weight, activation_dtype="fp8"),
        lambda: fp4.explain(1, weight, torch.float64, None, "fp8"),
    ):
        with pytest.raises(InputError, match=r"expected x in float32, bfloat16 or float16 .* got torch.float64"):
            call()
    with pytest.raises(ConfigError, match=r"activation_dtype: expected None or 'fp8', got 'int8'"):
        fp4.linear(torch.ones(1, 16), weight, activation_dtype="int8")


@pytest.mark.parametrize(
    ("capability", "said"), [((8, 0), "got 8.0"), ((0, 0), "got one of another maker"), ((8, 9), None), ((12, 0), None)]
)
def test_a_gpu_without_fp8_units_is_refused_with_what_to_do(capability, said, monkeypatch):
    monkeypatch.setattr(launch, "facts", lambda _: (capability, 100))
    gpu = torch.device("cuda", 0)
    if said is None:
        assert [fp8.serves(rows, gpu) for rows in (1, fp8.FP8_ROWS)] == [False, True]
        return
    with pytest.raises(DeviceError, match=f"compute capability 8.9 or later, {said}") as caught:
        fp8.serves(1, gpu)
    assert "activation_dtype = None" in str(caught.value)


@pytest.mark.usefixtures("_few_rows")
@pytest.mark.parametrize("activation", [None, "silu", "swiglu"])
def test_a_gradient_sees_no_rounding_of_its_operands(activation):
    weight, bias = fp4.quantize(rows_of(32, 48, torch.float32).cpu(), "nvfp4"), torch.randn(32)
    results = []
    for kind in ("fp8", None):
        x, b = rows_of(5, 48, torch.float32).cpu().requires_grad_(), bias.clone().requires_grad_()
        y = fp4.linear(x, weight, b, activation, kind)
        results.append((y, *torch.autograd.grad(y.sum(), [x, b])))
    assert not torch.equal(results[0][0], results[1][0])
    if activation is None:
        assert torch.equal(results[0][1], results[1][1])
        assert torch.equal(results[0][2], results[1][2])
    else:  # the activation's own gradient is taken at what came out
        assert error(results[0][1], results[1][1]) < 0.1


# On a GPU.


@on_fp8_units
@pytest.mark.usefixtures("_few_rows")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("fast", [False, True])
def test_odd_sizes_on_a_gpu(form, dtype, fast, monkeypatch):
    monkeypatch.setattr(fp8, "FAST_ACCUMULATION", fast)
    limit = TOLERANCES["fp8_fast_sums" if fast else "fp8_sums"].relative
    for count, rows, width in itertools.product((1, 63, 1000, 4097), repeat=3):
        weight, bias = packed(rows, width, form), rows_of(1, rows, dtype, seed=3)[0]
        scale = 0.02 / float(naive.dequantize(weight, torch.float32).std(correction=0).clamp_min(1e-3))
        x = (rows_of(count, width, torch.float32) * scale).to(dtype)
        for ready in (weight, as_a_layer_has_it(weight, dtype)):
            got = fp4.linear(x, ready, bias, None, "fp8")
            assert got.dtype == dtype
            assert error(got, exact(x, weight, bias)) < limit, (count, rows, width)


@on_fp8_units
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu", "swiglu"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_activation_on_a_gpu(form, activation, dtype):
    weight, bias = packed(1000, 960, form), rows_of(1, 1000, dtype, seed=3)[0]
    scale = 0.02 / float(naive.dequantize(weight, torch.float32).std())
    x = (rows_of(MANY, 960, torch.float32) * scale).to(dtype)
    ready = as_a_layer_has_it(weight, dtype, activation)
    got = fp4.linear(x, ready, bias, activation, "fp8")
    assert error(got, exact(x, weight, bias, activation)) < 1.5 * TOLERANCES["fp8_fast_sums"].relative
    assert "in E4M3 for torch's own product" in fp4.explain(MANY, ready, dtype, activation, "fp8")
    assert "in E4M3" not in fp4.explain(7, ready, dtype, activation, "fp8").replace("begins", "")


@on_fp8_units
def test_a_row_does_not_depend_on_the_others():
    weight, x = shuffle(packed(320, 512), torch.bfloat16), rows_of(MANY, 512)
    alone = fp4.linear(x, weight, activation_dtype="fp8")
    others = x.clone()
    others[1:300], others[300:] = torch.nan, torch.inf
    got = fp4.linear(others, weight, activation_dtype="fp8")
    assert torch.equal(got[0], alone[0])
    assert got[1:].isnan().all()


@on_fp8_units
def test_gradients_on_a_gpu_are_those_without_it():
    weight, upstream = shuffle(packed(1000, 960), torch.bfloat16), rows_of(MANY, 1000, seed=5)
    grads = []
    for kind in ("fp8", None):
        x, bias = rows_of(MANY, 960).requires_grad_(), rows_of(1, 1000, seed=3)[0].requires_grad_()
        grads.append(torch.autograd.grad(fp4.linear(x, weight, bias, None, kind), [x, bias], upstream))
    for got, expected in zip(*grads, strict=True):
        assert torch.equal(got, expected)


@on_fp8_units
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's imports
def test_compiled_and_in_a_cuda_graph():
    weight, x = shuffle(packed(320, 512), torch.bfloat16), rows_of(MANY, 512)
    function = lambda x: fp4.linear(x, weight, None, "silu", "fp8")  # noqa: E731
    expected = function(x)
    torch.compiler.reset()
    assert torch.equal(torch.compile(function, fullgraph=True)(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(x)
    x.copy_(rows_of(MANY, 512, seed=8))
    graph.replay()
    assert torch.equal(out, function(x))
    assert not torch.equal(out, expected)


@on_fp8_units
@pytest.mark.parametrize("form", FORMATS)
def test_it_takes_x_in_e4m3_and_one_slab_of_memory(form):
    weight, x = shuffle(packed(16384, 4096, form), torch.bfloat16), rows_of(4096, 4096)
    fp4.linear(x, weight, activation_dtype="fp8")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = fp4.linear(x, weight, activation_dtype="fp8")
    most = out.nbytes + x.numel() + slab.SLAB_BYTES + 2**20
    assert torch.cuda.max_memory_allocated() - before <= most
