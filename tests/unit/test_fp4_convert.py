import copy
import gc
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F
from small_models import build, noise, tokens
from tolerances import assert_close
from torch import nn
from torch.nn.utils import parametrizations, prune

from apt_model.core.errors import ConfigError, InputError
from apt_model.core.patterns import covers
from apt_model.layers.fp4_experts import FP4Experts
from apt_model.layers.packed import PackedModule
from apt_model.optimization import FP4Config, FusedFP4Linear, convert, dequantize, quantize
from apt_model.optimization.fp4_config import QuantizeReport, Skipped


class Conv1D(nn.Module):
    """Hugging Face's linear layer with a weight [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(0.2 * noise(nx, nf)), nn.Parameter(noise(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(0.2 * noise(2, 24, 16)), nn.Parameter(0.2 * noise(2, 16, 12))

    def forward(self, x):
        for up, down in zip(self.gate_up_proj, self.down_proj, strict=True):
            gate, value = F.linear(x, up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * value, down)
        return x


class Model(nn.Module):
    """One of each; the output projection is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.norm = nn.LayerNorm(16)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 24), "down": Conv1D(16, 24), "experts": Experts()}) for _ in range(2)
        )
        self.out, self.lm_head = nn.Linear(16, 16, bias=False), nn.Linear(16, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        for layer in self.layers:
            x = x + layer["experts"](layer["down"](F.relu(layer["up"](x))))
        return self.lm_head(self.out(x))


def model(seed=0):
    torch.manual_seed(seed)
    return Model()


def reported(what, config=None):
    """The model, and what is reported of it."""
    reports = []
    return quantize(what, config, report=reports.append), reports[0]


def weights_of(report):
    return {each.name: each.reason for each in (*report.asked, *report.skipped, *report.others)}


def snapshot(what):
    return {name: (type(each), dict(each.named_parameters(recurse=False))) for name, each in what.named_modules()}


# --- what is done


def test_every_linear_layer_is_in_four_bits_and_the_rest_is_named():
    what, before = model(), sum(held.nbytes for held in model().parameters())
    same, report = reported(what)
    assert same is what
    assert [name for name, each in what.named_modules() if isinstance(each, PackedModule)] == list(report.quantized)
    assert report.quantized == (
        *(f"layers.{i}.{name}" for i in range(2) for name in ("up", "down", "experts")),
        "out",
    )
    assert report.asked == (Skipped("lm_head", "skip='lm_head'", 11 * 16 * 4),)
    assert report.skipped == ()
    assert report.others == (Skipped("embed.weight", "Embedding", 11 * 16 * 4),)
    assert (report.format, report.frozen) == ("nvfp4", 9)
    assert report.bytes_before == before
    assert report.bytes_after == sum(held.nbytes for held in what.parameters()) < before / 3
    assert what.lm_head.weight is what.embed.weight


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_it_computes_what_the_dequantised_model_computes(form):
    what, ids = quantize(model(), FP4Config(format=form)), tokens(2, 5, high=11)
    twin = dequantize(copy.deepcopy(what))
    assert not any(isinstance(each, PackedModule) for each in twin.modules())
    assert_close("other_shape", what(ids), twin(ids))
    what(ids).square().sum().backward()
    twin(ids).square().sum().backward()
    assert_close("accumulation", what.embed.weight.grad, twin.embed.weight.grad)
    trainable = [name for name, held in what.named_parameters() if held.requires_grad]
    assert trainable == ["embed.weight", "norm.weight", "norm.bias", *(
        f"layers.{i}.{name}.bias" for i in range(2) for name in ("up", "down")
    )]  # fmt: skip


def test_an_apt_model_generates():
    what = quantize(build(decoder_only=True, activation="swiglu").eval(), FP4Config(skip=()))
    twin = dequantize(copy.deepcopy(what))
    assert what.generate(tokens(2, 5), max_new_tokens=4).tolist() == twin.generate(
        tokens(2, 5), max_new_tokens=4
    ).tolist()  # fmt: skip


def test_a_model_that_is_one_linear_layer_is_returned_as_another():
    linear = nn.Linear(8, 4)
    layer = quantize(linear)
    assert type(layer) is FusedFP4Linear
    assert layer.bias is linear.bias
    assert type(dequantize(layer)) is nn.Linear


def test_each_layer_is_dropped_before_the_next_is_quantised(monkeypatch):
    what = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    weights, alive = [weakref.ref(each.weight) for each in what], []
    quantized = convert.packed_of

    def watched(module, form):
        gc.collect()
        alive.append(sum(each() is not None for each in weights))
        return quantized(module, form)

    monkeypatch.setattr(convert, "packed_of", watched)
    quantize(what)
    assert alive == [4, 3, 2, 1]
    packed = [weakref.ref(each.weight_packed) for each in what]
    plain, alive = convert._plain, []

    def watched_back(module, dtype):
        gc.collect()
        alive.append(sum(each() is not None for each in packed))
        return plain(module, dtype)

    monkeypatch.setattr(convert, "_plain", watched_back)
    dequantize(what)
    assert alive == [4, 3, 2, 1]


def test_a_layer_that_stands_in_two_places_still_does():
    shared = nn.Linear(8, 8)
    what = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(8, 8))})
    _, report = reported(what)
    assert what["a"] is what["b"][0]
    assert report.quantized == ("a", "b.1")
    dequantize(what)
    assert what["a"] is what["b"][0]


