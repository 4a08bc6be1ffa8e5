"""The FP4 products against `naive.py` on the same operands: what runs without a GPU here, the rest with one."""

import itertools

import pytest
import torch

from apt_model.ops import fp4
from apt_model.ops.fp4 import launch, naive, plan, select, slab
from apt_model.ops.fp4.format import PackedWeight
from apt_model.ops.fp4.layout import shuffle, shuffle_if_reversible, unshuffle
from apt_model.ops.fp4.tables import Decode, Tile

pytest.importorskip("triton", reason="the kernels need Triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = (1, 63, 1000, 4097)
HOPPER = CUDA and torch.cuda.get_device_capability() == (9, 0)
ERRORS = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""Norm of the difference over the norm: fp32 sums in another order, and one rounding of the result."""


def on_gpu(test):
    """Mark what needs a CUDA device."""
    return pytest.mark.gpu(pytest.mark.skipif(not CUDA, reason="needs a CUDA device")(test))


@pytest.fixture(autouse=CUDA)
def _poisoned_memory():
    """What a test allocates without filling it holds NaN."""
    held = [torch.full((size // 4,), torch.nan, device=DEVICE) for size in (2**27, *[2**19] * 64, *[2**11] * 256)]
    del held


def packed(rows, width, form="nvfp4", seed=0, *, divisor=48.0):
    """Random codes, zero blocks and scales over many binades among them; a divisor that is no power of two."""
    draw = torch.Generator().manual_seed(seed)
    block = 16 if form == "nvfp4" else 32
    codes = torch.randint(0, 256, (rows, -(-width // 16) * 8), generator=draw, dtype=torch.uint8)
    if width % 16:
        codes[:, width // 2 + width % 2 :] = 0
        if width % 2:
            codes[:, width // 2] &= 15
    low, high = (0x08, 0x60) if form == "nvfp4" else (110, 130)
    scale = torch.randint(low, high, (rows, -(-width // block)), generator=draw, dtype=torch.uint8)
    if form == "mxfp4":
        return _to(PackedWeight(codes, scale, None, width))
    scale[::7, ::5] = 0
    return _to(PackedWeight(codes, scale.view(torch.float8_e4m3fn), torch.full((1,), divisor), width))


def _to(weight):
    return PackedWeight(*(None if x is None else x.to(DEVICE) for x in weight[:3]), weight.in_features)


def as_a_layer_has_it(weight, dtype, activation=None):
    """In the kernels' order where a kernel takes it so."""
    if not select.wants_order(weight.format, weight.device, dtype):
        return weight
    return shuffle(weight, dtype, gated=activation == "swiglu")


def rows_of(count, width, dtype=torch.bfloat16, seed=1):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_near(got, expected, dtype, times=1):
    assert got.dtype == dtype
    assert got.shape == expected.shape
    error = float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    assert error < times * ERRORS[dtype], f"{error:.1e}"


# The kernels' order, undone by what the kernels do with it.


def undone(order):
    words = order.words.to(torch.int64) & 0xFFFFFFFF
    scales = order.scales.to(torch.int64) & 0xFFFFFFFF
    turned = (scales >> 8) | (scales << 24) & 0xFFFFFFFF
    both = torch.stack((scales, turned), dim=-1).flatten(-2) & 0x0FF00FF0  # n G c w g j or blocks
    bf16 = order.dtype == torch.bfloat16
    pairs = both | 0x70007000 if order.block == 16 and bf16 else both << 3
    if order.block == 32:
        pairs = pairs.repeat_interleave(2, dim=-1)
    tiles, groups = words.shape[:2]
    out = torch.zeros(tiles, 4, 2, 8, groups, 4, 4, 2, 4, 2, dtype=torch.float64)  # n w r g G c j h t i
    mask = 0x81C081C0 if bf16 else 0x8E008E00
    if bf16:
        copies = (words, words << 2, words << 6, words >> 6, (words << 12) | (words >> 20))
        fields = (copies[0], copies[0] ^ copies[2], copies[0] ^ copies[4], copies[1] ^ copies[3])
    else:
        fields = tuple(words ^ copy for copy in (words << 2, words << 6, words << 9, words >> 3))
    for (h, r), i in itertools.product(itertools.product(range(2), range(2)), range(2)):
        value = _half((fields[2 * h + r] & mask) >> (16 * i), order.dtype)
        scale = _half(pairs >> (16 * r), order.dtype).unsqueeze(5)
        product = value * scale
        assert torch.equal(product.to(order.dtype).double(), product), "code times scale is exact"
        out[:, :, r, :, :, :, :, h, :, i] = (product * order.alpha[0].double()).permute(0, 3, 4, 1, 2, 6, 5)
    return out.reshape(tiles * 64, groups * 256)


def _half(bits, dtype):
    return (bits & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype).double()


@pytest.mark.skipif(CUDA, reason="the same without a GPU")
@pytest.mark.parametrize(
    ("form", "dtype"), [("nvfp4", torch.bfloat16), ("nvfp4", torch.float16), ("mxfp4", torch.bfloat16)]
)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 17), (130, 300), (64, 256), (63, 1000)])
def test_the_kernels_order_holds_every_weight_once(rows, width, form, dtype):
    weight = packed(rows, width, form, divisor=64.0)
    values = undone(shuffle(weight, dtype))
    assert torch.equal(values[:rows, :width].float(), naive.dequantize(weight, torch.float32))
    assert not values[rows:].any()
    assert not values[:, width:].any()


