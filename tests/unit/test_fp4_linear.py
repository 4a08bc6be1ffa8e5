import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from small_models import noise
from tolerances import assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint

from apt_model.core.errors import ConfigError, InputError
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.layers.packed_products import dequantize_in_slabs
from apt_model.ops import fp4

FORMATS = ("nvfp4", "mxfp4")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PACKED = ("weight_packed", "weight_scale", "weight_global_scale")


def make(in_features=33, out_features=10, *, seed=0, **options):
    torch.manual_seed(seed)
    return FusedFP4Linear(in_features, out_features, **options)


def packed_bytes(layer):
    """The packed tensors, bit for bit."""
    state = {name: held for name, held in layer.state_dict().items() if name in PACKED}
    return {name: (held.dtype, held.view(torch.uint8).tolist()) for name, held in state.items()}


def plain(layer):
    """The same function through a dequantised weight."""
    return lambda x: F.linear(x, layer.dequantize(), layer.bias)


# --- what it is


def test_its_tensors_are_those_of_the_interface():
    layer = make(20, 7)
    assert {name: (held.dtype, tuple(held.shape)) for name, held in layer.state_dict().items()} == {
        "weight_packed": (torch.uint8, (7, 16)),
        "weight_scale": (torch.float8_e4m3fn, (7, 2)),
        "weight_global_scale": (torch.float32, (1,)),
        "bias": (torch.float32, (7,)),
    }
    layer = make(40, 7, format="mxfp4", bias=False)
    assert {name: (held.dtype, tuple(held.shape)) for name, held in layer.state_dict().items()} == {
        "weight_packed": (torch.uint8, (7, 24)),
        "weight_scale": (torch.uint8, (7, 2)),
    }
    assert layer.weight_global_scale is None
    assert layer.bias is None


def test_its_weight_is_frozen_and_its_bias_is_not():
    layer = make()
    assert [name for name, held in layer.named_parameters() if held.requires_grad] == ["bias"]
    assert all(type(held) is nn.Parameter for held in layer.parameters())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_new_layer_is_a_new_linear_quantised(form, dtype):
    layer = make(format=form, dtype=dtype)
    torch.manual_seed(0)
    linear = nn.Linear(33, 10, dtype=dtype)
    assert packed_bytes(layer) == packed_bytes(FusedFP4Linear.from_linear(linear, format=form))
    assert torch.equal(layer.bias, linear.bias)
    assert torch.equal(layer.dequantize(), fp4.dequantize(fp4.quantize(linear.weight, form), dtype))


def test_from_linear_takes_the_bias_the_flag_and_the_type_over():
    linear = nn.Linear(5, 3, dtype=torch.bfloat16).eval()
    layer = FusedFP4Linear.from_linear(linear, activation="relu")
    assert layer.bias is linear.bias
    assert not layer.training
    assert (layer.dtype, layer.activation, layer.format) == (torch.bfloat16, "relu", "nvfp4")
    assert isinstance(layer, nn.Linear)
    assert FusedFP4Linear.from_linear(nn.Linear(5, 3, bias=False)).bias is None


def test_the_default_type_rules():
    torch.set_default_dtype(torch.float64)
    try:
        assert make().dequantize().dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_it_says_what_it_is():
    text = "in_features=8, out_features=4, bias=True, format='{}', bits={}, activation={}"
    assert make(8, 4).extra_repr() == text.format("nvfp4", "4.5", None)
    assert make(8, 4, format="mxfp4", activation="silu").extra_repr() == text.format("mxfp4", "4.25", "'silu'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "fp4"}, r"FusedFP4Linear\.format: expected nvfp4 or mxfp4, got 'fp4'"),
        ({"activation": "tanh"}, r"FusedFP4Linear\.activation: expected one of .*, got 'tanh'"),
        ({"in_features": 0}, r"FusedFP4Linear\.in_features: expected above 0, got 0"),
        ({"out_features": -1}, r"FusedFP4Linear\.out_features: expected above 0, got -1"),
        ({"out_features": 7, "activation": "swiglu"}, r"out_features: expected an even number with swiglu, got 7"),
        (
            {"dtype": torch.int8},
            r"FusedFP4Linear\.dtype: expected float16, bfloat16, float32 or float64, got torch.int8",
        ),
    ],
)
def test_an_option_that_cannot_be_met_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