def test_flags_hooks_biases_and_marks_stay():
    what = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    what[0].train()
    what[0].mark = "mine"
    bias, calls = what[0].bias, []
    handles = [
        what[0].register_forward_pre_hook(lambda *_: calls.append("before")),
        what[0].register_forward_hook(lambda *_: calls.append("after"), with_kwargs=True),
        what[0].register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    for change in (quantize, dequantize):
        change(what)
        assert [each.training for each in what] == [True, False]
        assert what[0].bias is bias
        assert what[0].mark == "mine"
        what(noise(2, 8).requires_grad_()).sum().backward()
        assert calls == ["before", "after", "backward"]
        calls.clear()
    for handle in handles:
        handle.remove()
    what(noise(2, 8))
    assert not calls


def test_on_meta_the_layers_stay_there():
    what = quantize(model().to("meta"))
    assert {held.device.type for held in what.parameters()} == {"meta"}
    what.load_state_dict(quantize(model()).state_dict(), assign=True)
    assert torch.isfinite(what(tokens(2, 5, high=11))).all()


def test_a_quantised_model_is_left_as_it_is():
    what = quantize(model())
    before = snapshot(what)
    _, report = reported(what)
    assert report.quantized == ()
    assert snapshot(what).keys() == before.keys()
    assert report.bytes_before == report.bytes_after


def test_the_type_of_each_layer_is_kept():
    what = quantize(nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 8, dtype=torch.float64)))
    assert [each.dtype for each in what] == [torch.bfloat16, torch.float64]
    assert {each.weight.dtype for each in dequantize(copy.deepcopy(what), torch.float16)} == {torch.float16}
    assert {each.bias.dtype for each in dequantize(what, torch.float16)} == {torch.float16}


# --- what is left, and why


class Special(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


def replaced():
    linear = nn.Linear(8, 8)
    linear.forward = lambda x: x
    return linear


def compiled():
    linear = nn.Linear(8, 8)
    linear.compile(backend="eager")
    return linear


def extended():
    linear = nn.Linear(8, 8)
    linear.register_buffer("factor", torch.ones(8))
    return linear


def hooked():
    linear = nn.Linear(8, 8)
    linear.register_state_dict_post_hook(lambda *_: None)
    return linear


def holding(weight):
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point() and weight.dtype.itemsize > 1)
    return linear