@pytest.mark.skipif(CUDA, reason="the same without a GPU")
def test_gate_and_up_take_turns_of_eight_rows():
    weight = packed(20, 40, divisor=64.0)
    values, plain = undone(shuffle(weight, torch.bfloat16, gated=True)).float(), naive.dequantize(weight, torch.float32)
    assert torch.equal(values[:8, :40], plain[:8])
    assert torch.equal(values[8:16, :40], plain[10:18])
    assert torch.equal(values[16:18, :40], plain[8:10])
    assert torch.equal(values[24:26, :40], plain[18:])
    assert not values[18:24].any()


# Unpacking slabs.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 63), (5, 1000), (2, 4097)])
def test_unpacking_is_the_definition_bit_for_bit(rows, width, form, dtype):
    if not CUDA and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bits off where a GPU rounds")
    weight = packed(rows, width, form)
    memory = torch.full((rows, width), torch.nan, device=DEVICE, dtype=dtype)
    got = slab.unpack(weight, memory)
    assert torch.equal(got, naive.dequantize(weight, dtype))


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_a_part_of_the_rows_and_columns(form):
    weight = packed(9, 200, form)
    got = slab.unpack(weight, torch.full((3, 50), torch.nan, device=DEVICE), row=4, column=64)
    assert torch.equal(got, naive.dequantize(weight, torch.float32)[4:7, 64:114])
    got = slab.unpack(weight, torch.full((30, 8), torch.nan, device=DEVICE), row=4, column=192)
    assert torch.equal(got, naive.dequantize(weight, torch.float32)[4:, 192:])


def test_unpacking_knows_every_scale():
    for form, dtype in (("nvfp4", torch.float8_e4m3fn), ("mxfp4", torch.uint8)):
        block = 16 if form == "nvfp4" else 32
        scale = torch.arange(256, dtype=torch.uint8)[None].to(DEVICE).view(dtype)
        codes = torch.full((1, 256 * block // 2), 0x2A, dtype=torch.uint8, device=DEVICE)  # -1 and 1
        divisor = torch.ones(1, device=DEVICE) if form == "nvfp4" else None
        weight = PackedWeight(codes, scale, divisor, 256 * block)
        got = slab.unpack(weight, torch.empty(1, 256 * block, device=DEVICE))
        torch.testing.assert_close(got, naive.dequantize(weight, torch.float32), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 63), (70, 300), (130, 520)])
def test_unpacking_the_kernels_order_is_the_definition_bit_for_bit(rows, width, form, order, dtype):
    if not CUDA and (dtype == torch.bfloat16 or rows > 70):
        pytest.skip("Triton's interpreter cuts bits off where a GPU rounds, and is slow")
    weight = packed(rows, width, form)
    memory = torch.full((rows, width), torch.nan, device=DEVICE, dtype=dtype)
    got = slab.unpack(shuffle(weight, order), memory)
    assert torch.equal(got, naive.dequantize(weight, dtype))