@pytest.mark.parametrize("what", [nn.Embedding(4, 4), FusedFP4Linear(4, 4), torch.zeros(4, 4)])
def test_from_linear_takes_linears(what):
    with pytest.raises(InputError, match=f"from_linear: expected an nn.Linear, got {type(what).__name__}"):
        FusedFP4Linear.from_linear(what)


# --- what it computes


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=25, deadline=None)
@given(
    lead=st.lists(st.integers(0, 3), max_size=3),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 40)),
    bias=st.booleans(),
    dtype=st.sampled_from(FLOATS),
)
def test_it_is_the_linear_of_the_dequantised_weight(form, lead, sizes, bias, dtype):
    width, rows = sizes
    layer = make(width, rows, bias=bias, format=form, dtype=torch.float64)
    x = noise(*lead, width, dtype=dtype)
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (*lead, rows))
    expected = plain(layer)(x.double()).to(dtype)
    assert_close("definition_fp32" if dtype.itemsize > 2 else "one_truncation_bf16", y.double(), expected.double())


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu", "swiglu"])
def test_the_activation_is_in_it(activation):
    layer = make(32, 8, activation=activation)
    x = noise(3, 32)
    expected = fp4.naive.activate(plain(layer)(x), activation)
    assert layer(x).shape == (3, 4 if activation == "swiglu" else 8)
    assert_close("definition_fp32", layer(x), expected)


@pytest.mark.parametrize("shape", [(33,), (0, 33), (2, 3, 33)])
def test_gradients_are_those_of_the_linear(shape):
    layer, x = make(), noise(*shape)
    twin, other = copy.deepcopy(layer), x.clone()
    for of, into, function in ((layer, x.requires_grad_(), layer), (twin, other.requires_grad_(), plain(twin))):
        function(into).square().sum().backward()
        assert of.weight_scale.grad is None
    assert_close("definition_fp32", x.grad, other.grad)
    assert_close("definition_fp32", layer.bias.grad, twin.bias.grad)


def test_a_bias_of_another_type_keeps_its_type_and_gets_its_gradient():
    layer = make(dtype=torch.bfloat16)
    layer.bias = nn.Parameter(layer.bias.double())
    layer(noise(4, 33)).sum().backward()
    assert layer.bias.grad.tolist() == [4.0] * 10
    assert layer.bias.grad.dtype == torch.float64


def test_an_input_that_is_not_float_is_refused():
    with pytest.raises(InputError, match=r"fp4 linear: expected a float input, got torch.int64"):
        make()(torch.ones(2, 33, dtype=torch.int64))


def test_an_input_of_another_width_is_refused():
    with pytest.raises(InputError, match=r"expected x \[\.\.\., 33\], got \[2, 32\]"):
        make()(noise(2, 32))


def test_an_input_elsewhere_is_refused():
    with pytest.raises(InputError, match="expected x on cpu, where the weight is, got meta"):
        FusedFP4Linear(33, 5)(torch.ones(2, 33, device="meta"))


def test_under_autocast_it_is_cast_as_linear_is():
    layer, linear = make(), nn.Linear(33, 10)
    x, wide = noise(3, 33).requires_grad_(), noise(3, 33, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == linear(x).dtype == torch.bfloat16
        assert layer(wide).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32
    assert torch.equal(y, layer(x.bfloat16())), "sums stay in fp32"
    y.sum().backward()
    assert (x.grad.dtype, layer.bias.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's import
@pytest.mark.parametrize("activation", [None, "swiglu"])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_compiles_whole(activation, autocast):
    layer, x = make(32, 8, activation=activation), noise(3, 32)
    twin, other = copy.deepcopy(layer), x.clone().requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = compiled(x.requires_grad_()), twin(other)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad, other.grad)
    assert torch.equal(layer.bias.grad, twin.bias.grad)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's import
def test_code_that_reads_the_weight_s_type_compiles_whole():
    layer = make(32, 8, dtype=torch.bfloat16)

    def follows(x):
        return layer(x.to(layer.weight.dtype)) + layer.weight.sum()

    torch.compiler.reset()
    compiled = torch.compile(follows, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(noise(3, 32)), follows(noise(3, 32)))


def test_it_can_be_recomputed():
    layer, x = make(activation="gelu"), noise(3, 33).requires_grad_()
    other = x.detach().clone().requires_grad_()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    layer(other).sum().backward()
    assert torch.equal(x.grad, other.grad)


def test_torch_func_replaces_its_parameters():
    layer, x = make(), noise(2, 33)
    y = torch.func.functional_call(layer, {"bias": torch.zeros(10), "weight_scale": make(seed=1).weight_scale}, (x,))
    assert not torch.equal(y, layer(x))


# --- where it is kept

CONVERSIONS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "double": lambda module: module.double(),
    "float": lambda module: module.float(),
    "type": lambda module: module.type(torch.float16),
    "device and type": lambda module: module.to("cpu", torch.bfloat16),
    "share_memory": lambda module: module.share_memory(),
    "there and back": lambda module: module.half().float(),
}


