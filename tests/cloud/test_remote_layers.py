"""`offload_layers`: what layers elsewhere are given, what is computed here and why, and what is refused."""

import copy
import logging

import pytest
import torch
import transformers as tf
from clouds import counts
from served import application
from small_models import build, tokens
from torch import nn

from apt_model.cli.serving import apt_block, hf_block
from apt_model.cloud.backend import OIPBackend
from apt_model.cloud.server.blocks import KINDS, register
from apt_model.cloud.transport import InProcess
from apt_model.core.errors import ConfigError
from apt_model.optimization.remote_layers import offload_layers, padding_of, recall_layers

SIZES = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 37}
HF = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, **SIZES)),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, **SIZES)),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=64, **SIZES)),
    "bert": (tf.BertForMaskedLM, tf.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=64,
        vocab_size=37)),
}  # fmt: skip
IDS = tokens(2, 7, seed=1, low=3)


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "apt_model.cloud")


@pytest.fixture
def backend(tmp_path, monkeypatch):
    """Our own server, which knows the kinds of models' layers."""
    for kind in (apt_block.KIND, hf_block.KIND):
        monkeypatch.setitem(KINDS, kind.name, kind)
        register(kind)
    made = OIPBackend([InProcess(application(tmp_path, store=True))])
    yield made
    made.close()


def hf(name, **options):
    torch.manual_seed(0)
    kind, config = HF[name]
    config = copy.deepcopy(config)
    for key, value in options.items():
        setattr(config, key, value)
    return kind(config).requires_grad_(False).eval()


def decoder(**options):
    return build(decoder_only=True, left_spin_mode="trust", **options).requires_grad_(False).eval()


def both(model, backend, layers=(1, 1), **options):
    """The model, a copy with layers elsewhere, and the block."""
    there = copy.deepcopy(model)
    return model, there, offload_layers(there, layers, cloud_backend=backend, **options)


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", HF)
def test_padding_of_transformers_models(backend, name, side):
    here, there, block = both(hf(name, use_cache=False), backend, (1, 2), fallback_local=False)
    mask = torch.ones_like(IDS)
    if side != "none":
        mask[0, slice(5, None) if side == "right" else slice(0, 2)] = 0
    with torch.no_grad():
        found, expected = (each(IDS, attention_mask=mask).logits for each in (there, here))
    # Of queries that are padding nobody uses what comes out.
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    assert counts(block) == (1, 0, 0)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_mask_that_is_no_padding_is_known(heads):
    causal = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, heads, 7, 7)
    assert torch.equal(padding_of(causal, 2, causal=True), torch.ones(2, 7, dtype=torch.bool))
    assert padding_of(causal, 2, causal=False) is None
    packed = causal & (torch.arange(7)[:, None] // 4 == torch.arange(7) // 4)  # two sequences in a row
    assert padding_of(packed, 2, causal=True) is None
    window = causal & ~causal.tril(-3)
    assert padding_of(window, 2, causal=True) is None
    left = causal.clone()
    left[0, :, :, :2] = False
    keys = torch.ones(2, 7, dtype=torch.bool)
    keys[0, :2] = False
    assert torch.equal(padding_of(left, 2, causal=True), keys)
    left[0, :, :2] = True  # queries with nothing to see, as some versions of transformers have them
    assert torch.equal(padding_of(left, 2, causal=True), keys)
    added = torch.zeros(2, heads, 7, 7).masked_fill(~causal, -1e30)  # as attention without SDPA has it
    assert padding_of(added, 2, causal=True).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_model_that_was_cast_has_its_own_rotary_frequencies(backend, name, dtype):
    """`.to` rounds these as well, and a server that made them anew would give other numbers."""
    here, there, block = both(hf(name, use_cache=False).to(dtype), backend, (0, 2), fallback_local=False)
    assert here.model.rotary_emb.inv_freq.dtype == dtype
    ids = tokens(2, 60, seed=1, low=3)  # far enough for angles to differ
    with torch.no_grad():
        assert torch.equal(there(ids).logits, here(ids).logits)
    assert counts(block) == (1, 0, 0)


def test_rotary_frequencies_of_nowhere_are_refused(backend):
    model = hf("llama", use_cache=False).to(torch.bfloat16).to(torch.float32)
    with pytest.raises(ConfigError, match="rotary frequencies that the model's configuration gives"):
        offload_layers(model, (0, 1), cloud_backend=backend)


def test_positions_and_masks_of_their_own_are_computed_here(backend):
    here, there, block = both(hf("llama", use_cache=False), backend)
    packed = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    packed[..., 4:, :4] = False
    with torch.no_grad():
        for given in ({"position_ids": torch.arange(7)[None] + 3}, {"attention_mask": packed.expand(2, -1, -1, -1)}):
            assert torch.equal(there(IDS, **given).logits, here(IDS, **given).logits)
    assert counts(block) == (0, 2, 0)
    assert set(block.get_stats()["local_reasons"]) == {
        "positions that are not 0, 1, 2, ...",
        "a mask that is no padding",
    }


@pytest.mark.parametrize("name", ["apt", "apt seq2seq", "llama"])
def test_generating_with_a_cache_is_computed_here(backend, name):
    if name == "llama":
        here, there, block = both(hf(name), backend, (1, 2))
        outputs = [each.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0) for each in (here, there)]
    else:
        model = decoder() if name == "apt" else build(bos_token_id=1).requires_grad_(False).eval()
        here, there, block = both(model, backend, (0, 1))
        outputs = [each.generate(IDS, max_new_tokens=4) for each in (here, there)]
    assert torch.equal(*outputs)
    assert set(block.get_stats()["local_reasons"]) == {"a cache of keys and values"}
    assert counts(block)[1] == 4


