import copy

import pytest
import torch
from safetensors.torch import load, save
from small_models import build, noise, tokens
from tolerances import assert_close
from torch import nn

from apt_model.core.errors import ConfigError, InputError
from apt_model.layers import packed_products
from apt_model.layers.packed_view import PackedView
from apt_model.ops import fp4
from apt_model.optimization import FP4Config, FusedFP4Embedding, FusedFP4Linear, dequantize, quantize
from apt_model.optimization.fp4_config import Skipped

FORMATS = ("nvfp4", "mxfp4")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PACKED = ("weight_packed", "weight_scale", "weight_global_scale")
IDS = {
    "one": torch.tensor(7),
    "row": tokens(5, high=63),
    "int32": tokens(2, 3, high=63).int(),
    "four dimensions": tokens(2, 1, 3, 2, high=63),
    "the same": torch.full((4,), 62),
    "not contiguous": tokens(4, 6, high=63).T[::2],
    "none": torch.empty(0, dtype=torch.int64),
    "none in three dimensions": torch.empty(2, 0, 3, dtype=torch.int64),
}


def make(rows=63, width=33, *, seed=0, **options):
    torch.manual_seed(seed)
    return FusedFP4Embedding(rows, width, **options)


def packed_bytes(layer):
    """The packed tensors, bit for bit."""
    return {name: (held.dtype, held.view(torch.uint8).tolist()) for name, held in layer.state_dict().items()}


def reported(what, config=None):
    """The model, and what is reported of it."""
    reports = []
    return quantize(what, config or FP4Config(embeddings=True), report=reports.append), reports[0]


# --- what it is


def test_its_tensors_are_those_of_the_interface():
    layer = make(7, 20)
    assert {name: (held.dtype, tuple(held.shape)) for name, held in layer.state_dict().items()} == {
        "weight_packed": (torch.uint8, (7, 16)),
        "weight_scale": (torch.float8_e4m3fn, (7, 2)),
        "weight_global_scale": (torch.float32, (1,)),
    }
    layer = make(7, 40, format="mxfp4")
    assert {name: (held.dtype, tuple(held.shape)) for name, held in layer.state_dict().items()} == {
        "weight_packed": (torch.uint8, (7, 24)),
        "weight_scale": (torch.uint8, (7, 2)),
    }
    assert not any(held.requires_grad for held in layer.parameters())


@pytest.mark.parametrize(("form", "bits"), [("nvfp4", 4.5), ("mxfp4", 4.25)])
def test_it_takes_what_is_promised(form, bits):
    layer = make(1000, 256, format=form)
    stored = sum(held.nbytes for held in (layer.weight_packed, layer.weight_scale))
    assert stored * 8 == bits * 1000 * 256


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("padding", [None, 2, -1])
def test_a_new_one_is_a_new_embedding_quantised(form, dtype, padding):
    layer = make(padding_idx=padding, format=form, dtype=dtype)
    torch.manual_seed(0)
    embedding = nn.Embedding(63, 33, padding, dtype=dtype)
    assert packed_bytes(layer) == packed_bytes(FusedFP4Embedding.from_embedding(embedding, format=form))
    assert layer.padding_idx == embedding.padding_idx
    assert layer(torch.tensor([2])).any() == (padding != 2)


def test_from_embedding_takes_the_row_the_flag_and_the_type_over():
    layer = FusedFP4Embedding.from_embedding(nn.Embedding(5, 3, padding_idx=-2, dtype=torch.bfloat16).eval())
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx, layer.dtype) == (5, 3, 3, torch.bfloat16)
    assert not layer.training
    assert not layer.to_embedding().training
    assert isinstance(layer, nn.Embedding)


def test_it_says_what_it_is():
    assert make(8, 4).extra_repr() == "8, 4, format='nvfp4', bits=4.5"
    assert make(8, 4, padding_idx=1, format="mxfp4").extra_repr() == "8, 4, padding_idx=1, format='mxfp4', bits=4.25"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "fp4"}, r"FusedFP4Embedding\.format: expected nvfp4 or mxfp4, got 'fp4'"),
        ({"rows": 0}, r"FusedFP4Embedding\.num_embeddings: expected above 0, got 0"),
        ({"width": -1}, r"FusedFP4Embedding\.embedding_dim: expected above 0, got -1"),
        ({"padding_idx": 63}, r"FusedFP4Embedding\.padding_idx: expected one of 63 rows, got 63"),
        ({"padding_idx": -64}, r"FusedFP4Embedding\.padding_idx: expected one of 63 rows, got -64"),
        ({"dtype": torch.int8}, r"FusedFP4Embedding\.dtype: expected float16, .* or float64, got torch.int8"),
    ],
)
def test_an_option_that_cannot_be_met_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