@pytest.fixture(params=["set_data", "overwrite", "swap"])
def _conversion(request):
    """torch's three ways to convert a module."""
    switches = {
        "overwrite": torch.__future__.set_overwrite_module_params_on_conversion,
        "swap": torch.__future__.set_swap_module_params_on_conversion,
    }
    switch = switches.get(request.param, lambda _: None)
    switch(True)
    yield
    switch(False)


@pytest.mark.usefixtures("_conversion")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_leave_the_packed_tensors_alone(name, form):
    layer, linear = make(format=form), nn.Linear(33, 10)
    before, of_layer, of_linear = packed_bytes(layer), list(layer.parameters()), list(linear.parameters())
    CONVERSIONS[name](layer)
    CONVERSIONS[name](linear)
    assert packed_bytes(layer) == before
    assert layer.dtype == layer.bias.dtype == layer.dequantize().dtype == linear.weight.dtype
    kept = {old is new for old, new in zip(of_layer, layer.parameters(), strict=True)}
    assert kept == {old is new for old, new in zip(of_linear, linear.parameters(), strict=True)}
    assert [held.requires_grad for held in layer.parameters()] == [False] * (len(of_layer) - 1) + [True]
    assert layer(noise(2, 33)).shape == (2, 10)


def test_a_type_that_no_weight_stands_for_changes_no_type():
    assert make().to(torch.float8_e4m3fn).dtype == torch.float32


def test_a_default_device_of_meta_does_not_matter_to_a_conversion():
    layer = make()
    with torch.device("meta"):
        assert layer.bfloat16().to("cpu").dtype == torch.bfloat16
        assert FusedFP4Linear(4, 4).weight.is_meta
        assert not FusedFP4Linear.from_linear(nn.Linear(4, 4, device="cpu")).weight.is_meta


def test_memory_is_shared_in_place():
    layer = make().share_memory()
    assert all(held.is_shared() for held in layer.parameters())


@pytest.mark.parametrize("form", FORMATS)
def test_on_meta_nothing_is_drawn_and_nothing_is_lost(form):
    state = torch.get_rng_state()
    layer = FusedFP4Linear(33, 10, format=form, device="meta")
    assert torch.equal(state, torch.get_rng_state())
    assert {held.device.type for held in layer.parameters()} == {"meta"}
    assert layer(torch.empty(2, 33, device="meta")).shape == (2, 10)
    moved = make(format=form).to("meta")
    assert {held.dtype for held in moved.parameters()} == {held.dtype for held in layer.parameters()}
    layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    assert packed_bytes(layer) == packed_bytes(make(format=form))
    assert FusedFP4Linear.from_linear(nn.Linear(3, 2, device="meta"), format=form).weight.is_meta


@pytest.mark.parametrize("form", FORMATS)
def test_copies_and_files_hold_the_same_bits(form):
    layer = make(format=form)
    twin = copy.deepcopy(layer)
    assert packed_bytes(twin) == packed_bytes(layer)
    assert twin.weight_packed.data_ptr() != layer.weight_packed.data_ptr()
    other = make(seed=1, format=form)
    other.load_state_dict(load(save(layer.state_dict())))
    assert packed_bytes(other) == packed_bytes(layer)
    assert torch.equal(other(noise(2, 33)), layer(noise(2, 33)))


def test_what_a_loader_makes_trainable_is_frozen():
    layer = make()
    layer.weight_scale = nn.Parameter(layer.weight_scale.detach().clone(), requires_grad=True)
    assert not layer.weight_scale.requires_grad


