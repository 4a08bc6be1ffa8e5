"""Autopoietic attention: what it computes, that it starts as plain attention, and that it looks at no other token."""

import cmath
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from small_models import SHAPE, build, noise, tokens
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from apt_model.core.errors import InputError
from apt_model.layers.attention import AttentionCache, AutopoieticAttention, attention_mask
from apt_model.layers.rope import RotaryTable, Rotation, rotate

WIDTH, HEADS, RANK = 12, 2, 5


def attention(*, cross=False, cls=AutopoieticAttention, width=WIDTH, heads=HEADS, dtype=torch.float64, **options):
    """An attention with every parameter away from its start."""
    torch.manual_seed(0)
    made = cls(width, heads, cross=cross, rank=RANK, **options).to(dtype)
    with torch.no_grad():
        for index, parameter in enumerate(made.parameters()):
            parameter.copy_(0.4 * noise(*parameter.shape, seed=index, dtype=dtype))
    return made


def turn_of(positions, head_dim, start=0, dtype=torch.float64):
    channel = torch.arange(0, head_dim, 2, dtype=torch.float64)
    angle = torch.arange(start, start + positions).double()[:, None] * 10000.0 ** (-channel / head_dim)
    cos, sin = angle.cos()[:, None, None].expand(-1, 1, 2, -1), torch.stack((-angle.sin(), angle.sin()), 1)[:, None]
    return Rotation(cos.to(dtype), sin.to(dtype))


def turned_by_hand(vector, position):
    """RoPE as multiplication of complex numbers (channel i, channel i + d/2) by e^(i position theta)."""
    half = len(vector) // 2
    out = [0.0] * len(vector)
    for i in range(half):
        turn = cmath.exp(1j * position * 10000.0 ** (-2 * i / len(vector)))
        value = complex(vector[i], vector[half + i]) * turn
        out[i], out[half + i] = value.real, value.imag
    return torch.tensor(out, dtype=torch.float64)


def by_hand(layer, x_TD, memory_SD=None, *, causal):
    """One sequence through the formula of the class, head by head and position by position."""
    size, weight = layer.head_dim, layer.in_proj.weight
    starts = [sum(layer.widths[:i]) for i in range(len(layer.widths) + 1)]
    parts = [x_TD @ weight[a:b].T for a, b in itertools.pairwise(starts)]
    if memory_SD is None:
        keys, values = parts[1], parts[2]
    else:
        keys, values = (memory_SD @ layer.memory_proj.weight.T).chunk(2, dim=-1)
    low, gate_input = parts[-2:]
    out = torch.zeros(len(x_TD), WIDTH, dtype=torch.float64)
    for h in range(HEADS):
        columns = slice(h * size, (h + 1) * size)
        amp, temp = math.tanh(layer.amp[h]), math.log1p(math.exp(layer.temp_raw[h])) + 0.1
        for t in range(len(x_TD)):
            query = parts[0][t, columns]
            keys_seen = keys[: t + 1 if causal else None, columns]
            if memory_SD is None:
                query = turned_by_hand(query.tolist(), t)
                keys_seen = torch.stack([turned_by_hand(key.tolist(), s) for s, key in enumerate(keys_seen)])
            score = [math.exp(float(query @ key) / math.sqrt(size)) for key in keys_seen]
            attended = sum(p * value for p, value in zip(score, values[:, columns], strict=False)) / math.fsum(score)
            gate = 1 / (1 + math.exp(-float(gate_input[t, h] + layer.gate_bias[h]) / temp))
            own = layer.self_value.weight[columns] @ low[t]
            out[t, columns] = attended + layer.autopoietic_alpha * amp * gate * own
    return out @ layer.out_proj.weight.T


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_its_formula(causal):
    layer, x = attention(autopoietic_alpha=0.7), noise(2, 7, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        got = layer(x, turn=turn_of(7, WIDTH // HEADS), causal=causal)
        for row in range(2):
            assert_close("attention_fp64", got[row], by_hand(layer, x[row], causal=causal))


def test_cross_attention_is_its_formula():
    layer, x = attention(cross=True, autopoietic_alpha=0.7), noise(2, 5, WIDTH, dtype=torch.float64)
    memory = noise(2, 6, WIDTH, seed=1, dtype=torch.float64)
    with torch.no_grad():
        got = layer(x, memory_BSD=memory)
        for row in range(2):
            assert_close("attention_fp64", got[row], by_hand(layer, x[row], memory[row], causal=False))


def test_rotary_positions_are_rotations():
    table, x = RotaryTable(50, 6, 10000.0), noise(1, 4, 2, 6)
    got = rotate(x, table(46, 4))
    for t in range(4):
        for h in range(2):
            assert_close("definition_fp32", got[0, t, h].double(), turned_by_hand(x[0, t, h].tolist(), 46 + t))
    assert rotate(x.bfloat16(), table(0, 4)).dtype == torch.bfloat16


def test_the_rotary_table_stays_fp32_when_the_model_is_cast():
    table = RotaryTable(50, 6, 10000.0)
    before = table.cos.clone()
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        assert torch.equal(table.to(dtype).cos, before)
    assert not table.state_dict()


# It starts as plain attention.


def without_the_term(model):
    """The same model, its weights and products, with the term left out of the sum."""
    for module in model.modules():
        if isinstance(module, AutopoieticAttention):
            project = module._project
            module._project = lambda *inputs, project=project: (*project(*inputs)[:3], None)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"d_model": 12, "num_heads": 3}, {"d_model": 10, "num_heads": 1}])