class Marked(nn.Parameter):
    """What another quantiser makes of a parameter."""


def marked():
    linear = nn.Linear(8, 8)
    linear._parameters["weight"] = Marked(noise(8, 8))
    return linear


REASONS = {
    "subclass": (lambda: Special(8, 8), "Special is a subclass of nn.Linear and may do more"),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2),
        "NonDynamicallyQuantizableLinear is a subclass of nn.Linear and may do more",
    ),
    "parametrised": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "its weight is parametrised"),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 3),
        "weight is computed by a hook, as pruning and weight_norm do",
    ),
    "forward": (replaced, "its forward has been replaced, as accelerate's hooks do"),
    "compiled": (compiled, "it is compiled: quantise first"),
    "buffers": (extended, "it holds more than a weight and a bias"),
    "state dict": (hooked, "it has hooks on its state dict"),
    "integers": (lambda: holding(torch.ones(8, 8, dtype=torch.int8)), "weight is torch.int8 [8, 8]"),
    "fp8": (lambda: holding(noise(8, 8).to(torch.float8_e4m3fn)), "weight is torch.float8_e4m3fn [8, 8]"),
    "empty": (lambda: holding(torch.ones(0, 8)), "weight is torch.float32 [0, 8]"),
    "another parameter": (marked, "weight is a Marked"),
    "not finite": (
        lambda: holding(torch.full((8, 8), torch.nan)),
        "quantize: the weight holds values that are not finite, or not below 2^127",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_would_change_meaning_is_left_with_its_reason(name):
    make, reason = REASONS[name]
    what = nn.ModuleDict({"odd": make(), "plain": nn.Linear(8, 8)})
    before = snapshot(what.odd)
    _, report = reported(what)
    assert report.quantized == ("plain",)
    assert [each.reason for each in report.skipped] == [reason]
    assert snapshot(what.odd).keys() == before.keys()
    assert all(kind is before[name][0] and held.keys() == before[name][1].keys() for name, (kind, held) in snapshot(
        what.odd
    ).items())  # fmt: skip


def test_tied_weights_stay_tied():
    what = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("a", "b", "c", "d")})
    what.b.weight = what.a.weight
    what.d.weight = nn.Parameter(what.c.weight.detach())
    what["embed"] = nn.Embedding(8, 8, _weight=what.a.weight)
    what["free"] = nn.Linear(8, 8)
    _, report = reported(what)
    assert report.quantized == ("free",)
    assert weights_of(report) == {
        "a": "weight is tied to b.weight, embed.weight",
        "b": "weight is tied to a.weight, embed.weight",
        "c": "weight is tied to d.weight",
        "d": "weight is tied to c.weight",
        "embed.weight": "Embedding",
    }
    assert what.a.weight is what.b.weight


def test_tied_weights_on_meta_stay_tied():
    what = nn.Sequential(nn.Linear(8, 8, device="meta"), nn.Linear(8, 8, device="meta"), nn.Linear(8, 8, device="meta"))
    what[1].weight = what[0].weight
    assert reported(what)[1].quantized == ("2",)


def test_a_tied_output_projection_is_left_without_being_asked_for():
    _, report = reported(model(), FP4Config(skip=()))
    assert report.skipped == (Skipped("lm_head", "weight is tied to embed.weight", 704),)
    assert report.asked == ()


def test_experts_whose_layout_cannot_be_told_are_left():
    what = model()
    what.layers[0]["experts"].down_proj = nn.Parameter(noise(2, 16, 13))
    _, report = reported(what)
    assert len(report.skipped) == 1
    assert report.skipped[0].name == "layers.0.experts"
    assert "cannot be told" in report.skipped[0].reason


