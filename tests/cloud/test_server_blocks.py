"""Blocks of models, served: the numbers of the model itself, in 4 bits and streamed through levels too."""

import copy
import json

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from served import application, infer, linear_file
from small_models import build, noise
from torch import nn

from apt_model.cli.serving import apt_block, hf_block
from apt_model.cli.serving.placing import levels, place_in, place_on
from apt_model.cloud.server.app import Application
from apt_model.cloud.server.blocks import KINDS, register
from apt_model.cloud.server.config import ServerConfig
from apt_model.cloud.server.models import Models, on_device
from apt_model.core.errors import ConfigError, InputError
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.optimization.vgpu_stack import VGPUStack

CPU = torch.device("cpu")
HF = {
    "llama": tf.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                            num_key_value_heads=1, max_position_embeddings=64, vocab_size=64),
    "qwen2": tf.Qwen2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                            num_key_value_heads=1, max_position_embeddings=64, vocab_size=64),
    "gpt2": tf.GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=64, vocab_size=64),
    "bert": tf.BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                          max_position_embeddings=64, vocab_size=64),
}  # fmt: skip
LAYERS = {"llama": "layers", "qwen2": "layers", "gpt2": "h", "bert": "encoder.layer"}


@pytest.fixture(autouse=True)
def _kinds(monkeypatch):
    """Those that the command registers."""
    for kind in (apt_block.KIND, hf_block.KIND):
        monkeypatch.setitem(KINDS, kind.name, kind)
        register(kind)


def served(tmp_path, tensors, kind, config, place=None, *, prefix=""):
    """An application that holds one block, as m0."""
    save_file({name: each.contiguous() for name, each in tensors.items()}, tmp_path / "a.safetensors")
    models = Models(place or on_device(CPU))
    models.load("m0", tmp_path / "a.safetensors", {"kind": kind, "config": config}, prefix)
    return Application(ServerConfig(), models)


def hf_model(name):
    torch.manual_seed(0)
    return tf.AutoModel.from_config(copy.deepcopy(HF[name]), attn_implementation="sdpa").eval()


def hf_reference(model, x, mask):
    """What the middle and last layers make of x: the model's own forward, whose other parts do nothing."""
    home = model.get_submodule(LAYERS[model.config.model_type].rpartition(".")[0])
    setattr(home, LAYERS[model.config.model_type].rpartition(".")[2], nn.ModuleList(list(model.layers_found)[1:]))
    for part in ("norm", "ln_f"):
        if hasattr(model, part):
            setattr(model, part, nn.Identity())
    model.config.num_hidden_layers = 2
    if hasattr(model, "wpe"):
        model.wpe.weight.data.zero_()
    if hasattr(model, "embeddings"):  # bert adds and norms before its layers: they are asked alone
        found = x
        wide = None if mask is None else mask[:, None, None]
        for layer in model.encoder.layer:
            found = layer(found, attention_mask=wide)
            found = found[0] if isinstance(found, tuple) else found
        return found
    return model(inputs_embeds=x, attention_mask=None if mask is None else mask.long(), use_cache=False)[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", HF)
def test_layers_of_transformers(tmp_path, name, masked):
    model = hf_model(name)
    prefix = f"{LAYERS[name]}."
    tensors = {key: each for key, each in model.state_dict().items() if key.startswith(prefix)}
    config = {"model": json.loads(model.config.to_json_string()), "layers": [1, 2]}
    app = served(tmp_path, tensors, "hf_block", config, prefix=prefix)
    x = noise(2, 7, 32).requires_grad_()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 5:] = False
    model.layers_found = model.get_submodule(LAYERS[name])
    y = hf_reference(model, x, mask if masked else None)
    more = {"attention_mask": mask} if masked else {}
    got = infer(app, "m0", {"x": x.detach(), **more})["y"]
    rows = mask if masked else torch.ones_like(mask)
    torch.testing.assert_close(got[rows], y[rows], rtol=1e-5, atol=1e-5)
    dy = noise(2, 7, 32, seed=4) * rows[..., None]
    y.backward(dy)
    gradient = infer(app, "m0.bwd", {"x": x.detach(), "dy": dy, **more})["dx"]
    torch.testing.assert_close(gradient, x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "mamba"}, "expected bert or gpt2"),
        ({"model_type": ["llama"]}, "expected bert or gpt2"),
        ({"hidden_size": "x"}, "hf_block.model"),
        ({"num_hidden_layers": 2}, "layers of 2"),
        ({"max_position_embeddings": 1 << 40}, "whole sizes"),
        ({"intermediate_size": 65}, "expected"),
    ],
)
def test_transformers_blocks_that_are_refused(tmp_path, change, said):
    model = hf_model("llama")
    tensors = {name.removeprefix("layers."): each for name, each in model.state_dict().items() if "layers." in name}
    config = {"model": {**json.loads(model.config.to_json_string()), **change}, "layers": [0, 2]}
    with pytest.raises((ConfigError, InputError), match=said):
        served(tmp_path, tensors, "hf_block", config)