def test_scales_that_fsdp_casts_are_cast_back():
    layer, x = make(), noise(2, 33)
    expected = layer(x)
    for name in PACKED[1:]:
        layer._parameters[name] = nn.Parameter(layer._parameters[name].to(torch.bfloat16), requires_grad=False)
    assert torch.equal(layer(x), expected)
    layer._parameters[PACKED[2]] = nn.Parameter(torch.ones(1, dtype=torch.float16), requires_grad=False)
    with pytest.raises(InputError, match="weight_global_scale: expected float32, got float16"):
        layer(x)


def test_a_large_weight_is_dequantised_in_slabs(monkeypatch):
    packed = make(40, 23).packed_weight("weight")
    expected = fp4.dequantize(packed, torch.bfloat16)
    monkeypatch.setattr("apt_model.layers.packed_products.SLAB_WEIGHTS", 90)
    assert torch.equal(dequantize_in_slabs(packed, torch.bfloat16), expected)


# --- what it loads


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("strict", [True, False])
def test_a_full_precision_weight_is_quantised_on_load(form, dtype, strict):
    linear, layer = nn.Linear(33, 10, dtype=dtype), make(format=form, seed=1)
    held = list(layer.parameters())
    layer.load_state_dict(linear.state_dict(), strict=strict)
    assert packed_bytes(layer) == packed_bytes(FusedFP4Linear.from_linear(linear, format=form))
    assert layer.dtype == layer.bias.dtype == torch.float32
    assert all(old is new for old, new in zip(held, layer.parameters(), strict=True))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("packed", [False, True])
def test_with_assign_a_layer_on_meta_becomes_real(form, packed):
    linear = nn.Linear(33, 10, dtype=torch.bfloat16)
    source = FusedFP4Linear.from_linear(linear, format=form)
    layer = FusedFP4Linear(33, 10, format=form, device="meta")
    layer.load_state_dict((source if packed else linear).state_dict(), assign=True)
    assert packed_bytes(layer) == packed_bytes(source)
    assert layer.dtype == (torch.float32 if packed else torch.bfloat16)
    assert [name for name, held in layer.named_parameters() if held.requires_grad] == ["bias"]


def test_without_assign_a_layer_on_meta_warns_as_torch_does():
    layer = FusedFP4Linear(33, 10, bias=False, format="mxfp4", device="meta")
    with pytest.warns(UserWarning, match="copying from a non-meta parameter") as warned:
        layer.load_state_dict(nn.Linear(33, 10, bias=False).state_dict())
    assert [str(each.message).split(":")[0] for each in warned] == ["for weight_packed", "for weight_scale"]
    assert layer.weight.is_meta


def test_a_state_dict_on_meta_stays_there():
    layer = FusedFP4Linear(33, 10, device="meta")
    layer.load_state_dict(nn.Linear(33, 10, device="meta").state_dict(), assign=True)
    assert layer.weight_packed.is_meta


def test_packed_tensors_are_taken_as_they_are():
    layer, other = make(), make(seed=1)
    state = {**other.state_dict(), "weight_global_scale": torch.tensor([3.14])}
    layer.load_state_dict(state)
    assert layer.weight_global_scale.item() == pytest.approx(3.14)
    assert torch.equal(layer.weight_packed, other.weight_packed)


def test_inside_a_model_it_loads_what_a_linear_loads():
    model, plain_model = (
        nn.Sequential(make(), nn.ReLU(), make(10, 4)),
        nn.Sequential(nn.Linear(33, 10), nn.ReLU(), nn.Linear(10, 4)),
    )
    assert not any(model.load_state_dict(plain_model.state_dict()))
    assert packed_bytes(model[2]) == packed_bytes(FusedFP4Linear.from_linear(plain_model[2]))


def full(**changes):
    return {"weight": noise(10, 33), "bias": torch.zeros(10), **changes}


def ready(form="nvfp4", *, without=(), **changes):
    state = {**make(format=form, seed=2).state_dict(), **changes}
    return {name: held for name, held in state.items() if name not in without}