def test_matrices_of_other_modules_are_named():
    what = nn.ModuleDict({"conv": nn.Conv1d(2, 3, 3), "attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    what.register_parameter("table", nn.Parameter(noise(3, 4)))
    _, report = reported(what)
    assert [(each.name, each.reason) for each in report.others] == [
        ("table", "ModuleDict"),
        ("conv.weight", "Conv1d"),
        ("attention.in_proj_weight", "MultiheadAttention"),
    ]


@pytest.mark.parametrize(
    ("pattern", "name", "covered"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "lm_head2", False),
        ("visual", "model.visual.blocks.0.fc", True),
        ("layers.0", "model.layers.0.fc", True),
        ("layers.0", "model.layers.01.fc", False),
        ("layers.*.fc", "model.layers.3.mlp.fc", True),
        ("*gate", "model.mlp.router_gate", True),
        ("experts.?", "experts.12.fc", False),
        ("", "fc", False),
        ("*", "", True),
    ],
)
def test_a_pattern_covers_whole_parts_of_a_name(pattern, name, covered):
    assert covers(pattern, name) is covered


def test_what_is_asked_for_is_left():
    _, report = reported(model(), FP4Config(skip=("layers.1", "ou?", "experts")))
    assert report.quantized == ("layers.0.up", "layers.0.down")
    assert {each.name: each.reason for each in report.asked} == {
        "layers.0.experts": "skip='experts'",
        "layers.1.up": "skip='layers.1'",
        "layers.1.down": "skip='layers.1'",
        "layers.1.experts": "skip='layers.1'",
        "out": "skip='ou?'",
    }


# --- what is said


def test_the_report_is_a_text():
    assert str(reported(model())[1]).splitlines() == [
        "nvfp4: 7 modules quantised, 17.1 KiB -> 3.7 KiB in parameters and buffers",
        "frozen now, trainable before: 9 weights",
        "left as asked: lm_head (skip='lm_head'; 704 bytes)",
        "no linear layers: embed.weight (Embedding; 704 bytes)",
    ]
    left = (Skipped("", "some reason", 3 * 2**20),)
    text = str(
        QuantizeReport(
            format="mxfp4", quantized=(), asked=(), skipped=left, others=(), frozen=0, bytes_before=0, bytes_after=0
        )
    )
    assert text.splitlines()[1] == "could not be quantised: the model (some reason; 3.0 MiB)"


@pytest.mark.parametrize(("pattern", "level"), [("lm_head", logging.INFO), ("out", logging.WARNING)])
def test_without_a_report_it_goes_to_the_log(pattern, level, caplog):
    caplog.set_level(logging.INFO)
    quantize(model(), FP4Config(skip=(pattern,)))
    assert [(each.name, each.levelno) for each in caplog.records] == [("apt_model.optimization.convert", level)]
    assert "modules quantised" in caplog.text


# --- errors


@pytest.mark.parametrize("what", [nn.Sequential(nn.ReLU(), nn.Embedding(3, 4)), nn.Sequential(Special(8, 8))])
def test_a_model_without_linear_layers_is_an_error(what):
    with pytest.raises(InputError, match="quantize: Sequential has no linear layer that can be quantised") as caught:
        quantize(what)
    assert ("0 (Special is a subclass" in str(caught.value)) is (type(what[0]) is Special)


def test_a_pattern_that_covers_nothing_is_an_error_and_nothing_is_changed():
    what = model()
    before = snapshot(what)
    with pytest.raises(
        ConfigError, match=r"FP4Config\.skip: expected patterns of which each covers a module, got 'hea"
    ):
        quantize(what, FP4Config(skip=("lm_head", "head")))
    assert snapshot(what).keys() == before.keys()
    assert not any(isinstance(each, PackedModule) for each in what.modules())


def test_the_default_pattern_may_cover_nothing():
    assert reported(nn.Sequential(nn.Linear(8, 8)))[1].quantized == ("0",)


@pytest.mark.parametrize("options", [{"format": "int4"}, {"skip": "lm_head"}, {"skip": ["lm_head"]}, {"skip": (1,)}])
def test_a_wrong_value_is_refused_by_name(options):
    with pytest.raises(ConfigError, match=rf"FP4Config\.{next(iter(options))}: expected .*, got "):
        FP4Config(**options)


def test_dequantising_what_is_not_packed_is_an_error():
    with pytest.raises(InputError, match="dequantize: Model has no packed layer"):
        dequantize(model())


def test_dequantising_a_fused_activation_is_an_error_and_nothing_is_changed():
    what = nn.Sequential(FusedFP4Linear(8, 8), FusedFP4Linear(8, 8, activation="gelu"))
    with pytest.raises(InputError, match=r"dequantize: 1 has its activation 'gelu' in it, which nn.Linear has not"):
        dequantize(what)
    assert type(what[0]) is FusedFP4Linear


def test_dequantising_to_no_weight_s_type_is_an_error():
    with pytest.raises(ConfigError, match=r"dequantize\.dtype: expected float16.*, got torch.int8"):
        dequantize(quantize(model()), torch.int8)


# --- other people's models


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_s_own_fast_path_takes_the_packed_layers(norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, norm_first=norm_first)
    what = quantize(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval())
    assert type(what.layers[0].linear1) is FusedFP4Linear
    with torch.no_grad():
        assert_close("other_shape", what(noise(2, 5, 16)), dequantize(copy.deepcopy(what))(noise(2, 5, 16)))


def hugging_face(name):
    tr = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "gpt2":
        ids = {"bos_token_id": 0, "eos_token_id": 1}
        return tr.GPT2LMHeadModel(tr.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, **ids))
    if name == "t5":
        shape = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 4, "d_kv": 8}
        return tr.T5ForConditionalGeneration(tr.T5Config(vocab_size=64, decoder_start_token_id=0, **shape))
    config, cls = {
        "mixtral": (tr.MixtralConfig, tr.MixtralForCausalLM),
        "gpt_oss": (tr.GptOssConfig, tr.GptOssForCausalLM),
    }[name]
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    what = cls(config(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape, **experts))
    for held in what.parameters():
        if held.dim() == 3:
            nn.init.normal_(held, std=0.2)
    return what