def test_a_new_model_equals_the_one_without_the_term_bit_for_bit(options, dtype):
    src, ids = tokens(2, 7), tokens(2, 9, seed=1)
    new = build(started=False, **options).to(dtype)
    got = new(src, ids), new(ids)
    without_the_term(new)
    assert torch.equal(got[0], new(src, ids))
    assert torch.equal(got[1], new(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_model_equals_a_plain_one_of_the_same_seed_bit_for_bit(dtype):
    src, ids = tokens(2, 7), tokens(2, 9, seed=1)
    new, plain = (build(started=False, use_autopoietic=flag).to(dtype) for flag in (True, False))
    assert torch.equal(new(src, ids), plain(src, ids))
    assert torch.equal(new(ids), plain(ids))


def test_a_model_whose_term_has_moved_differs_from_the_plain_one():
    ids = tokens(2, 9)
    assert not torch.equal(build()(ids), without_the_term(build())(ids))


def test_models_that_share_a_seed_share_what_they_have_in_common():
    full = build(started=False)
    random_after = torch.get_rng_state()
    for options in (
        {"use_autopoietic": False},
        {"use_left_spin": False},
        {"decoder_only": True},
        {"tie_word_embeddings": True},
        {"norm_position": "post", "left_spin_mode": "trust", "dropout": 0.1},
        {"num_decoder_layers": 1, "num_encoder_layers": 3},
    ):
        other = build(started=False, **options)
        assert torch.equal(torch.get_rng_state(), random_after), "what is drawn next would differ"
        theirs, shared = dict(other.named_parameters()), 0
        for name, parameter in full.named_parameters():
            if name in theirs:
                rows = min(len(parameter), len(theirs[name]))
                if name.endswith("in_proj.weight"):
                    rows = SHAPE["d_model"] * (1 if "cross" in name else 3)
                assert torch.equal(parameter[:rows], theirs[name][:rows]), name
                shared += 1
        assert shared > 10


def test_drawing_again_gives_the_same_weights():
    model = build(seed=5, started=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 9.0)
    torch.manual_seed(5)
    model.reset_parameters()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(before["embedding.weight"], build(seed=6, started=False).embedding.weight)


@pytest.mark.parametrize("cross", [False, True])
def test_at_the_start_the_term_learns_through_its_output_matrix_alone(cross):
    layer = attention(cross=cross)
    layer.reset_gate()
    x, memory = noise(2, 7, WIDTH, dtype=torch.float64), noise(2, 6, WIDTH, seed=1, dtype=torch.float64)
    layer(x, turn=turn_of(7, WIDTH // HEADS), memory_BSD=memory if cross else None).square().sum().backward()
    heads = WIDTH * (1 if cross else 3)
    assert layer.in_proj.weight.grad[:WIDTH].any()
    assert not layer.in_proj.weight.grad[heads:].any(), "U, W_g and the rows that only align"
    for parameter in (layer.gate_bias, layer.amp, layer.temp_raw):
        assert not parameter.grad.any()
    assert bool((layer.self_value.weight.grad != 0).all())


def test_rows_that_only_align_never_learn():
    layer = attention()
    assert layer.padding_rows > 0
    layer(noise(2, 7, WIDTH, dtype=torch.float64), turn=turn_of(7, WIDTH // HEADS)).square().sum().backward()
    assert layer.in_proj.weight.grad[: -layer.padding_rows].any(dim=1).all()
    assert not layer.in_proj.weight.grad[-layer.padding_rows :].any()


# It looks at its own token.


class MeanGate(AutopoieticAttention):
    """Negative control: the gate of the mean over the sequence, which sees the future."""

    def _self_value(self, low_BTr, gate_BTH):
        return super()._self_value(low_BTr, gate_BTH.mean(dim=1, keepdim=True).expand_as(gate_BTH))


def future_leak(cls):
    layer = attention(cls=cls)
    x, turn = noise(2, 7, WIDTH, dtype=torch.float64), turn_of(7, WIDTH // HEADS)
    changed = x.clone()
    changed[:, 4:] = noise(2, 3, WIDTH, seed=9, dtype=torch.float64)
    first, second = (layer(inputs, turn=turn, causal=True)[:, :4] for inputs in (x, changed))
    return float((first - second).detach().abs().max())


def test_a_later_token_changes_nothing_earlier():
    assert future_leak(AutopoieticAttention) == 0


def test_the_check_of_causality_catches_a_gate_over_the_sequence():
    assert future_leak(MeanGate) > 1e-3


# Masks and the cache.


def test_no_mask_is_built_where_the_kernels_need_none():
    device = torch.device("cpu")
    assert attention_mask(True, None, 7, 7, device) == (None, True)
    assert attention_mask(True, None, 1, 7, device) == (None, False)
    assert attention_mask(False, None, 3, 7, device) == (None, False)


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (2, 5), (1, 5), (5, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_causal_mask_by_hand(queries, keys, masked):
    key_mask = torch.tensor([[False, False, True, True, True], [True] * 5])[:, :keys] if masked else None
    mask, is_causal = attention_mask(True, key_mask, queries, keys, torch.device("cpu"))
    if is_causal:
        mask = torch.ones(keys, keys, dtype=torch.bool).tril()
    for row in range(2):
        for q in range(queries):
            for k in range(keys):
                position = keys - queries + q
                wanted = k <= position and (not masked or bool(key_mask[row, k]) or k == position)
                if mask is not None:
                    got = mask.expand(2, 1, queries, keys)[row, 0, q, k] if mask.ndim == 4 else mask[q, k]
                    assert bool(got) == wanted, (row, q, k)
                else:
                    assert wanted


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_alone_is_finite(positions, causal):
    layer, x = attention(), noise(1, positions, WIDTH, dtype=torch.float64).requires_grad_()
    nothing = torch.zeros(1, positions, dtype=torch.bool)
    out = layer(x, turn=turn_of(positions, WIDTH // HEADS), causal=causal, key_mask_BS=nothing)
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("chunks", [[1] * 7, [4, 3], [2, 1, 4]])
def test_in_pieces_through_the_cache_it_is_the_same(chunks):
    layer, x = attention(), noise(2, 7, WIDTH, dtype=torch.float64)
    mask = torch.tensor([[False, False, True, True, True, True, True], [True] * 7])
    whole = layer(x, turn=turn_of(7, WIDTH // HEADS), causal=True, key_mask_BS=mask)
    cache = AttentionCache.empty(2, HEADS, 9, WIDTH // HEADS, device=torch.device("cpu"), dtype=torch.float64)
    start, got = 0, []
    with torch.no_grad():
        for size in chunks:
            end = start + size
            turn = turn_of(size, WIDTH // HEADS, start)
            got.append(layer(x[:, start:end], turn=turn, causal=True, key_mask_BS=mask[:, :end], cache=cache))
            start = end
    assert cache.length == 7
    real = mask[:, :, None]
    assert_close("attention_fp64", torch.cat(got, dim=1) * real, whole * real)


def test_what_is_missing_is_named():
    with pytest.raises(InputError, match="self-attention needs `turn`"):
        attention()(noise(1, 3, WIDTH, dtype=torch.float64))
    with pytest.raises(InputError, match="cross-attention needs `memory_BSD`"):
        attention(cross=True)(noise(1, 3, WIDTH, dtype=torch.float64))


# No matrix of scores.


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


class NaiveAttention(AutopoieticAttention):
    """Negative control: the same function with its matrix of scores."""

    def forward(self, x_BTD, *, turn=None, causal=False, **_):
        query, key, value, term = self._project(x_BTD, turn, None, None)
        score = query @ key.transpose(-1, -2) / math.sqrt(self.head_dim)
        hidden = torch.ones(score.shape[-2:], dtype=torch.bool).triu(1)
        score = score.masked_fill(hidden, -torch.inf) if causal else score
        out = (score.softmax(dim=-1) @ value).transpose(1, 2) + self._self_value(*term)
        return self.out_proj(out.flatten(2))


def largest_tensor(layer, x, **inputs):
    x = x.clone().requires_grad_()
    with LargestTensor() as mode:
        layer(x, **inputs).square().sum().backward()
    return mode.largest


@pytest.mark.parametrize("causal", [False, True])
def test_no_matrix_of_scores_is_made(causal):
    positions, width = 256, 16
    x, turn = noise(1, positions, width), turn_of(positions, width // HEADS, dtype=torch.float32)
    layer, naive = (
        attention(cls=cls, width=width, dtype=torch.float32) for cls in (AutopoieticAttention, NaiveAttention)
    )
    assert_close("other_shape", naive(x, turn=turn, causal=causal), layer(x, turn=turn, causal=causal))
    assert largest_tensor(layer, x, turn=turn, causal=causal) < positions * positions
    assert largest_tensor(naive, x, turn=turn, causal=causal) >= HEADS * positions * positions


def test_no_matrix_of_scores_is_made_in_a_whole_model():
    positions = 256
    model = build(num_encoder_layers=1, num_decoder_layers=1, max_seq_len=positions)
    src, ids = tokens(1, positions), tokens(1, positions, seed=1)
    with LargestTensor() as mode:
        F.cross_entropy(model(src, ids)[0], ids[0]).backward()
    assert mode.largest < positions * positions