def test_code_that_a_config_names_is_not_looked_at(tmp_path):
    model = hf_model("llama")
    tensors = {name.removeprefix("layers."): each for name, each in model.state_dict().items() if "layers." in name}
    about = {**json.loads(model.config.to_json_string()), "auto_map": {"AutoModel": "evil--evil.Model"}}
    app = served(tmp_path, tensors, "hf_block", {"model": about, "layers": [0, 2]})
    assert infer(app, "m0", {"x": noise(1, 3, 32)})["y"].shape == (1, 3, 32)


@pytest.mark.parametrize("mode", ["design", "trust"])
def test_our_decoder(tmp_path, mode):
    model = build(decoder_only=True, left_spin_mode=mode).eval()
    config = model.config
    tensors = {name: each for name, each in model.state_dict().items() if name.startswith("decoder_layers.")}
    about = {"model": config.to_dict(), "layers": [0, config.num_decoder_layers - 1]}
    app = served(tmp_path, tensors, "apt_block", about, prefix="decoder_layers.")
    ids = noise(2, 6).mul(100).long().abs() % config.vocab_size
    x, kept = model.embedding(ids).detach().requires_grad_(), []
    model.decoder_norm.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model.embedding.register_forward_hook(lambda *_: x)
    model(ids)
    assert torch.equal(infer(app, "m0", {"x": x.detach()})["y"], kept[0])
    dy = noise(*x.shape, seed=3)
    kept[0].backward(dy)
    torch.testing.assert_close(infer(app, "m0.bwd", {"x": x.detach(), "dy": dy})["dx"], x.grad)


def test_our_encoder_and_cross_attention(tmp_path):
    model = build().eval()
    config = model.config
    source, target = noise(2, 9).mul(100).long().abs() % 20 + 7, noise(2, 5).mul(100).long().abs() % 20 + 7
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    kept = {}
    for name in ("encoder_norm", "decoder_norm"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: kept.__setitem__(name, inputs[0])
        )
    with torch.no_grad():
        model(source, target, src_mask=mask)
        memory = model.encoder_norm(kept["encoder_norm"])
    for stack, count, ids, more, result in (
        ("encoder", config.num_encoder_layers, source, {"attention_mask": mask}, "encoder_norm"),
        ("decoder", config.num_decoder_layers, target, {"memory": memory, "memory_mask": mask}, "decoder_norm"),
    ):
        expected = kept[result]
        prefix = f"{stack}_layers."
        tensors = {name: each for name, each in model.state_dict().items() if name.startswith(prefix)}
        about = {"model": config.to_dict(), "stack": stack, "layers": [0, count - 1]}
        app = served(tmp_path, tensors, "apt_block", about, prefix=prefix)
        y = infer(app, "m0", {"x": model.embedding(ids).detach(), **more})["y"]
        assert torch.equal(y, expected)


def test_a_part_of_a_stack_that_hands_on_a_state(tmp_path):
    model = build(decoder_only=True)
    tensors = {name: each for name, each in model.state_dict().items() if name.startswith("decoder_layers.")}
    with pytest.raises(ConfigError, match="all of the stack"):
        served(
            tmp_path, tensors, "apt_block", {"model": model.config.to_dict(), "layers": [0, 0]},
            prefix="decoder_layers.",
        )  # fmt: skip


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_in_four_bits(tmp_path, form):
    tensors = linear_file(tmp_path / "plain.safetensors", torch.bfloat16, wide=64)
    app = served(tmp_path, tensors, "linear", {"quantize": form}, place_on(CPU))
    layer = nn.Linear(64, 24, dtype=torch.bfloat16)
    layer.load_state_dict(tensors)
    packed = FusedFP4Linear.from_linear(layer, format=form)
    x = noise(3, 64).bfloat16().requires_grad_()
    y, dy = packed(x), noise(3, 24).bfloat16()
    assert torch.equal(infer(app, "m0", {"x": x.detach()})["y"], y)
    y.backward(dy)
    assert torch.equal(infer(app, "m0.bwd", {"x": x.detach(), "dy": dy})["dx"], x.grad)
    plain = application(tmp_path, tmp_path / "plain.safetensors")
    assert plain.models.versions("m0") != app.models.versions("m0")


def test_streamed_through_levels(tmp_path, quiet_vgpu):
    model = hf_model("llama")
    tensors = {name.removeprefix("layers."): each for name, each in model.state_dict().items() if "layers." in name}
    config = {"model": json.loads(model.config.to_json_string()), "layers": [0, 2]}
    plain = served(tmp_path, tensors, "hf_block", config)
    with VGPUStack(levels(CPU, None, 0.2, 1.0)) as stack:
        app = served(tmp_path, tensors, "hf_block", config, place_in(stack))
        x, dy = noise(2, 5, 32), noise(2, 5, 32, seed=1)
        for _ in range(3):
            assert torch.equal(infer(app, "m0", {"x": x})["y"], infer(plain, "m0", {"x": x})["y"])
            both = [infer(each, "m0.bwd", {"x": x, "dy": dy})["dx"] for each in (app, plain)]
            assert torch.equal(*both)
        version = app.models.versions("m0")[0]
        assert app.models.drop("m0", version)
        assert stack.stats()["levels"][0]["used_mb"] == 0
