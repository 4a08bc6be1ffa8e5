import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import noise
from tolerances import assert_close
from torch import nn

from apt_model.core.errors import InputError
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.layers.packed_view import PackedView


def make(in_features=33, out_features=10, **options):
    torch.manual_seed(0)
    return FusedFP4Linear(in_features, out_features, **options)


def test_the_weight_looks_like_the_one_it_stands_for():
    layer = make(dtype=torch.bfloat16)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == ((10, 33), torch.bfloat16, torch.device("cpu"))
    assert not weight.requires_grad
    assert isinstance(weight, torch.Tensor)
    assert not isinstance(weight, nn.Parameter)
    assert "weight" not in dict(layer.named_parameters())
    assert repr(weight) == "PackedView([10, 33], torch.bfloat16, nvfp4, device=cpu)"


READS = {
    "clone": lambda w: w.clone(),
    "double": lambda w: w.double(),
    "sum": lambda w: w.sum(0),
    "row": lambda w: w[3],
    "rows": lambda w: w[torch.tensor([3, 1])],
    "slice": lambda w: w[2:5, ::2],
    "plus": lambda w: w + torch.ones(33),
    "into": lambda w: torch.zeros(10, 33).copy_(w),
    "transposed": lambda w: w.T.clone(),
    "twice transposed": lambda w: w.mT.t().clone(),
    "detached": lambda w: w.detach().data.clone(),
    "from the left": lambda w: w @ torch.ones(33, 2),
    "norm": lambda w: torch.linalg.vector_norm(w, dim=1),
    "numpy": lambda w: torch.from_numpy(w.detach().cpu().numpy()),
    "list": lambda w: torch.tensor(w.tolist()),
    "copy": copy.deepcopy,
    "einsum": lambda w: torch.einsum("nk,mk->nm", w, w),
}


@pytest.mark.parametrize("name", READS)
def test_reading_the_weight_reads_the_dequantised_one(name):
    layer = make()
    got = READS[name](layer.weight)
    assert torch.equal(got, READS[name](layer.dequantize()))
    assert type(got) is torch.Tensor


PRODUCTS = {
    "F.linear": F.linear,
    "F.linear by name": lambda x, w, b: F.linear(x, w, bias=b),
    "matmul with T": lambda x, w, b: x @ w.T + b,
    "matmul with mT": lambda x, w, b: torch.matmul(x, w.mT) + b,
    "mm with t": lambda x, w, b: x.mm(w.t()) + b,
    "mm with transpose": lambda x, w, b: torch.mm(x, w.transpose(0, -1)) + b,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_the_weight_is_the_fused_one(name, monkeypatch):
    layer, x = make(), noise(3, 33).requires_grad_()
    expected = layer(x)
    monkeypatch.setattr(PackedView, "dense", lambda _: pytest.fail("the weight was dequantised"))
    y = PRODUCTS[name](x, layer.weight, layer.bias)
    y.sum().backward()
    assert_close("definition_fp32", y, expected)
    assert x.grad is not None


WRITES = {
    "fill": lambda layer: layer.weight.zero_(),
    "init": lambda layer: nn.init.normal_(layer.weight),
    "data": lambda layer: setattr(layer.weight, "data", noise(10, 33)),
    "data in place": lambda layer: layer.weight.data.add_(1),
    "out": lambda layer: torch.mul(noise(10, 33), 2, out=layer.weight),
    "copy": lambda layer: layer.weight.copy_(noise(10, 33)),
    "gradient": lambda layer: layer.weight.requires_grad_(),
    "gradient by attribute": lambda layer: setattr(layer.weight, "requires_grad", True),
    "parameter": lambda layer: nn.Parameter(layer.weight),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_to_the_weight_is_refused(name):
    layer = make()
    with pytest.raises(InputError, match=r"the weight \[10, 33\] is packed in nvfp4: .*cannot be written in place"):
        WRITES[name](layer)


@pytest.mark.parametrize("name", ["data_ptr", "untyped_storage", "storage", "__dlpack__"])
def test_the_weight_has_no_address(name):
    with pytest.raises(InputError, match=r"the weight \[10, 33\] is packed in nvfp4: it has no memory of its own"):
        getattr(make().weight, name)()


def test_a_product_into_a_given_tensor_is_written_there():
    layer, x, out = make(bias=False), noise(3, 33), torch.empty(3, 10)
    assert torch.mm(x, layer.weight.T, out=out) is out
    assert_close("definition_fp32", out, layer(x))


def test_a_merge_into_the_weight_is_refused():
    layer = make()
    with pytest.raises(InputError, match="cannot be written in place"):
        layer.weight.data += 1


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(10, 33)), torch.zeros(10, 33)])
def test_assigning_the_weight_is_refused(value):
    with pytest.raises(InputError, match=r"FusedFP4Linear\.weight is packed in nvfp4 and cannot be assigned"):
        make().weight = value


def test_freezing_a_frozen_weight_is_fine():
    layer = make()
    layer.weight.requires_grad = False
    assert not layer.weight.requires_grad_(False).requires_grad


def test_marks_on_the_packed_parameter_are_found_on_the_weight():
    layer = make()
    assert not getattr(layer.weight, "_is_hf_initialized", False)
    layer.weight_packed._is_hf_initialized = True
    assert layer.weight._is_hf_initialized


def test_peft_finds_what_it_asks_for():
    layer = make(dtype=torch.float16)
    assert layer.W_q is layer.weight_packed
    assert type(layer.dequantize()) is torch.Tensor
    assert layer.dequantize().shape == (10, 33)
