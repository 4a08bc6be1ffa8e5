"""A model under the process's policy: bf16 autocast, recomputed activations, and the estimate that decides on them."""

import pytest
import torch
from small_models import SHAPE, USES, VARIANTS, build, call, gradients, model_for, tokens

from apt_model.core.policy import Policy, set_policy
from apt_model.core.system import get_device_manager
from apt_model.layers.norm import RMSNorm
from apt_model.modeling import apt_model
from apt_model.modeling.blocks import DecoderLayer, activation_bytes

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_use = pytest.mark.parametrize("use", USES)


@pytest.fixture
def policy():
    def enable(**options):
        made = Policy(mode="balanced", **options)
        set_policy(made)
        return made

    yield enable
    set_policy(None)


@each_variant
@each_use
def test_bf16_by_policy_is_autocast_with_a_bf16_stream(use, variant, policy):
    policy(precision="bf16")
    model, ids, streams = model_for(use, variant), tokens(3, 9), set()
    for layer in model.decoder_layers:
        layer.register_forward_hook(lambda _, inputs, __: streams.add(inputs[0].dtype))
    logits = call(model, use, ids)
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    assert streams == {torch.bfloat16}
    assert {gradient.dtype for gradient in gradients(model).values() if gradient is not None} == {torch.float32}
    model.apply_policy(None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(model, use, ids), logits)
    fp32 = call(model, use, ids)
    assert fp32.dtype == torch.float32
    assert float((logits - fp32).detach().norm() / fp32.detach().norm()) < 0.05


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_the_policy_resolves_to_what_the_device_computes_in(precision, policy):
    made = policy(precision=precision)
    native = get_device_manager("cpu").supports_bf16()
    wanted = torch.bfloat16 if made.resolve_precision(native_bf16=native) == "bf16" else torch.float32
    assert build()(tokens(2, 5)).dtype == wanted
    assert (wanted == torch.float32) or (precision == "auto" and native)


def test_an_autocast_of_the_callers_goes_first(policy):
    policy(precision="fp32")
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(tokens(2, 5)).dtype == torch.bfloat16


def test_a_policy_holds_for_models_built_under_it(policy):
    before = build()
    made = policy(precision="bf16")
    assert before(tokens(2, 5)).dtype == torch.float32
    before.apply_policy(made)
    assert before(tokens(2, 5)).dtype == torch.bfloat16


def test_generation_follows_the_policy(policy):
    policy(precision="bf16")
    model = model_for("causal")
    types = set()
    model.lm_head.register_forward_hook(lambda _, __, output: types.add(output.dtype))
    cached, plain = (model.generate(tokens(2, 4), max_new_tokens=6, use_cache=flag) for flag in (True, False))
    assert types == {torch.bfloat16}
    assert cached.shape == plain.shape == (2, 10)


@pytest.mark.parametrize(
    ("setting", "memory", "recomputed"), [("on", 0, 1), ("off", 0, 0), ("auto", 1, 1), ("auto", 2**40, 0)]
)
def test_the_policy_decides_about_recomputing(setting, memory, recomputed, policy, monkeypatch):
    if setting == "auto":
        monkeypatch.setattr(apt_model, "_machine", lambda: {"cpu": (False, memory)})
    policy(activation_checkpointing=setting, precision="fp32")
    model, calls = model_for("causal"), []
    monkeypatch.setattr(
        DecoderLayer, "forward", lambda *inputs, inner=DecoderLayer.forward: (calls.append(1), inner(*inputs))[1]
    )
    model.train()(tokens(2, 5)).sum().backward()
    assert len(calls) == SHAPE["num_decoder_layers"] * (1 + recomputed)
    calls.clear()
    model.eval()(tokens(2, 5)).sum().backward()
    assert len(calls) == SHAPE["num_decoder_layers"]


# The estimate that decision rests on.


class FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps what an accelerator's kernel keeps, where a CPU's keeps a normalised copy too."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = x.float().square().mean(dim=-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(x, scale, weight)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError


def bytes_saved(model, use, ids, source):
    """Bytes of the unique storages that the layers keep for backward, without parameters and their casts."""
    skip = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    weights = {tuple(shape) for p in model.parameters() for shape in (p.shape, reversed(p.shape))}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip and tuple(tensor.shape) not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its place
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        for layer in [*model.decoder_layers, *getattr(model, "encoder_layers", [])]:

            def forward(*inputs, inner=layer.forward):
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    return inner(*inputs)

            patch.setattr(layer, "forward", forward)
        patch.setattr(RMSNorm, "forward", lambda self, x: FusedNorm.apply(x, self.weight.to(x.dtype), self.eps))
        call(model, use, ids, source)
    return sum(size for size, _ in kept.values())


MEMORY_CASES = {
    **VARIANTS,
    "dropout": {"dropout": 0.1},
    "high-rank": {"sr_ratio": 1.0},
    "full-gradient-trust": {"left_spin_mode": "trust", "left_spin_detach": False},
    "full-gradient-guard": {"left_spin_mode": "guard", "left_spin_tau": 0.1, "left_spin_detach": False},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", MEMORY_CASES.values(), ids=MEMORY_CASES)
@each_use
def test_the_estimate_of_activations_is_what_autograd_keeps(use, options, precision, policy):
    policy(precision=precision, activation_checkpointing="off")
    model = build(decoder_only=use == "causal", **{**SHAPE, "d_model": 64, "d_ff": 256, "max_seq_len": 120, **options})
    ids, source = tokens(8, 120), tokens(8, 120, seed=1)
    size = {"fp32": 4, "bf16": 2}[precision]
    stacks = [use == "seq2seq", False] if use == "seq2seq" else [False]
    estimate = sum(
        activation_bytes(model.config, tokens=ids.numel(), num_layers=2, cross=cross, itemsize=size) for cross in stacks
    )
    saved = bytes_saved(model.train(), use, ids, source)
    assert 0.75 * saved < estimate < 1.25 * saved, f"{estimate / saved:.2f} of what is kept"