@on_gpu
@pytest.mark.parametrize(("divisor", "exact"), [(64.0, True), (2.0**22, True), (48.0, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(3, 64), (70, 300), (130, 1000), (64, 4098)])
def test_unpacking_in_pairs_is_the_definition_bit_for_bit(rows, width, dtype, divisor, exact):
    weight = packed(rows, width, divisor=divisor)
    order = shuffle(weight, dtype)
    assert order.exact == (exact and (dtype == torch.bfloat16 or divisor < 2**22))
    for row, column in ((0, 0), (64, 0), (0, 64), (0, 256)):
        if row < rows and column < width:
            memory = torch.full((rows - row, width - column + 2), torch.nan, device=DEVICE, dtype=dtype)
            got = slab.unpack(order, memory[:, : width - column], row=row, column=column)
            assert torch.equal(got, naive.dequantize(weight, dtype)[row:, column:])
            assert memory[:, width - column :].isnan().all()


def test_a_slab_of_the_kernels_order_may_begin_anywhere():
    weight = packed(200, 600)
    expected = naive.dequantize(weight, torch.float16)
    got = slab.unpack(
        shuffle(weight, torch.bfloat16), torch.empty(70, 90, device=DEVICE, dtype=torch.float16), row=64, column=256
    )
    assert torch.equal(got, expected[64:134, 256:346])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(("rows", "width"), [(2, 1), (6, 63), (70, 300), (64, 256), (1000, 33)])
@pytest.mark.parametrize("gated", [False, True])
def test_an_order_gives_the_bytes_back(rows, width, gated, form, dtype):
    drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(0), device="cpu").to(DEVICE)
    weight = fp4.quantize(drawn, form)
    made = shuffle_if_reversible(weight, dtype, gated=gated)
    back = unshuffle(made)
    assert torch.equal(back.packed, weight.packed)
    assert torch.equal(back.scale.view(torch.uint8), weight.scale.view(torch.uint8))
    assert back.global_scale is weight.global_scale


@pytest.mark.parametrize("byte", [0, 0x80 | 56, 0x7F, 56], ids=["no scale for a code", "negative", "NaN", "plain"])
def test_what_an_order_cannot_hold_stays_as_it_is(byte):
    weight = fp4.quantize(torch.randn(64, 256, device=DEVICE), "nvfp4")
    weight.scale.view(torch.uint8)[3, 5] = byte
    weight.packed[3, 40:48] = 0x11
    assert (shuffle_if_reversible(weight, torch.bfloat16) is None) is (byte != 56)


@pytest.mark.parametrize("least", [0, 100])
def test_scales_too_far_apart_stay_as_they_are(least):
    weight = packed(64, 256, "mxfp4")
    weight.scale[0, 0], weight.scale[0, 1] = 254, least
    assert (shuffle_if_reversible(weight, torch.bfloat16) is None) is (least == 0)


# What is chosen.


def test_what_a_cpu_does_is_said():
    weight = packed(5, 17)
    text = select.explain(3, PackedWeight(weight.packed.cpu(), weight.scale.cpu(), None, 17), torch.bfloat16)
    assert text.startswith("3 x 17 by 5 x 17 in nvfp4: the definition in torch, since there is no kernel")


@on_gpu
def test_what_a_gpu_does_is_said():
    weight = packed(128, 256)
    ready = shuffle(weight, torch.bfloat16)
    assert f"fused kernel {'tile' if HOPPER else 'decode'}" in select.explain(1, ready, torch.bfloat16)
    assert "slabs of the weight unpacked to torch.float32" in select.explain(1, ready, torch.float32)
    assert "slabs of the weight" in select.explain(10_000, ready, torch.bfloat16)
    assert "not in the kernels' order for torch.bfloat16" in select.explain(1, weight, torch.bfloat16)
    assert "not in the kernels' order for torch.float16" in select.explain(1, ready, torch.float16)


# On a GPU.


def settings():
    yield from (Decode(1, 8, 0, 4, 1), Decode(2, 8, 0, 4, 2), Decode(1, 16, 0, 4, 1))
    yield from (Decode(1, 16, 0, 8, 2), Decode(4, 8, 0, 4, 2, 2))
    if HOPPER:
        yield from (
            Decode(1, 8, 16, 4, 1),
            Decode(2, 16, 2, 8, 8),
            Decode(4, 16, 4, 4, 4, 2),
            Decode(2, 8, 8, 4, 3, 2),
            Tile(1, 8, 8, 3, 1),
            Tile(1, 16, 4, 4, 3),
            Tile(2, 32, 8, 2, 2),
            Tile(1, 64, 2, 4, 2),
            Tile(4, 64, 4, 2, 1),
            Tile(2, 128, 4, 2, 1),
            Tile(1, 128, 4, 3, 2),
            Tile(2, 256, 2, 3, 1),
        )


def counts(setting, rows, width):
    """Numbers of rows of x: a piece, two, and so many that programs take them in groups."""
    found = {1, min(setting.bm, 63)}
    if isinstance(setting, Tile):
        found.add(setting.bm + 7)
        if rows * width <= 63 * 1000:
            found.add((plan.GROUP + 3) * setting.bm + 7)
    return found


