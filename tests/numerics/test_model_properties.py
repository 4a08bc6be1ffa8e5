"""What every APT model must be, whatever it is made of: causal, blind to padding and neighbours, the same twice."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from small_models import SHAPE, SOURCE, USES, VARIANTS, VOCAB, build, call, gradients, model_for, tokens
from tolerances import assert_close
from torch import nn

from apt_model.layers.left_spin import LeftSpinResidual
from apt_model.modeling.apt_model import APTModel

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_use = pytest.mark.parametrize("use", USES)


def mask_name(use):
    return "tgt_mask" if use == "seq2seq" else "src_mask"


def other(ids):
    return (ids + 1 + tokens(*ids.shape, seed=7, high=VOCAB - 1)) % VOCAB


# A token sees what comes before it, in its own row, and nothing else.


@each_variant
@each_use
@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit(use, variant):
    model, ids = model_for(use, variant), tokens(3, 9)
    before = call(model, use, ids)
    for position in (1, 5, 8):
        changed = ids.clone()
        changed[:, position:] = other(ids)[:, position:]
        after = call(model, use, changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert bool((after[:, position] != before[:, position]).any(dim=-1).all())


@each_use
@torch.no_grad()
def test_without_its_later_tokens_a_sequence_has_the_same_logits(use):
    model, ids = model_for(use), tokens(3, 9)
    assert_close("other_shape", call(model, use, ids[:, :5]), call(model, use, ids)[:, :5])


@each_variant
@torch.no_grad()
def test_every_source_token_reaches_every_target(variant):
    model, ids = model_for("seq2seq", variant), tokens(3, 5)
    before = call(model, "seq2seq", ids)
    for position in range(SOURCE.shape[1]):
        changed = SOURCE.clone()
        changed[:, position] = other(SOURCE)[:, position]
        assert bool((call(model, "seq2seq", ids, changed) != before).any(dim=-1).all())


@each_variant
@each_use
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours(use, variant):
    model, ids = model_for(use, variant), tokens(3, 9)
    together, changed, source = call(model, use, ids), other(ids), other(SOURCE)
    changed[1], source[1] = ids[1], SOURCE[1]
    assert torch.equal(call(model, use, changed, source)[1], together[1])
    alone = call(model, use, ids[1:2], SOURCE[1:2])
    assert_close("other_shape", alone[0], together[1])


@each_variant
@torch.no_grad()
def test_padding_of_the_source_is_invisible(variant):
    model = model_for("seq2seq", variant, pad_token_id=0)
    source, ids = tokens(2, 5, low=1), tokens(2, 6, seed=1)
    alone = model(source, ids)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, :5] = True
    padded = model(F.pad(source, (0, 3)), ids)
    assert_close("other_shape", padded, alone)
    assert torch.equal(model(F.pad(source, (0, 3)), ids, src_mask=mask), padded)
    assert torch.equal(model(F.pad(source, (0, 3), value=9), ids, src_mask=mask), padded)
    assert not torch.equal(model(F.pad(source, (0, 3), value=9), ids), padded)
    # The same on the left: positions are relative.
    assert_close("other_shape", model(F.pad(source, (3, 0)), ids), alone)


@each_variant
@each_use
@torch.no_grad()
def test_padding_of_the_target_or_prompt_is_invisible(use, variant):
    model, ids = model_for(use, variant, pad_token_id=0), tokens(2, 6, low=1)
    alone = call(model, use, ids)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, :3] = False
    left = call(model, use, F.pad(ids, (3, 0)), **{mask_name(use): mask})[:, 3:]
    assert_close("other_shape", left, alone)
    assert torch.equal(call(model, use, F.pad(ids, (3, 0), value=9), **{mask_name(use): mask})[:, 3:], left)
    right = call(model, use, F.pad(ids, (0, 3)), **{mask_name(use): mask.flip(1)})[:, :6]
    assert_close("other_shape", right, alone)
    assert torch.equal(right, call(model, use, F.pad(ids, (0, 3), value=9), **{mask_name(use): mask.flip(1)})[:, :6])


@torch.no_grad()
def test_a_source_of_padding_alone_is_finite_and_its_neighbour_unmoved():
    model = model_for("seq2seq", pad_token_id=0)
    source, ids = tokens(2, 5, low=1), tokens(2, 6)
    empty = source.clone()
    empty[0] = 0
    out = model(empty, ids)
    assert bool(out.isfinite().all())
    everything = torch.ones_like(empty[:1], dtype=torch.bool)
    assert_close("other_shape", out[:1], model(empty[:1], ids[:1], src_mask=everything))
    assert torch.equal(out[1], model(source, ids)[1])


# The same function, however it is run.


@each_variant
@each_use
@torch.no_grad()
def test_training_is_evaluation_without_dropout(use, variant):
    model, ids = model_for(use, variant), tokens(3, 9)
    assert torch.equal(call(model.train(), use, ids), call(model.eval(), use, ids))


@each_use
@torch.no_grad()
def test_dropout_acts_in_training_alone(use):
    model, ids = model_for(use, dropout=0.2), tokens(3, 9)
    torch.manual_seed(1)
    trained = call(model.train(), use, ids)
    assert not torch.equal(call(model, use, ids), trained), "every pass draws anew"
    torch.manual_seed(1)
    assert torch.equal(call(model, use, ids), trained)
    plain = call(model_for(use), use, ids)
    assert not torch.equal(trained, plain)
    assert torch.equal(call(model.eval(), use, ids), plain)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@each_variant
@each_use
def test_recomputing_activations_gives_the_same_gradients_bit_for_bit(use, variant, dropout):
    model, ids = model_for(use, variant, dropout=dropout).train(), tokens(3, 9)
    results, runs = [], []
    model.decoder_layers[0].feed_forward.body.up_proj.register_forward_hook(lambda *_: runs.append(recompute))
    for recompute in (False, True):
        (model.gradient_checkpointing_enable if recompute else model.gradient_checkpointing_disable)()
        model.zero_grad()
        torch.manual_seed(3)
        call(model, use, ids).square().mean().backward()
        results.append(gradients(model))
    assert runs == [False, True, True], "the second time forward ran again in backward"
    for name, gradient in results[0].items():
        if use == "decoder alone" and (name.startswith("encoder") or "cross_attention" in name):
            assert gradient is results[1][name] is None
        else:
            assert torch.equal(gradient, results[1][name]), name


@each_variant
@each_use
def test_micro_batches_add_up_to_the_large_batch(use, variant):
    ids, target, stepped = tokens(3, 9), tokens(3, 9, seed=2), []
    for size in (3, 1):
        model = model_for(use, variant)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for start in range(0, 3, size):
            logits = call(model, use, ids[start : start + size], SOURCE[start : start + size])
            F.cross_entropy(logits.flatten(0, 1), target[start : start + size].flatten()).mul(size / 3).backward()
        optimizer.step()
        stepped.append(dict(model.named_parameters()))
    for name, parameter in stepped[0].items():
        assert_close("accumulation", stepped[1][name].detach(), parameter.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_variant
@each_use
@torch.no_grad()
def test_a_saved_model_comes_back_bit_for_bit(use, variant, dtype, tmp_path):
    model, ids = model_for(use, variant).to(dtype), tokens(3, 9)
    model.save_pretrained(tmp_path / "first")
    again = APTModel.from_pretrained(tmp_path / "first")
    assert again.config == model.config
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(call(again, use, ids), call(model, use, ids))
    again.save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_loading_can_change_the_type(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    cast = APTModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(cast(tokens(2, 5)), model.bfloat16()(tokens(2, 5)))


# Left spin's state runs along the depth of a stack.


def test_every_sublayer_has_a_gate_and_each_stack_its_own_chain():
    model, calls = build(), []
    for name, module in model.named_modules():
        if isinstance(module, LeftSpinResidual):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: calls.append((name, inputs[2], output[1]))
            )
    model(SOURCE, tokens(3, 5))
    assert len(calls) == model.config.num_encoder_sublayers + model.config.num_decoder_sublayers == 2 * 2 + 2 * 3
    for stack in ("encoder", "decoder"):
        chain = [(given, made) for name, given, made in calls if name.startswith(stack)]
        assert chain[0][0] is None
        for (_, made), (given, _) in itertools.pairwise(chain):
            assert given is made
    calls.clear()
    model(tokens(3, 5))
    assert len(calls) == 2 * 2


# Generation through the cache.


def prompts(model):
    """Three prompts of 2, 4 and 6 tokens, padded on the left, and each alone."""
    alone = [tokens(1, size, seed=size, low=3) for size in (2, 4, 6)]
    fill = model.config.pad_token_id
    return torch.cat([F.pad(ids, (6 - ids.shape[1], 0), value=fill) for ids in alone]), alone


SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HOW = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 12, "top_p": 0.9, "seed": 5},
    "beams": {"num_beams": 3, "length_penalty": 0.7},
}


@pytest.mark.parametrize("how", HOW)
@each_variant
@each_use
def test_the_cache_changes_nothing(use, variant, how):
    model = model_for(use, variant, **SPECIAL)
    ids, _ = prompts(model)
    options = {"max_new_tokens": 8, "causal": use != "seq2seq", **HOW[how]}
    cached, plain = (model.generate(ids, use_cache=flag, **options) for flag in (True, False))
    assert torch.equal(cached, plain)
    assert cached.shape[1] > (1 if use == "seq2seq" else ids.shape[1])


@pytest.mark.parametrize("how", ["greedy", "beams"])
@each_variant
@each_use
def test_a_padded_batch_continues_as_each_prompt_alone(use, variant, how):
    model = model_for(use, variant, **SPECIAL)
    ids, alone = prompts(model)
    options = {"max_new_tokens": 8, "causal": use != "seq2seq", **HOW[how]}
    start = 1 if use == "seq2seq" else ids.shape[1]
    together = model.generate(ids, **options)[:, start:]
    mask = ids != 0
    assert torch.equal(model.generate(ids, attention_mask=mask, **options)[:, start:], together)
    for row, prompt in zip(together, alone, strict=True):
        single = model.generate(prompt, **options)[0, 1 if use == "seq2seq" else prompt.shape[1] :]
        assert torch.equal(row[: len(single)], single)
        assert bool((row[len(single) :] == 0).all())


def test_generation_leaves_the_mode_of_the_model_and_the_generator_alone():
    model = model_for("causal", dropout=0.5).train()
    state = torch.get_rng_state()
    first = model.generate(tokens(2, 4), max_new_tokens=4)
    assert model.training
    assert torch.equal(model.eval().generate(tokens(2, 4), max_new_tokens=4), first), "no dropout while generating"
    model.generate(tokens(2, 4), max_new_tokens=4, do_sample=True, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.requires_grad


# Compiled.

inductor_import = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def compiled_agrees(model, use, *, backend, backward):
    ids, results = tokens(3, 9), []
    for function in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        with torch.set_grad_enabled(backward):
            logits = call(function, use, ids)
        if backward:
            F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        results.append((logits.detach(), gradients(model)))
    assert_close("compiled", results[1][0], results[0][0])
    for name, gradient in results[0][1].items():
        if gradient is not None:
            assert_close("compiled", results[1][1][name], gradient)


@pytest.mark.parametrize("use", ["causal", "seq2seq"])
def test_traced_whole_it_is_the_same_function(use):
    model = model_for(use, num_encoder_layers=1, num_decoder_layers=1)
    compiled_agrees(model, use, backend="aot_eager", backward=True)


@inductor_import
def test_compiled_it_is_the_same_function():
    compiled_agrees(model_for("causal", num_decoder_layers=1), "causal", backend="inductor", backward=False)


# What the model refuses is named in tests/unit; here, that it stays a module like any other.


def test_it_is_a_module_like_any_other():
    model = build(decoder_only=True)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    tied = build(decoder_only=True, tie_word_embeddings=True)
    assert model.num_parameters() - tied.num_parameters() == VOCAB * SHAPE["d_model"]
    hidden = dict(model.hidden_matrices())
    assert not any(name.startswith(("embedding", "lm_head")) for name in hidden)
    assert all(isinstance(p, nn.Parameter) and p.ndim == 2 for p in hidden.values())