FAULTS = {
    "shape of the weight": (
        full(weight=noise(10, 32)),
        r"weight: expected a float16.*\[10, 33\], or packed.*\[10, 32\]",
    ),
    "type of the weight": (full(weight=torch.ones(10, 33, dtype=torch.int8)), "weight: expected .*got torch.int8"),
    "fp8 without its scales": (
        full(weight=noise(10, 33).to(torch.float8_e4m3fn)),
        "weight: expected .*got torch.float8_e4m3fn",
    ),
    "no tensor": (full(weight=[1.0]), "weight: expected .*, got list"),
    "not finite": (full(weight=torch.full((10, 33), torch.inf)), "weight: quantize: the weight holds values"),
    "both": (
        ready(weight=noise(10, 33)),
        r"weight came in full precision and packed too \(fc.weight_packed, fc.weight_scale",
    ),
    "codes are missing": (ready(without=["weight_packed"]), "weight_packed missing beside fc.weight_scale"),
    "scales are missing": (ready(without=["weight_scale"]), "weight_scale missing beside fc.weight_packed: nvfp4"),
    "codes and scales are missing": (
        ready(without=["weight_packed", "weight_scale"]),
        "weight_packed, fc.weight_scale missing beside fc.weight_global_scale: nvfp4",
    ),
    "divisor is missing": (
        ready(without=["weight_global_scale"]),
        "weight_global_scale missing beside fc.weight_packed",
    ),
    "shape of the codes": (
        ready(weight_packed=torch.zeros(10, 17, dtype=torch.uint8)),
        r"weight_packed: expected torch.uint8 \[10, 24\] in nvfp4, got torch.uint8 \[10, 17\]",
    ),
    "type of the scales": (
        ready(weight_scale=torch.ones(10, 3)),
        r"weight_scale: expected torch.float8_e4m3fn \[10, 3\] in nvfp4, got torch.float32 \[10, 3\]",
    ),
    "the other format": (ready("mxfp4"), "weight_global_scale missing beside fc.weight_packed: nvfp4 needs it"),
    "bitsandbytes": (
        {
            "weight": torch.zeros(165, 1, dtype=torch.uint8),
            "weight.absmax": torch.ones(6),
            "weight.quant_map": torch.ones(16),
            "weight.quant_state.bitsandbytes__fp4": torch.zeros(90, dtype=torch.uint8),
        },
        r"weight.absmax: another quantiser's storage.*bitsandbytes' FP4 and NF4",
    ),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_loaded_is_named_and_changes_nothing(fault, strict):
    state, message = FAULTS[fault]
    model = nn.ModuleDict({"fc": make()})
    before, bias = packed_bytes(model.fc), model.fc.bias.clone()
    with pytest.raises(RuntimeError, match=rf"(?s)Error.s. in loading state_dict for ModuleDict:.*fc\.{message}"):
        model.load_state_dict({f"fc.{name}": held for name, held in state.items()}, strict=strict)
    assert packed_bytes(model.fc) == before
    assert torch.equal(model.fc.bias, bias)


def test_a_divisor_in_mxfp4_is_refused():
    with pytest.raises(RuntimeError, match="weight_global_scale: mxfp4 has none; this weight is in another format"):
        make(format="mxfp4").load_state_dict(ready("mxfp4", weight_global_scale=torch.ones(1)), strict=False)


def test_a_weight_that_is_not_there_is_reported_as_torch_does():
    layer = make()
    before = packed_bytes(layer)
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_packed", "weight_scale", "weight_global_scale"'):
        layer.load_state_dict({"bias": torch.zeros(10)})
    assert layer.load_state_dict({"bias": torch.ones(10)}, strict=False).missing_keys == list(PACKED)
    assert packed_bytes(layer) == before
    assert layer.bias.tolist() == [1.0] * 10


def test_keys_that_nobody_knows_are_reported_as_torch_does():
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight_scale_2"'):
        make().load_state_dict(full(weight_scale_2=torch.ones(1)))


def test_it_says_what_computes():
    layer = FusedFP4Linear(48, 32, activation="silu", dtype=torch.bfloat16, device="cpu")
    assert layer.explain(7) == (
        "7 x 48 by 32 x 48 in nvfp4: the definition in torch, since there is no kernel for torch.bfloat16 on cpu"
    )
    assert "torch.float32 on cpu" in layer.explain(7, torch.float32)
    with pytest.raises(ConfigError, match=r"explain\.rows: expected above 0, got 0"):
        layer.explain(0)