@on_gpu
@pytest.mark.parametrize("setting", list(settings()))
@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_every_launch_is_the_definition_over_odd_sizes(setting, form):
    for rows, width in itertools.product(SIZES, SIZES):
        weight, bias = packed(rows, width, form), rows_of(1, rows, seed=3)[0]
        order = shuffle(weight, torch.bfloat16)
        if isinstance(setting, Decode) and setting.kept and (width % 64 or width > 256 * setting.kept * setting.split):
            width = 1024  # noqa: PLW2901 - x in shared memory wants whole chunks
            weight = packed(rows, width, form)
            order = shuffle(weight, torch.bfloat16)
        for count in counts(setting, rows, width):
            x = rows_of(count, width)
            results = [launch.run(x, order, bias, None, setting) for _ in range(2)]
            assert torch.equal(*results), "not the same bits twice"
            assert_near(results[0], naive.linear(x.double(), weight, bias.double()), torch.bfloat16)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu", "swiglu"])
@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_every_activation_at_every_number_of_rows(form, activation, dtype):
    weight, bias = packed(1000, 960, form), rows_of(1, 1000, dtype, seed=3)[0]
    scale = 0.02 / float(naive.dequantize(weight, torch.float32).std())
    for count in (1, 7, 16, 33, 100, 300, 2000, 6200):
        x = rows_of(count, 960, dtype) * scale
        ready = as_a_layer_has_it(weight, dtype, activation)
        got = fp4.linear(x, ready, bias, activation)
        # Slabs leave torch's product rounded before gate and up meet: three roundings for one.
        slabs = activation == "swiglu" and "slabs" in select.explain(count, ready, dtype, activation)
        assert_near(got, naive.linear(x.double(), weight, bias.double(), activation), dtype, 1.5 if slabs else 1)


@on_gpu
@pytest.mark.parametrize("count", [1, 16, 64, 300, 2000])
@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's imports
def test_gradients_are_the_definition_s(count, how):
    weight, upstream = packed(1000, 960), rows_of(count, 1000, seed=5)
    ready = as_a_layer_has_it(weight, torch.bfloat16)
    function = lambda x, b: fp4.linear(x, ready, b, "silu")  # noqa: E731
    if how == "compiled":
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True)
    results = []
    for run, dtype in ((function, torch.bfloat16), (lambda x, b: naive.linear(x, weight, b, "silu"), torch.float64)):
        x = (rows_of(count, 960) * 1e-3).to(dtype).requires_grad_()
        bias = rows_of(1, 1000, seed=3)[0].to(dtype).requires_grad_()
        results.append(torch.autograd.grad(run(x, bias), [x, bias], upstream.to(dtype)))
    for got, expected in zip(*results, strict=True):
        error = float((got.double() - expected).norm() / expected.norm())
        assert error < 8e-3, f"{error:.1e}: bf16 through one activation and one product"


@on_gpu
@pytest.mark.skipif(CUDA and not HOPPER, reason="needs compute capability 9.0")
@pytest.mark.parametrize("setting", [each for each in settings() if isinstance(each, Tile)] or [Tile(1, 8, 8, 3, 1)])
@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_every_launch_of_a_gradient_is_the_definition_over_odd_sizes(setting, form):
    for rows, width in itertools.product(SIZES, SIZES):
        weight = packed(rows, width, form)
        order, values = shuffle(weight, torch.bfloat16), naive.dequantize(weight, torch.float64)
        for count in counts(setting, rows, width):
            upstream = rows_of(count, rows)
            results = [launch.run(upstream, order, None, None, setting, turned=True) for _ in range(2)]
            assert torch.equal(*results), "not the same bits twice"
            few = count * width < 64  # one rounding of one value is up to 4e-3
            assert_near(results[0], upstream.double() @ values, torch.bfloat16, 1.4 if few else 1)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("gated", [None, False, True])
def test_the_gradient_at_every_number_of_rows(gated, form, dtype):
    weight = packed(300, 1000, form)
    half = torch.float16 if dtype == torch.float16 and form == "nvfp4" else torch.bfloat16
    ready = weight if gated is None else shuffle(weight, half, gated=gated)
    for count in (1, 8, 17, 64, 65, 300, 2000, 2500, 6200):
        upstream = rows_of(count, 300, dtype) * 1e-2
        got = select.linear_gradient(upstream, ready)
        assert_near(got, upstream.double() @ naive.dequantize(weight, torch.float64), dtype)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("gated", [None, False, True])