OF_TRAINING = {"max_norm": 0.0, "scale_grad_by_freq": True, "sparse": True}


@pytest.mark.parametrize("name", OF_TRAINING)
def test_what_a_frozen_table_cannot_do_is_refused(name):
    option = {name: OF_TRAINING[name]}
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        make(**option)
    message = f"from_embedding: expected an embedding that can be frozen, got one with {name}={OF_TRAINING[name]}"
    with pytest.raises(InputError, match=message):
        FusedFP4Embedding.from_embedding(nn.Embedding(5, 3, **option))


@pytest.mark.parametrize("what", [nn.Linear(4, 4), FusedFP4Embedding(4, 4), torch.zeros(4, 4)])
def test_from_embedding_takes_embeddings(what):
    with pytest.raises(InputError, match=f"from_embedding: expected an nn.Embedding, got {type(what).__name__}"):
        FusedFP4Embedding.from_embedding(what)


# --- what it computes


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 63, 1000])
@pytest.mark.parametrize("width", [1, 63, 1000])
def test_it_gives_the_rows_of_the_dequantised_table(form, dtype, rows, width):
    embedding = nn.Embedding(rows, width, dtype=dtype)
    layer, ids = FusedFP4Embedding.from_embedding(embedding, format=form), torch.randperm(rows)
    table = fp4.dequantize(fp4.quantize(embedding.weight, form), dtype)
    assert (layer(ids).dtype, layer(ids).requires_grad) == (dtype, False)
    assert torch.equal(layer(ids), table[ids])
    assert torch.equal(layer.dequantize(), table)
    error = (layer(ids) - embedding(ids)).double().square().sum() / embedding.weight.double().square().sum()
    assert error < 0.03  # the tables are Gaussian


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", IDS)
def test_ids_may_have_any_shape(form, name):
    layer, ids = make(format=form), IDS[name]
    assert layer(ids).shape == (*ids.shape, 33)
    assert torch.equal(layer(ids), nn.functional.embedding(ids, layer.dequantize()))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_padding_row_is_the_source_s(form, value):
    embedding = nn.Embedding(9, 20, padding_idx=4)
    embedding.weight.data[4] = value
    assert FusedFP4Embedding.from_embedding(embedding, format=form)(torch.tensor([4])).unique().tolist() == [value]


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        (torch.tensor([63]), IndexError),
        (torch.tensor([-1]), IndexError),
        (torch.tensor([1.0]), RuntimeError),
        (torch.tensor([True]), RuntimeError),
        ([1], TypeError),
    ],
)
def test_bad_ids_are_torch_s_own_errors(ids, kind):
    messages = []
    for layer in (make(), nn.Embedding(63, 33)):
        with pytest.raises(kind) as caught:
            layer(ids)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_only_the_rows_that_are_asked_for_are_dequantised(monkeypatch):
    shapes, whole = [], fp4.dequantize
    monkeypatch.setattr(
        packed_products.fp4, "dequantize", lambda weight, dtype: (shapes.append(weight.shape), whole(weight, dtype))[1]
    )
    make(1000, 40)(tokens(2, 3))
    assert shapes == [(6, 40)]


