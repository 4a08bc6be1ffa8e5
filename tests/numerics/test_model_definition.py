"""The model is its description, written out again; its weights are drawn as they say."""

import pytest
import torch
from small_models import SHAPE, SOURCE, USES, build, call, model_for, tokens
from tolerances import assert_close

from apt_model.layers.rope import RotaryTable, rotate

each_use = pytest.mark.parametrize("use", USES)


def attend(body, x, memory, *, causal):
    """Plain attention with its matrix of probabilities; `memory` None for the input itself."""
    heads = lambda y: y.unflatten(-1, (body.num_heads, -1))  # noqa: E731
    if memory is None:
        query, key, value = (heads(y) for y in (x @ body.in_proj.weight[: 3 * x.shape[-1]].T).chunk(3, dim=-1))
        turn = RotaryTable(x.shape[1], body.head_dim, 10000.0)(0, x.shape[1])
        query, key = rotate(query, turn), rotate(key, turn)
    else:
        query = heads(x @ body.in_proj.weight[: x.shape[-1]].T)
        key, value = (heads(y) for y in (memory @ body.memory_proj.weight.T).chunk(2, dim=-1))
    score = torch.einsum("bthd,bshd->bhts", query, key) * body.head_dim**-0.5
    if causal:
        score = score.masked_fill(torch.ones(score.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    out = torch.einsum("bhts,bshd->bthd", score.softmax(dim=-1), value).flatten(2)
    return out @ body.out_proj.weight.T


def feed(body, x, activation):
    hidden = x @ body.up_proj.weight.T
    if activation == "swiglu":
        gate, value = hidden.chunk(2, dim=-1)
        hidden = gate * torch.sigmoid(gate) * value
    else:
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return hidden @ body.down_proj.weight.T


def stack(model, ids, layers, memory=None, *, causal):
    pre, u = model.config.norm_position == "pre", model.embedding.weight[ids]

    def normed(norm, x):
        return x / (x.square().mean(dim=-1, keepdim=True) + model.config.norm_eps).sqrt() * norm.weight

    def step(sublayer, function, u):
        if pre:
            return u + function(sublayer.body, normed(sublayer.norm, u))
        return normed(sublayer.norm, u + function(sublayer.body, u))

    for layer in layers:
        u = step(layer.attention, lambda body, x: attend(body, x, None, causal=causal), u)
        if memory is not None:
            u = step(layer.cross_attention, lambda body, x: attend(body, x, memory, causal=False), u)
        u = step(layer.feed_forward, lambda body, x: feed(body, x, model.config.activation), u)
    final = model.decoder_norm if causal else model.encoder_norm
    return normed(final, u) if pre else u


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("tied", [False, True])
@each_use
@torch.no_grad()
def test_the_plain_model_is_its_description(use, tied, activation, norm_position):
    options = {"activation": activation, "norm_position": norm_position, "tie_word_embeddings": tied}
    model, ids = model_for(use, "plain", **options).double(), tokens(3, 9)
    memory = stack(model, SOURCE, model.encoder_layers, causal=False) if use == "seq2seq" else None
    u = stack(model, ids, model.decoder_layers, memory, causal=True)
    logits = u @ model.embedding.weight.T / SHAPE["d_model"] ** 0.5 if tied else u @ model.lm_head.weight.T
    assert_close("whole_model_fp64", call(model, use, ids), logits)


def test_every_matrix_is_drawn_for_itself_with_the_variance_of_its_inputs():
    model = build(started=False, d_model=64, d_ff=256, num_heads=4)
    assert float(model.embedding.weight.detach().std()) == pytest.approx(1, rel=0.1)
    drawn = {name: p.detach() for name, p in model.hidden_matrices() if "self_value" not in name}
    for name, weight in drawn.items():
        rows = weight[: 64 if "cross" in name else 192] if name.endswith("in_proj.weight") else weight
        assert float(rows.std()) == pytest.approx(weight.shape[1] ** -0.5, rel=0.1), name
    first_values = [float(weight[0, 0]) for weight in drawn.values()]
    assert len(set(first_values)) == len(drawn)