@pytest.mark.parametrize(
    ("name", "form", "count"),
    [("gpt2", None, 4), ("t5", None, 16)]
    + [(name, form, 5) for name in ("mixtral", "gpt_oss") for form in ("eager", "grouped_mm", "batched_mm")],
)
@pytest.mark.filterwarnings("default")
def test_models_of_transformers_compute_what_their_dequantised_weights_do(name, form, count):
    what = hugging_face(name).eval()
    if form is not None:
        what.set_experts_implementation(form)
    _, report = reported(what)
    assert len(report.quantized) == count
    assert report.skipped == ()
    assert any(isinstance(each, FP4Experts) for each in what.modules()) is (form is not None)
    twin, ids = dequantize(copy.deepcopy(what)), tokens(2, 7, low=3, high=64)
    options = {"decoder_input_ids": ids} if name == "t5" else {}
    assert_close("other_shape", what(input_ids=ids, **options).logits, twin(input_ids=ids, **options).logits)
    half = what.to(torch.bfloat16)
    assert half(input_ids=ids, **options).logits.dtype == torch.bfloat16


def test_a_layer_is_brought_to_where_it_is_quantised_and_back(monkeypatch):
    went, packed = [], convert.packed_of

    def to(module, device):
        went.append((type(module).__name__, str(device)))
        return module

    def some(module, config):
        if module.out_features == 8:
            raise InputError("not this one")
        return packed(module, config)

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(convert, "packed_of", some)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(8, 16))
    quantize(model, device="cuda:1")
    assert went == [
        ("Linear", "cuda:1"), ("FusedFP4Linear", "cpu"),
        ("Linear", "cuda:1"), ("Linear", "cpu"),
        ("Linear", "cuda:1"), ("FusedFP4Linear", "cpu"),
    ]  # fmt: skip
