"""Weights that stay in the kernels' order: what others see of it. The kernels have tests of their own."""

import copy
import io
import pickle
import threading
import time

import pytest
import torch
from torch import nn

from apt_model.core.errors import InputError
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.layers.packed import PackedModule
from apt_model.ops import fp4
from apt_model.optimization import quantize
from apt_model.vgpu.modules import tree_of
from apt_model.vgpu.work import Facts, work_of

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """As on a GPU whose kernels take weights in their order."""
    if not CUDA:
        halves = (torch.bfloat16, torch.float16)
        monkeypatch.setattr(fp4, "wants_order", lambda _form, _device, dtype: dtype in halves)


def layer_of(rows=70, width=100, **options):
    torch.manual_seed(0)
    return FusedFP4Linear(width, rows, device=DEVICE, dtype=torch.bfloat16, **options)


def x_of(width=100, dtype=torch.bfloat16):
    return torch.randn(3, width, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def in_use(**options):
    """A layer after its first product, and its tensors as they were."""
    layer = layer_of(**options)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(x_of())
    assert layer.orders
    return layer, before


def same(state, before):
    assert state.keys() == before.keys()
    for name, tensor in before.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name
    return True


@pytest.mark.parametrize("options", [{}, {"format": "mxfp4"}, {"activation": "swiglu"}, {"bias": False}])
def test_a_state_dict_has_the_order_of_files(options):
    layer, before = in_use(**options)
    assert layer._parameters["weight_packed"].dtype == torch.int32
    assert same(layer.state_dict(), before)
    assert layer.orders, "asking changes nothing"


def test_whole_tiles_take_no_more_memory_than_files():
    layer = layer_of(128, 512)
    before = sum(each.nbytes for each in layer.parameters())
    layer(x_of(512))
    assert sum(each.nbytes for each in layer.parameters()) == before


def test_reading_a_parameter_brings_the_order_of_files_back():
    layer, before = in_use()
    assert layer.weight_scale.dtype == torch.float8_e4m3fn
    assert not layer.orders
    assert isinstance(layer.weight_packed, nn.Parameter)
    assert same(dict(layer.named_parameters()), before)


def test_what_is_written_to_a_parameter_counts():
    layer, _ = in_use()
    other = layer_of(70, 100)
    torch.manual_seed(5)
    other.reset_parameters()
    with torch.no_grad():
        for name in ("weight_packed", "weight_scale", "weight_global_scale", "bias"):
            getattr(layer, name).copy_(getattr(other, name))
    assert torch.equal(layer(x_of()), other(x_of()))


@pytest.mark.parametrize("how", ["attribute", "dictionary"])
def test_a_parameter_that_is_put_in_place_counts(how):
    layer, before = in_use()
    layer(x_of())
    fresh = {
        name: nn.Parameter(tensor.clone(), requires_grad=False) for name, tensor in layer_of().state_dict().items()
    }
    for name, made in fresh.items():
        if how == "attribute":
            setattr(layer, name, made)
        else:
            layer._parameters[name] = made
    assert same(layer.state_dict(), before)
    assert layer(x_of()).isfinite().all()


def test_a_copy_is_of_its_own():
    layer, before = in_use()
    twin = copy.deepcopy(layer)
    assert twin.orders["weight"].words is twin._parameters["weight_packed"]
    assert twin._parameters["weight_packed"] is not layer._parameters["weight_packed"]
    assert torch.equal(twin(x_of()), layer(x_of()))
    assert same(twin.state_dict(), before)


def test_a_pickled_layer_is_the_same():
    layer, before = in_use()
    twin = pickle.loads(pickle.dumps(layer))  # noqa: S301 - what it just wrote
    assert same(twin.state_dict(), before)
    assert torch.equal(twin(x_of()), layer(x_of()))


def test_saved_and_loaded_with_torch():
    layer, before = in_use()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = layer_of()
    loaded(x_of())
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert same(loaded.state_dict(), before)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_while_in_use(assign):
    layer, _ = in_use()
    other = layer_of()
    torch.manual_seed(7)
    other.reset_parameters()
    layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    assert same(layer.state_dict(), other.state_dict())
    assert torch.equal(layer(x_of()), other(x_of()))


def test_a_full_precision_weight_loads_while_in_use():
    layer, _ = in_use()
    weight = torch.randn(70, 100, dtype=torch.bfloat16, device=DEVICE)
    layer.load_state_dict({"weight": weight, "bias": layer.bias.detach()})
    fresh = FusedFP4Linear.from_weight(weight)
    assert torch.equal(layer.weight_packed, fresh.weight_packed)


def test_another_type_leaves_the_order_alone_and_another_device_does_not():
    layer, before = in_use()
    words = layer._parameters["weight_packed"]
    layer.half()
    assert layer._parameters["weight_packed"] is words
    assert layer.dtype == torch.float16
    layer.to("meta")
    assert not layer.orders
    assert layer.weight_packed.dtype == torch.uint8
    assert layer.weight_packed.shape == before["weight_packed"].shape


def test_each_type_of_input_has_its_order():
    layer, before = in_use()
    exact = x_of(dtype=torch.float64) @ layer.dequantize().double().mT + layer.bias.double()
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        out = layer(x_of(dtype=dtype))
        assert (out.double() - exact).norm() < 6e-3 * exact.norm()
        assert layer.orders["weight"].dtype == (torch.float16 if dtype == torch.float32 else dtype)
    assert same(layer.state_dict(), before)


def test_gradients_pass_and_are_those_of_the_files_order():
    layer, _ = in_use()
    x = x_of().requires_grad_()
    layer(x).sum().backward()
    got, got_bias = x.grad, layer.bias.grad
    x.grad, layer.bias.grad = None, None
    nn.functional.linear(x, layer.dequantize(), layer.bias).sum().backward()
    assert torch.allclose(got.float(), x.grad.float(), rtol=2e-2, atol=2e-2)
    assert torch.equal(got_bias, layer.bias.grad)


def test_what_inference_mode_brought_into_order_trains_afterwards():
    layer = layer_of()
    with torch.inference_mode():
        layer(x_of())
        assert layer.orders
    x = x_of().requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    with torch.inference_mode():
        assert layer.weight_packed.dtype == torch.uint8
    layer(x).sum().backward()


def test_another_layer_s_parameters_in_order_are_refused():
    layer, _ = in_use()
    other = layer_of()
    other._parameters["weight_packed"] = layer._parameters["weight_packed"]
    with pytest.raises(InputError, match="no record"):
        other(x_of())


def test_threads_that_use_and_restore_a_layer_at_once_see_one_order_or_the_other():
    layer, before = in_use()
    expected, faults = layer(x_of()), []

    def use(restores):
        for _ in range(30):
            if restores:
                layer.restore("weight")
            elif not torch.equal(layer(x_of()), expected):
                faults.append("other numbers")

    threads = [threading.Thread(target=use, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert same(layer.state_dict(), before)


def test_who_reads_while_a_weight_is_brought_into_order_waits_for_it():
    moved = threading.Event()

    class Slow(dict):
        def __setitem__(self, name, order):
            moved.set()
            time.sleep(0.2)  # the parameters have moved, and there is no record of it yet
            super().__setitem__(name, order)

    layer, expected = layer_of(), layer_of()(x_of())
    layer.orders = Slow()
    thread = threading.Thread(target=lambda: layer(x_of()))
    thread.start()
    assert moved.wait(10)
    result = layer(x_of())
    thread.join()
    assert torch.equal(result, expected)


def test_the_view_multiplies_and_gives_numbers():
    layer, _ = in_use()
    view = layer.weight
    assert layer.orders, "a view leaves the order alone"
    assert torch.equal(nn.functional.linear(x_of(), view, layer.bias), layer(x_of()))
    assert torch.equal(view.clone(), layer.dequantize())
    assert layer.orders


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's imports
@pytest.mark.parametrize("used", [False, True])
def test_torch_compile_finds_the_order(used):
    torch.compiler.reset()
    layer = layer_of()
    expected = layer_of()(x_of())
    if used:
        layer(x_of())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x_of()), expected)
    assert layer.orders, "brought into order while it was traced"
    words = layer._parameters["weight_packed"]
    assert torch.equal(compiled(x_of()), expected)
    assert layer._parameters["weight_packed"] is words


def test_what_the_order_cannot_hold_is_tried_once(monkeypatch):
    layer = layer_of()
    with torch.no_grad():
        layer.weight_scale.view(torch.uint8)[3, 2] = 0
    tries = []
    real = fp4.shuffle_if_reversible
    monkeypatch.setattr(fp4, "shuffle_if_reversible", lambda *a, **k: tries.append(1) or real(*a, **k))
    layer(x_of()), layer(x_of())
    assert len(tries) == 1
    assert not layer.orders
    layer.load_state_dict(layer_of().state_dict())
    layer(x_of())
    assert layer.orders


def test_offloaded_weights_stay_in_the_order_of_files():
    layer = layer_of()
    layer._hf_hook = type("Hook", (), {"offload": True})()
    layer(x_of())
    assert not layer.orders
    layer._hf_hook = type("Hook", (), {"offload": False})()
    layer(x_of())
    assert layer.orders


def test_a_weight_in_order_refuses_to_be_sharded():
    layer, _ = in_use()
    shard = nn.Parameter(torch.zeros(4, dtype=torch.int32), requires_grad=False)
    shard.device_mesh = object()
    with pytest.raises(InputError, match="cannot be sharded"):
        layer.weight_packed = shard
    assert layer.orders


def test_experts_have_orders_of_their_own():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 48, 32, dtype=torch.bfloat16, device=DEVICE))
            self.down_proj = nn.Parameter(torch.randn(3, 32, 24, dtype=torch.bfloat16, device=DEVICE))

        def forward(self, x):
            both = [nn.functional.linear(x, self.gate_up_proj[i]) for i in range(3)]
            return sum(nn.functional.linear(each[..., :24], self.down_proj[i]) for i, each in enumerate(both))

    torch.manual_seed(0)
    model = Experts()
    plain = copy.deepcopy(model)
    quantize(model)
    assert isinstance(model, PackedModule)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = model(x_of(32))
    assert set(model.orders) == {"gate_up_proj", "down_proj"}
    assert model._parameters["down_proj_packed"].shape[0] == 3
    assert same(model.state_dict(), before)
    for name in ("gate_up_proj", "down_proj"):
        getattr(plain, name).data.copy_(getattr(model, name).clone())
    expected = plain(x_of(32))
    assert (out.float() - expected.float()).norm() < 1e-2 * expected.float().norm()


def test_a_plan_counts_the_same_work_in_either_order():
    model = nn.ModuleDict({"gate_proj": layer_of(64, 128), "q_proj": layer_of(128, 128, bias=False)})
    facts = Facts(width=128, attention=128, rotary=True)
    before = work_of(tree_of(model), facts, 2)
    for layer in model.values():
        layer(x_of(128))
        assert layer.orders
    after = work_of(tree_of(model), facts, 2)
    assert after._replace(products=(), nbytes=0) == before._replace(products=(), nbytes=0)
    assert [product.numel for product in after.products] == [product.numel for product in before.products]
    assert before.traffic
    assert before.chained
