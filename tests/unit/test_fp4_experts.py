import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import noise
from tolerances import assert_close
from torch import nn

from apt_model.core.errors import ConfigError, InputError
from apt_model.layers.fp4_experts import FP4Experts, pack_experts, unpack_experts
from apt_model.layers.packed_view import PackedView
from apt_model.ops import fp4

EXPERTS, HIDDEN, INNER = 3, 20, 24


class Experts(nn.Module):
    """The form of Hugging Face's modules of experts: a loop over those that are hit."""

    swapped = False

    def __init__(self, dtype=torch.float32):
        super().__init__()
        shapes = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
        for i, (name, shape) in enumerate(shapes.items()):
            size = (EXPERTS, *(reversed(shape) if self.swapped else shape))
            scale = 0.1 * torch.arange(1, EXPERTS + 1).view(-1, 1, 1)
            self.register_parameter(name, nn.Parameter((noise(*size, seed=i) * scale).to(dtype)))
        self.down_proj_bias = nn.Parameter(noise(EXPERTS, HIDDEN).to(dtype))

    def forward(self, x, choice):
        out = torch.zeros_like(x)
        for expert in choice.unique():
            rows = torch.where(choice == expert)[0]
            gate, up = self.product(x[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y = self.product(F.silu(gate) * up, self.down_proj[expert]) + self.down_proj_bias[expert]
            out = out.index_add(0, rows, y)
        return out

    def product(self, x, weight):
        return x @ weight if self.swapped else F.linear(x, weight)


class SwappedExperts(Experts):
    swapped = True


class BatchedExperts(SwappedExperts):
    """Llama 4's form: every expert has as many rows."""

    def forward(self, x, choice):
        gate, up = torch.bmm(x.view(self.gate_up_proj.shape[0], -1, HIDDEN), self.gate_up_proj).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, self.down_proj).view(-1, HIDDEN) + self.down_proj_bias[choice]


class GroupedExperts(Experts):
    """transformers' default form: rows sorted by expert, one grouped product."""

    def forward(self, x, choice):
        ends = torch.bincount(choice, minlength=EXPERTS).cumsum(0).to(torch.int32)
        gate_up = F.grouped_mm(x, self.gate_up_proj.transpose(-2, -1), offs=ends)
        gate, up = gate_up.chunk(2, dim=-1)
        return (
            F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(-2, -1), offs=ends) + self.down_proj_bias[choice]
        )


KINDS = (Experts, SwappedExperts, BatchedExperts, GroupedExperts)


