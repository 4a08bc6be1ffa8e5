"""`activation_dtype` on layers, experts, views, models: where it comes from, what it changes, what it survives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import noise
from test_fp4_experts import HIDDEN, BatchedExperts, Experts, GroupedExperts, SwappedExperts
from torch import nn
from torch.utils.checkpoint import checkpoint

from apt_model.core.errors import ConfigError, InputError
from apt_model.layers.fp4_experts import pack_experts, unpack_experts
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.ops.fp4 import fp8, naive
from apt_model.optimization import FP4Config, dequantize, quantize


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    """FP8 from three rows on."""
    monkeypatch.setattr(fp8, "FP8_ROWS", 3)


def make(in_features=33, out_features=10, **options):
    torch.manual_seed(0)
    return FusedFP4Linear(in_features, out_features, **{"activation_dtype": "fp8", **options})


def without(module):
    """The same module, with inputs as they are."""
    twin = copy.deepcopy(module)
    for each in twin.modules():
        if hasattr(each, "activation_dtype"):
            each.activation_dtype = None
    return twin


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("activation", [None, "gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_rows_are_computed_by_the_definition(form, activation, dtype):
    layer, x = make(format=form, activation=activation, dtype=dtype), noise(2, 3, 33).to(dtype)
    packed = layer.packed_weight("weight")
    with torch.no_grad():
        assert torch.equal(layer(x), naive.linear_in_e4m3(x, packed, layer.bias, activation))
        assert not torch.equal(layer(x), without(layer)(x))
        assert torch.equal(layer(x[0, :2]), without(layer)(x[0, :2])), "few rows are taken as they are"


def test_it_is_given_by_every_constructor_and_shown():
    linear = nn.Linear(33, 10)
    layers = [
        make(),
        FusedFP4Linear.from_linear(linear, activation_dtype="fp8"),
        FusedFP4Linear.from_weight(linear.weight, activation_dtype="fp8"),
        copy.deepcopy(make()),
    ]
    assert all(layer.activation_dtype == "fp8" and "activation_dtype='fp8'" in repr(layer) for layer in layers)
    assert FusedFP4Linear(33, 10).activation_dtype is None
    assert "activation_dtype" not in repr(FusedFP4Linear(33, 10))


def test_another_value_is_refused_where_it_is_given():
    with pytest.raises(ConfigError, match=r"FusedFP4Linear\.activation_dtype: expected None or 'fp8', got 'fp4'"):
        FusedFP4Linear(33, 10, activation_dtype="fp4")
    with pytest.raises(ConfigError, match=r"pack_experts\.activation_dtype: expected None or 'fp8', got 8"):
        pack_experts(Experts(), activation_dtype=8)
    with pytest.raises(ConfigError, match=r"FP4Config\.activation_dtype: expected one of 'fp8' or None, got 'fp4'"):
        FP4Config(activation_dtype="fp4")
    layer = FusedFP4Linear(33, 10)
    layer.activation_dtype = "int8"
    with pytest.raises(ConfigError, match=r"fp4 linear\.activation_dtype: expected None or 'fp8', got 'int8'"):
        layer(noise(2, 33))


def test_doubles_are_refused_whatever_their_number():
    for rows in (1, 5):
        with pytest.raises(InputError, match=r"got torch\.float64") as caught:
            make()(noise(rows, 33).double())
        assert "leave activation_dtype None" in str(caught.value)


def test_what_computes_is_said():
    layer = make()
    assert "with x and the weight in E4M3, from 3 rows on with activation_dtype 'fp8'" in layer.explain(3)
    assert layer.explain(2).endswith("(activation_dtype 'fp8' begins at 3 rows)")
    assert "fp8" not in without(layer).explain(3)


def test_gradients_are_those_of_inputs_as_they_are():
    grads = []
    for layer in (make(), without(make())):
        x = noise(5, 33).requires_grad_()
        layer(x).sum().backward()
        grads.append((x.grad, layer.bias.grad))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("activation", [None, "swiglu"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's import
def test_it_compiles_whole(activation, autocast):
    layer, x, other = make(32, 8, activation=activation), noise(5, 32).requires_grad_(), noise(5, 32).requires_grad_()
    twin = copy.deepcopy(layer)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = compiled(x), twin(other)
        assert torch.equal(y, expected)
        assert not torch.equal(y, without(layer)(x))
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad, other.grad)
    assert torch.equal(layer.bias.grad, twin.bias.grad)


def test_under_autocast_x_is_cast_first():
    layer, x = make(), noise(5, 33)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))


def test_it_can_be_recomputed():
    layer, x = make(activation="gelu"), noise(5, 33).requires_grad_()
    other = x.detach().clone().requires_grad_()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    layer(other).sum().backward()
    assert torch.equal(x.grad, other.grad)


def test_a_product_with_its_weight_is_the_layer_s():
    layer, x = make(bias=False), noise(5, 33)
    assert torch.equal(F.linear(x, layer.weight), layer(x))
    assert torch.equal(x @ layer.weight.mT, layer(x))
    assert torch.equal(F.linear(x, layer.weight.detach()), layer(x))


@pytest.mark.parametrize("kind", [Experts, SwappedExperts, BatchedExperts, GroupedExperts])
def test_experts_have_it_for_their_own_rows(kind):
    plain = kind()
    packed = pack_experts(copy.deepcopy(plain), activation_dtype="fp8")
    x, choice = noise(12, HIDDEN), torch.arange(3).repeat_interleave(4)
    with torch.no_grad():
        assert not torch.equal(packed(x, choice), without(packed)(x, choice))
        if kind is Experts:
            few = torch.tensor([0, 0, 1, 1, 2, 2])
            assert torch.equal(packed(x[:6], few), without(packed)(x[:6], few))
    assert "activation_dtype='fp8'" in repr(packed)
    assert "activation_dtype" not in vars(unpack_experts(packed))


def test_a_model_has_it_everywhere_and_its_report_says_so():
    model = nn.ModuleDict({"fc": nn.Linear(16, 8), "experts": Experts(), "table": nn.Embedding(5, 16)})
    reports = []
    quantize(model, FP4Config(activation_dtype="fp8", embeddings=True), report=reports.append)
    assert model["fc"].activation_dtype == model["experts"].activation_dtype == "fp8"
    assert "products of many rows: in fp8 (experts: not while torch.compile traces)" in str(reports[0])
    dequantize(model)
    assert not any("activation_dtype" in vars(each) for each in model.modules())
    quantize(model, report=reports.append)
    assert model["fc"].activation_dtype is None
    assert "fp8" not in str(reports[1])