def test_the_gradient_comes_in_slabs_of_columns(dtype, gated, monkeypatch):
    monkeypatch.setattr(slab, "SLAB_BYTES", 2**16)
    weight, upstream = packed(300, 1000), rows_of(33, 300, dtype) * 1e-2
    expected = upstream.double() @ naive.dequantize(weight, torch.float64)
    ready = weight if gated is None else shuffle(weight, torch.bfloat16, gated=gated)
    assert_near(slab.input_gradient(upstream, ready), expected, dtype)


@on_gpu
@pytest.mark.parametrize("activation", [None, "gelu", "swiglu"])
@pytest.mark.parametrize("gated", [None, False, True])
def test_the_result_comes_in_slabs_of_rows(activation, gated, monkeypatch):
    monkeypatch.setattr(slab, "SLAB_BYTES", 2**16)
    weight, bias = packed(1100, 200), rows_of(1, 1100, torch.float32, seed=3)[0]
    ready = weight if gated is None else shuffle(weight, torch.bfloat16, gated=gated)
    x = rows_of(33, 200, torch.float32) * 1e-2
    expected = naive.linear(x.double(), weight, bias.double(), activation)
    assert_near(slab.linear(x, ready, bias, activation), expected, torch.float32, 3)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_a_weight_that_is_one_slab_is_unpacked_and_multiplied_again(activation, dtype):
    x = rows_of(launch.MOST_ROWS + 50, 960, dtype)
    for divisor in (2.0**16, 48.0 * 2**10, 2.0**17):  # the second is no power of two, and not unpacked in pairs
        weight = packed(300, 960, divisor=divisor)
        ready, bias = shuffle(weight, dtype), rows_of(1, 300, dtype, seed=3)[0]
        assert "slabs" in select.explain(len(x), ready, dtype, activation)
        results = [fp4.linear(x, ready, bias, activation) for _ in range(3)]
        assert all(torch.equal(each, results[0]) for each in results)
        again = launch._served.get(launch.likeness(x, ready, bias, activation))
        assert (again is not None) == ready.exact == (divisor != 48.0 * 2**10)
        assert_near(results[0], naive.linear(x.double(), weight, bias.double(), activation), dtype, 2)


@on_gpu
@pytest.mark.parametrize("count", [1, 16, 64, 300])
def test_a_row_does_not_depend_on_the_others(count):
    weight = shuffle(packed(320, 512), torch.bfloat16)
    x = rows_of(count, 512)
    alone = fp4.linear(x, weight)
    others = x.clone()
    others[1:] = torch.nan
    assert torch.equal(fp4.linear(others, weight)[0], alone[0])


@on_gpu
@pytest.mark.parametrize("count", [1, 64, 2000])
def test_in_a_cuda_graph(count):
    weight, x = shuffle(packed(320, 512), torch.bfloat16), rows_of(count, 512)
    expected = fp4.linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp4.linear(x, weight)
    x.copy_(rows_of(count, 512, seed=8))
    graph.replay()
    assert not torch.equal(out, expected)
    assert torch.equal(out, fp4.linear(x, weight))


@on_gpu
@pytest.mark.parametrize("ready", [False, True])
def test_many_rows_take_one_slab_of_memory(ready):
    weight, x = packed(16384, 4096), rows_of(6400, 4096)
    weight = shuffle(weight, torch.bfloat16) if ready else weight
    fp4.linear(x, weight)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = fp4.linear(x, weight)
    assert torch.cuda.max_memory_allocated() - before <= out.nbytes + slab.SLAB_BYTES + 2**20


@pytest.mark.parametrize("whole", [8, 64])
@pytest.mark.parametrize(
    "x",
    [
        torch.ones(1, 64).expand(3, 64),
        torch.ones(64, 3).T,
        torch.ones(3, 100)[:, 3:67],
        torch.ones(3, 65)[:, :64],
        torch.ones(3, 33),
        torch.ones(3, 40),
    ],
    ids=["repeated", "crossed", "shifted", "odd pitch", "narrow", "no whole chunk"],
)
def test_x_comes_as_a_descriptor_takes_it(x, whole):
    aligned = launch._aligned(x.bfloat16() if x.is_contiguous() else x, whole)
    assert aligned.shape[1] % whole == 0
    assert aligned.stride(1) == 1
    assert aligned.stride(0) % 8 == 0
    assert aligned.stride(0) >= aligned.shape[1]
    assert aligned.data_ptr() % 16 == 0
    assert torch.equal(aligned[:, : x.shape[1]].float(), x)