def test_many_rows_are_dequantised_in_slabs(monkeypatch):
    layer, ids = make(), tokens(5, 8, high=63)
    expected = layer(ids)
    monkeypatch.setattr(packed_products, "SLAB_WEIGHTS", 90)
    assert torch.equal(layer(ids), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's import
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("width", [1, 48, 63, 1000])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles_whole(form, width, backend):
    layer = make(width=width, format=form, dtype=torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for ids in (IDS["row"], IDS["four dimensions"], IDS["none"]):
        assert torch.equal(compiled(ids), layer(ids))


def test_inputs_can_be_made_to_take_a_gradient():
    """As Hugging Face's enable_input_require_grads does for checkpointing under adapters."""
    layer = make()
    layer.register_forward_hook(lambda _, __, rows: rows.requires_grad_())
    assert layer(IDS["row"]).requires_grad


def test_its_weight_is_a_view():
    layer = make(dtype=torch.bfloat16)
    assert type(layer.weight) is PackedView
    assert (layer.weight.shape, layer.weight.dtype) == ((63, 33), torch.bfloat16)
    assert torch.equal(nn.functional.embedding(IDS["row"], layer.weight), layer(IDS["row"]))
    x = noise(2, 33, dtype=torch.bfloat16)
    assert_close("one_truncation_bf16", nn.functional.linear(x, layer.weight), x @ layer.dequantize().mT)
    with pytest.raises(InputError, match="packed in nvfp4 and cannot be assigned"):
        layer.weight = nn.Parameter(noise(63, 33))


# --- where it is kept, and what it loads


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversions_change_what_comes_out_and_not_what_is_stored(form, dtype):
    layer = make(format=form)
    before, expected = packed_bytes(layer), layer(IDS["row"])
    assert torch.equal(layer.to(dtype)(IDS["row"]), expected.to(dtype))
    assert packed_bytes(layer) == before
    assert (layer.half().dtype, layer.weight.dtype) == (torch.float16, torch.float16)


@pytest.mark.parametrize("form", FORMATS)
def test_copies_and_files_hold_the_same_bits(form):
    layer, other = make(format=form), make(seed=1, format=form)
    twin = copy.deepcopy(layer)
    assert packed_bytes(twin) == packed_bytes(layer) != packed_bytes(other)
    assert twin.weight_packed.data_ptr() != layer.weight_packed.data_ptr()
    other.load_state_dict(load(save(layer.state_dict())))
    assert packed_bytes(other) == packed_bytes(layer)
    assert torch.equal(other(IDS["row"]), twin(IDS["row"]))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_full_precision_table_is_quantised_on_load(form, dtype):
    embedding, layer = nn.Embedding(63, 33, dtype=dtype), make(format=form)
    nn.ModuleDict({"embed": layer}).load_state_dict({"embed.weight": embedding.weight})
    assert packed_bytes(layer) == packed_bytes(FusedFP4Embedding.from_embedding(embedding, format=form))
    assert layer.dtype == torch.float32


def test_what_cannot_be_loaded_is_named_and_changes_nothing():
    layer = make()
    before = packed_bytes(layer)
    with pytest.raises(RuntimeError, match=r"weight: expected a float16.*\[63, 33\], or packed.*\[63, 32\]"):
        layer.load_state_dict({"weight": noise(63, 32)})
    with pytest.raises(RuntimeError, match="weight_scale, weight_global_scale missing beside weight_packed"):
        layer.load_state_dict({"weight_packed": layer.weight_packed})
    assert packed_bytes(layer) == before


@pytest.mark.parametrize("form", FORMATS)
def test_on_meta_nothing_is_drawn_and_nothing_is_lost(form):
    state = torch.get_rng_state()
    layer = FusedFP4Embedding(63, 33, 5, format=form, device="meta")
    assert torch.equal(state, torch.get_rng_state())
    assert {held.device.type for held in layer.parameters()} == {"meta"}
    assert layer(torch.empty(2, 4, dtype=torch.int64, device="meta")).shape == (2, 4, 33)
    layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    assert packed_bytes(layer) == packed_bytes(make(padding_idx=5, format=form))
    assert FusedFP4Embedding.from_embedding(nn.Embedding(3, 2, device="meta"), format=form).weight.is_meta


# --- in a model


class Scaled(nn.Embedding):
    """As Hugging Face has them."""

    def forward(self, ids):
        return 2 * super().forward(ids)


class Model(nn.Module):
    """A table of its own, one that is tied, one that does more, and one that is trained otherwise."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 16, padding_idx=3), nn.Embedding(5, 16)
        self.shared, self.scaled = nn.Embedding(11, 16), Scaled(11, 16)
        self.clipped, self.fc = nn.Embedding(11, 16, max_norm=2.0), nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 11, bias=False)
        self.lm_head.weight = self.shared.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.places.weight + self.shared(ids) + self.scaled(ids) + self.clipped(ids)
        return self.lm_head(self.fc(x))


def model():
    torch.manual_seed(0)
    return Model()


def test_embeddings_are_left_unless_asked_for():
    what, report = reported(model(), FP4Config())
    assert report.quantized == ("fc",)
    assert type(what.tokens) is nn.Embedding
    assert [each.name for each in report.others] == [
        f"{name}.weight" for name in ("tokens", "places", "shared", "scaled", "clipped")
    ]
    assert report.skipped == ()


@pytest.mark.parametrize("form", FORMATS)
def test_embeddings_are_quantised_where_that_changes_no_meaning(form):
    what, plain = model(), model()
    _, report = reported(what, FP4Config(format=form, embeddings=True))
    assert report.quantized == ("tokens", "places", "fc")
    assert [type(what.get_submodule(name)) for name in report.quantized] == [
        FusedFP4Embedding, FusedFP4Embedding, FusedFP4Linear,
    ]  # fmt: skip
    assert report.asked == (Skipped("lm_head", "skip='lm_head'", 704),)
    assert report.skipped == (
        Skipped("shared", "weight is tied to lm_head.weight", 704),
        Skipped("scaled", "Scaled is a subclass of nn.Embedding and may do more", 704),
        Skipped("clipped", "it has max_norm=2.0, which a frozen table cannot meet", 704),
    )
    assert report.others == ()
    assert report.frozen == 3
    assert report.bytes_after == sum(held.nbytes for held in what.parameters()) < report.bytes_before
    assert what.shared.weight is what.lm_head.weight
    expected = fp4.dequantize(fp4.quantize(plain.tokens.weight, form), torch.float32)
    assert torch.equal(what.tokens(torch.arange(11)), expected)
    assert not what.tokens(torch.tensor([3])).any()


def test_the_report_says_it():
    left = (
        "shared (weight is tied to lm_head.weight; 704 bytes)",
        "scaled (Scaled is a subclass of nn.Embedding and may do more; 704 bytes)",
        "clipped (it has max_norm=2.0, which a frozen table cannot meet; 704 bytes)",
    )
    assert str(reported(model())[1]).splitlines() == [
        "nvfp4: 3 modules quantised, 4.1 KiB -> 2.4 KiB in parameters and buffers",
        "frozen now, trainable before: 3 weights",
        "left as asked: lm_head (skip='lm_head'; 704 bytes)",
        f"could not be quantised: {', '.join(left)}",
    ]


def test_skip_covers_embeddings():
    what, report = reported(model(), FP4Config(skip=("tok*", "lm_head"), embeddings=True))
    assert Skipped("tokens", "skip='tok*'", 704) in report.asked
    assert type(what.tokens) is nn.Embedding
    assert type(what.places) is FusedFP4Embedding


def test_a_model_without_linear_layers_can_be_quantised():
    what, report = reported(nn.Sequential(nn.Embedding(5, 3)))
    assert report.quantized == ("0",)
    assert type(quantize(nn.Embedding(5, 3), FP4Config(embeddings=True))) is FusedFP4Embedding
    assert type(dequantize(what)[0]) is nn.Embedding


def test_flags_hooks_and_marks_stay():
    what, calls = model().eval(), []
    what.tokens.train()
    what.tokens.mark = "mine"
    what.tokens.register_forward_hook(lambda *_: calls.append("after"))
    for change in (lambda it: quantize(it, FP4Config(embeddings=True)), dequantize):
        change(what)
        assert (what.tokens.training, what.places.training, what.tokens.mark) == (True, False, "mine")
        what(tokens(2, 5, high=11))
        assert calls == ["after"]
        calls.clear()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_dequantize_undoes_it(dtype):
    what, ids = reported(model())[0], tokens(2, 5, high=11)
    twin = dequantize(copy.deepcopy(what), dtype)
    assert {name: type(each) for name, each in twin.named_modules()} == {
        name: type(each) for name, each in model().named_modules()
    }
    assert str(twin) == str(model())
    assert twin.tokens.weight.requires_grad
    assert twin.tokens.weight.dtype == (dtype or torch.float32)
    assert torch.equal(twin.tokens.weight, what.tokens.dequantize().to(twin.tokens.weight.dtype))
    if dtype is None:
        assert_close("other_shape", what(ids), twin(ids))


def test_an_apt_model_generates():
    what = quantize(build(decoder_only=True).eval(), FP4Config(skip=(), embeddings=True), report=lambda _: None)
    assert type(what.embedding) is FusedFP4Embedding
    twin = dequantize(copy.deepcopy(what))
    ids = tokens(2, 5)
    assert what.generate(ids, max_new_tokens=4).tolist() == twin.generate(ids, max_new_tokens=4).tolist()


def test_files_have_no_form_for_it_yet(tmp_path):
    what = quantize(build(decoder_only=True), FP4Config(embeddings=True), report=lambda _: None)
    message = "save_pretrained: expected embeddings in full precision, got embedding in 4 bits"
    with pytest.raises(InputError, match=message):
        what.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.rglob("*.*"))