def test_dropout_while_training_is_computed_here(backend):
    for model in (decoder(dropout=0.5), hf("gpt2", use_cache=False)):
        here, there, block = both(model, backend)
        found = []
        for each in (here, there):
            torch.manual_seed(4)
            with torch.no_grad():
                output = each.train()(IDS)
            found.append(getattr(output, "logits", output))
        assert torch.equal(*found)
        assert block.get_stats()["local_reasons"] == {"dropout": 1}
        with torch.no_grad():
            there.eval()(IDS)
        assert counts(block) == (1, 1, 0)


def test_a_memory_that_wants_a_gradient_gets_it(backend):
    """A server gives the gradient of x alone: with an encoder that trains, the decoder's layers are computed here."""
    model = build(left_spin_mode="trust").requires_grad_(False).eval()
    here, there, block = both(model, backend)
    grads = []
    for each in (here, there):
        each.encoder_layers.requires_grad_()
        each(IDS, IDS[:, :4]).square().sum().backward()
        grads.append([p.grad for p in each.encoder_layers.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert block.get_stats()["local_reasons"] == {"a further input that wants a gradient": 1}


def test_the_model_stays_what_it_was(backend):
    here, there, block = both(decoder(), backend, (0, 1), fallback_local=False)
    assert there.state_dict().keys() == here.state_dict().keys()
    with torch.no_grad():
        expected = here(IDS)
        assert torch.equal(there(IDS), expected)
        assert torch.equal(copy.deepcopy(there)(IDS), expected)  # a copy computes here
        assert counts(block) == (1, 0, 0)
        recall_layers(there)
        assert torch.equal(there(IDS), expected)
        assert counts(block) == (1, 0, 0)
    offload_layers(there, (0, 1), cloud_backend=backend)


def test_weights_that_changed_in_place_are_other_weights(backend):
    here, there, block = both(decoder(), backend, fallback_local=False)
    with torch.no_grad():
        there(IDS)
        before = block.weights.version
        changed = {name: each * 1.5 for name, each in here.state_dict().items()}
        for each in (here, there):
            each.load_state_dict(changed)
        assert torch.equal(there(IDS), here(IDS))
    assert counts(block) == (2, 0, 0)
    assert block.weights.version != before


@pytest.mark.parametrize(
    ("make", "layers", "options", "said"),
    [
        (lambda: build(decoder_only=True).requires_grad_(False), (1, 1), {}, "left spin of design mode"),
        (lambda: decoder().requires_grad_(), (1, 1), {}, "parameters are frozen"),
        (decoder, (1, 2), {}, r"layers within \(0, 1\)"),
        (decoder, (1, 0), {}, "layers within"),
        (decoder, (0, 0), {"stack": "encoder"}, "an APT model with that stack"),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False), (0, 0), {},
         "got TransformerEncoder"),
    ],
)  # fmt: skip
def test_what_cannot_go_elsewhere_is_said(backend, make, layers, options, said):
    with pytest.raises(ConfigError, match=said):
        offload_layers(make(), layers, cloud_backend=backend, **options)


def test_layers_go_elsewhere_once(backend):
    model = decoder()
    offload_layers(model, (0, 0), cloud_backend=backend)
    with pytest.raises(ConfigError, match="layers that are here"):
        offload_layers(model, (0, 1), cloud_backend=backend)