def inputs(rows=9):
    return noise(rows, HIDDEN, seed=5).requires_grad_(), torch.arange(rows) * EXPERTS // rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_forward_and_gradients_are_those_of_the_dequantised_weights(kind, form, monkeypatch):
    module = pack_experts(kind(), format=form)
    twin = unpack_experts(copy.deepcopy(module))
    assert type(twin) is kind
    (x, choice), (other, _) = inputs(), inputs()
    expected = twin(other, choice)
    monkeypatch.setattr(PackedView, "dense", lambda _: pytest.fail("a stack of weights was dequantised"))
    y = module(x, choice)
    assert_close("other_shape", y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_close("other_shape", x.grad, other.grad)
    assert_close("other_shape", module.down_proj_bias.grad, twin.down_proj_bias.grad)


@pytest.mark.parametrize("kind", [Experts, SwappedExperts])
def test_what_is_kept(kind):
    module, source = kind(), kind()
    assert pack_experts(module) is module
    assert isinstance(module, FP4Experts)
    assert isinstance(module, kind)
    assert {name: (held.dtype, tuple(held.shape)) for name, held in module.state_dict().items()} == {
        "down_proj_bias": (torch.float32, (3, 20)),
        "gate_up_proj_packed": (torch.uint8, (3, 48, 16)),
        "gate_up_proj_scale": (torch.float8_e4m3fn, (3, 48, 2)),
        "gate_up_proj_global_scale": (torch.float32, (3, 1)),
        "down_proj_packed": (torch.uint8, (3, 20, 16)),
        "down_proj_scale": (torch.float8_e4m3fn, (3, 20, 2)),
        "down_proj_global_scale": (torch.float32, (3, 1)),
    }
    assert [name for name, held in module.named_parameters() if held.requires_grad] == ["down_proj_bias"]
    for name in ("gate_up_proj", "down_proj"):
        seen, weight = getattr(module, name), getattr(source, name)
        assert (seen.shape, seen.dtype) == (weight.shape, weight.dtype)
        for expert in range(EXPERTS):
            alone = weight[expert].detach().mT if kind.swapped else weight[expert].detach()
            values = fp4.dequantize(fp4.quantize(alone), torch.float32)
            assert torch.equal(seen[expert].clone(), values.mT if kind.swapped else values)
    shapes = "[3, 48, 20], down_proj=[3, 20, 24]" if kind is Experts else "[3, 20, 48], down_proj=[3, 24, 20]"
    assert module.extra_repr() == f"gate_up_proj={shapes}, format='nvfp4'"


@pytest.mark.parametrize(
    "index", [1, -1, torch.tensor(2), torch.tensor([2, 0, 2]), torch.tensor([], dtype=torch.int64)]
)
def test_indexing_by_expert_unpacks_nothing(index):
    stack = pack_experts(Experts()).gate_up_proj
    got, dense = stack[index], stack.clone()
    assert type(got) is PackedView
    assert type(dense) is torch.Tensor
    assert torch.equal(got.clone(), dense[index])


@pytest.mark.parametrize("index", [slice(1, 2), (1, 2), (0, slice(None), 3), torch.tensor([True, False, True]), None])
def test_other_indices_read_numbers(index):
    stack = pack_experts(Experts()).gate_up_proj
    assert torch.equal(stack[index], stack.clone()[index])


def test_rows_past_the_last_end_and_empty_experts_are_zero_or_skipped():
    weight = pack_experts(Experts()).down_proj
    x, ends = noise(7, INNER), torch.tensor([0, 4, 5], dtype=torch.int32)
    y = F.grouped_mm(x, weight.mT, offs=ends)
    dense = weight.clone()
    assert_close("other_shape", y[:4], x[:4] @ dense[1].mT)
    assert_close("other_shape", y[4:5], x[4:5] @ dense[2].mT)
    assert not y[5:].any()
    with torch.autocast("cpu", torch.bfloat16):
        assert F.grouped_mm(x, weight.mT, offs=ends).dtype == torch.bfloat16
    assert not F.grouped_mm(x, weight.mT, offs=0 * ends).any()


@pytest.mark.parametrize("kind", [Experts, SwappedExperts])
def test_full_precision_weights_are_quantised_on_load(kind):
    module, source = pack_experts(kind()), kind()
    with torch.no_grad():
        for held in source.parameters():
            held.mul_(1.5).add_(0.1)
    module.load_state_dict(source.state_dict())
    again = pack_experts(source)
    for name, held in again.state_dict().items():
        assert torch.equal(held.view(torch.uint8), module.state_dict()[name].view(torch.uint8)), name
    twin = pack_experts(kind())
    twin.load_state_dict(module.state_dict())
    x, choice = inputs()
    assert torch.equal(twin(x, choice), module(x, choice))


def test_a_weight_that_does_not_fit_is_named():
    with pytest.raises(RuntimeError, match=r"down_proj: expected a float16.*\[3, 20, 24\].*, got .*\[3, 24, 20\]"):
        pack_experts(Experts()).load_state_dict({**Experts().state_dict(), "down_proj": noise(3, 24, 20)})


def test_conversions_leave_the_packed_tensors_alone():
    module = pack_experts(Experts())
    before = {name: held.view(torch.uint8).clone() for name, held in module.state_dict().items() if "bias" not in name}
    module.bfloat16()
    assert all(torch.equal(held, module.state_dict()[name].view(torch.uint8)) for name, held in before.items())
    assert module.gate_up_proj.dtype == module.down_proj_bias.dtype == torch.bfloat16
    x, choice = inputs()
    assert module(x.bfloat16(), choice).dtype == torch.bfloat16
    assert unpack_experts(module, torch.float16).down_proj.dtype == torch.float16


def test_on_meta_it_stays_there():
    module = pack_experts(SwappedExperts().to("meta"))
    assert {held.device.type for held in module.parameters()} == {"meta"}
    assert module.gate_up_proj.shape == (3, 20, 48)


def test_a_class_made_for_packed_weights_is_made_once():
    assert type(pack_experts(Experts())) is type(pack_experts(Experts()))
    assert type(pack_experts(Experts())) is not type(pack_experts(SwappedExperts()))


def test_writing_and_assigning_are_refused():
    module = pack_experts(Experts())
    with pytest.raises(InputError, match="cannot be written in place"):
        module.down_proj[0].zero_()
    with pytest.raises(InputError, match=r"FP4Experts\.down_proj is packed in nvfp4 and cannot be assigned"):
        module.down_proj = nn.Parameter(noise(3, 20, 24))


def holding(**parameters):
    module = nn.Module()
    for name, held in parameters.items():
        module.register_parameter(name, nn.Parameter(held))
    return module


def test_the_module_s_own_word_on_its_layout_counts():
    module = holding(up_proj=noise(2, 8, 8))
    module.is_transposed = True
    assert torch.equal(pack_experts(module).up_proj[0].clone(), pack_and_back(noise(2, 8, 8)[0].mT).mT)


def pack_and_back(weight):
    return fp4.dequantize(fp4.quantize(weight), weight.dtype)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (holding(w=noise(2, 3, 4)), "Module holds no 3-D parameter gate_up_proj or gate_proj or up_proj or down_proj"),
        (holding(down_proj=noise(3, 4)), "Module holds no 3-D parameter"),
        (pack_experts(Experts()), "FP4Experts holds no 3-D parameter"),
        (holding(up_proj=noise(2, 4, 3), down_proj=noise(2, 3, 4)), r"which side of up_proj \[2, 4, 3\], down_proj"),
        (holding(gate_up_proj=noise(2, 7, 3), down_proj=noise(2, 3, 4)), "which side of gate_up_proj"),
        (
            holding(up_proj=noise(2, 4, 3), down_proj=noise(2, 3, 4).half()),
            r"of one type, got \['torch.float16', 'torch",
        ),
    ],
)
def test_what_cannot_be_packed_is_named_and_stays(module, message):
    names = list(dict(module.named_parameters()))
    with pytest.raises(InputError, match=message):
        pack_experts(module)
    assert list(dict(module.named_parameters())) == names


def test_a_format_and_a_type_that_are_not_there_are_named():
    with pytest.raises(InputError, match="expected nvfp4 or mxfp4, got 'int4'"):
        pack_experts(Experts(), format="int4")
    with pytest.raises(ConfigError, match=r"Experts\.dtype: expected float16"):
        pack_experts(Experts(torch.float8_e4m3fn))


def test_a_weight_that_is_not_finite_leaves_the_module_as_it_was():
    module = Experts()
    module.down_proj.data[1, 0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        pack_experts(module)
    assert type(module) is Experts
    assert list(dict(module.named_parameters())) == ["gate_up_proj", "down_proj", "down_proj_bias"]
