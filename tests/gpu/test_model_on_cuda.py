"""What the tests of tests/numerics say of a CPU, where a GPU's own kernels could differ."""

import pytest
import torch
import torch.nn.functional as F
from small_models import build, gradients, noise, tokens
from tolerances import assert_close

from apt_model.layers.left_spin import LeftSpinResidual, LeftSpinState, PlainResidual
from apt_model.modeling.blocks import activation_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def call(model, *inputs):
    return model(*(ids.cuda() for ids in inputs))


def inputs_for(use):
    return (tokens(3, 7, seed=1), tokens(3, 9)) if use == "seq2seq" else (tokens(3, 9),)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's imports
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # fp32 is what is compared here
@pytest.mark.parametrize("use", ["causal", "seq2seq"])
def test_compiled_it_is_the_same_function(use):
    model, results = build(decoder_only=use == "causal", num_encoder_layers=1, num_decoder_layers=1).cuda(), []
    for function in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        logits = call(function, *inputs_for(use))
        F.cross_entropy(logits.flatten(0, 1), tokens(3, 9, seed=2).cuda().flatten()).backward()
        results.append((logits.detach(), gradients(model)))
    assert_close("other_shape", results[1][0], results[0][0])
    for name, gradient in results[0][1].items():
        assert_close("other_shape", results[1][1][name], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use", ["causal", "seq2seq"])
@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit(use, dtype):
    model, (*source, ids) = build(decoder_only=use == "causal").to("cuda", dtype), inputs_for(use)
    changed = ids.clone()
    changed[:, 5:] = (ids[:, 5:] + 1) % 37
    assert torch.equal(call(model, *source, changed)[:, :5], call(model, *source, ids)[:, :5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guard_equals_plain_bit_for_bit_below_tau(dtype):
    u, delta = (noise(999, 257, seed=seed, dtype=dtype).cuda() for seed in (0, 1))
    stepped, _ = LeftSpinResidual(257, mode="guard", tau=0.3)(u, delta * 0.2)
    assert torch.equal(stepped, PlainResidual()(u, delta * 0.2)[0])


@pytest.mark.parametrize("mode", ["design", "trust", "guard"])
def test_a_token_does_not_depend_on_the_batch_around_it(mode):
    u, delta = noise(60, 257).cuda(), noise(60, 257, seed=1).cuda()
    layer = LeftSpinResidual(257, mode=mode).cuda()
    _, state = layer(u, delta.flip(0))
    whole, _ = layer(u, delta, state)
    for row in range(0, 60, 7):
        part = slice(row, row + 1)
        own = None if state is None else LeftSpinState(state.delta[part], state.phi[part])
        assert_close("definition_fp32", layer(u[part], delta[part], own)[0], whole[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use", ["causal", "seq2seq"])
@pytest.mark.parametrize(
    "options", [{}, {"left_spin_mode": "trust"}, {"left_spin_detach": False}, {"activation": "swiglu"}]
)
def test_the_estimate_of_activations_is_what_the_layers_keep(options, use, dtype):
    model = build(decoder_only=use == "causal", d_model=256, d_ff=1024, max_seq_len=512, **options).to("cuda", dtype)
    ids = tuple(tokens(16, 512, seed=seed) for seed in range(2 if use == "seq2seq" else 1))
    call(model, *ids).sum().backward()  # the workspaces that stay
    held = []
    for layer in [*model.decoder_layers, *getattr(model, "encoder_layers", [])]:
        layer.register_forward_pre_hook(lambda *_: held.append(-torch.cuda.memory_allocated()))
        layer.register_forward_hook(lambda *_: held.append(torch.cuda.memory_allocated()))
    out = call(model, *ids)
    stacks = (True, False) if use == "seq2seq" else (False,)
    size, count = model.embedding.weight.itemsize, ids[0].numel()
    estimate = sum(
        activation_bytes(model.config, tokens=count, num_layers=2, cross=cross, itemsize=size) for cross in stacks
    )
    assert 0.75 < estimate / sum(held) < 1.25, f"{estimate / sum(held):.2f} of what is kept"
    assert out.requires_grad
