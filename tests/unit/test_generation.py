import contextlib
import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_models import build, noise, tokens
from torch import nn

from apt_model.core.errors import ConfigError, InputError, SequenceLengthError
from apt_model.modeling.apt_model import APTModelConfiguration
from apt_model.modeling.generation import generate, keep_likely
from apt_model.modeling.generation_config import GenerationConfig

NEVER = -math.inf


class Bigram(nn.Module):
    """A language model whose next token follows from the last one alone: row i of `table` is the logits after i."""

    def __init__(self, table, **options):
        super().__init__()
        self.table = torch.as_tensor(table, dtype=torch.float32)
        self.config = APTModelConfiguration(vocab_size=len(self.table), decoder_only=True, max_seq_len=32, **options)

    def precision(self, _):
        return contextlib.nullcontext()

    def decode(self, tgt_tokens, **_):
        return self.table[tgt_tokens]

    def generate(self, ids, **options):
        options = GenerationConfig(**{"use_cache": False, **options})
        return generate(self, torch.as_tensor(ids), options, attention_mask=None, causal=None).tolist()

    def log_probability(self, start, continuation):
        steps = self.table.double().log_softmax(dim=-1)
        return math.fsum(float(steps[a, b]) for a, b in itertools.pairwise([start, *continuation]))


def random_table(size, seed):
    return 2 * noise(size, size, seed=seed)


def all_continuations(size, length, eos):
    """Every sequence of `length` tokens, cut after its first `eos`."""
    cut = set()
    for sequence in itertools.product(range(size), repeat=length):
        end = sequence.index(eos) + 1 if eos in sequence else length
        cut.add(sequence[:end])
    return sorted(cut)


# Greedy.


@torch.no_grad()
def test_greedy_takes_the_likeliest_token_each_time():
    model, ids = build(decoder_only=True), tokens(3, 4)
    by_hand = ids
    for _ in range(6):
        by_hand = torch.cat([by_hand, model(by_hand)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(ids, max_new_tokens=6), by_hand)


@torch.no_grad()
def test_from_a_source_it_writes_the_target_from_bos_on():
    model, source = build(bos_token_id=1), tokens(3, 5)
    by_hand = torch.full((3, 1), 1)
    for _ in range(6):
        by_hand = torch.cat([by_hand, model(source, by_hand)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(source, max_new_tokens=6), by_hand)
    prompt_instead = model.generate(source, max_new_tokens=6, causal=True)
    assert torch.equal(prompt_instead[:, :5], source)


@pytest.mark.parametrize("count", [1, 7])
def test_max_new_tokens_counts_what_is_added(count):
    assert build(decoder_only=True).generate(tokens(2, 4), max_new_tokens=count).shape == (2, 4 + count)


def test_the_last_position_can_be_filled():
    model = build(decoder_only=True, max_seq_len=10)
    assert model.generate(tokens(1, 4), max_new_tokens=6).shape == (1, 10)


CHAIN = [  # 3 -> 4 -> 1 (the end), 5 -> 1, 0 -> 3, 1 -> 5
    [0, 0, 0, 9, 0, 0],
    [0, 0, 0, 0, 0, 9],
    [0, 9, 0, 0, 0, 0],
    [0, 0, 0, 0, 9, 0],
    [0, 9, 0, 0, 0, 0],
    [0, 9, 0, 0, 0, 0],
]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_row_that_ended_is_filled_and_all_ended_stops(beams):
    options = {"max_new_tokens": 8, "num_beams": beams}
    assert Bigram(CHAIN, eos_token_id=1, pad_token_id=2).generate([[3], [5]], **options) == [[3, 4, 1], [5, 1, 2]]
    assert Bigram(CHAIN, eos_token_id=1).generate([[3], [5]], **options) == [[3, 4, 1], [5, 1, 1]]
    assert Bigram(CHAIN).generate([[3]], max_new_tokens=4, num_beams=beams) == [[3, 4, 1, 5, 1]]


def test_an_end_inside_the_prompt_does_not_end_it():
    assert Bigram(CHAIN, eos_token_id=1).generate([[1, 3]], max_new_tokens=4) == [[1, 3, 4, 1]]


# Sampling.


def kept_by_hand(logits, top_k, top_p):
    """Indices that stay, one row, in plain arithmetic; None where rounding could decide."""
    kept = set(range(len(logits)))
    if 0 < top_k < len(logits):
        kept = {i for i in kept if logits[i] >= sorted(logits, reverse=True)[top_k - 1]}
    if top_p < 1:
        weights = {i: math.exp(logits[i] - max(logits)) for i in kept}
        total, so_far, chosen = math.fsum(weights.values()), 0.0, set()
        for i in sorted(kept, key=lambda i: -logits[i]):
            if abs(so_far / total - top_p) < 1e-4:
                return None
            if so_far / total < top_p:
                chosen.add(i)
            so_far += weights[i]
        kept = chosen
    return kept


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-12, 12), min_size=6, max_size=6, unique=True), min_size=1, max_size=3),
    top_k=st.integers(0, 8),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.77, 0.9, 0.99, 1.0]),
)
def test_what_is_kept_is_the_likeliest(rows, top_k, top_p):
    logits = torch.tensor(rows) / 4
    got = keep_likely(logits, top_k=top_k, top_p=top_p)
    for before, after in zip(logits, got, strict=True):
        kept = kept_by_hand(before.tolist(), top_k, top_p)
        assume(kept is not None)
        assert {i for i in range(6) if after[i] != NEVER} == kept
        assert kept
        assert all(after[i] == before[i] for i in kept)


def test_equal_logits_at_the_edge_are_all_kept_by_top_k():
    assert keep_likely(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), top_k=2)[0].tolist() == [NEVER, 3.0, 2.0, 2.0]


@torch.no_grad()
def test_sampling_draws_what_the_options_leave():
    model, ids = build(decoder_only=True), tokens(4, 3)
    options = {"temperature": 0.7, "top_k": 9, "top_p": 0.8}
    generator, by_hand = torch.Generator().manual_seed(11), ids
    for _ in range(5):
        logits = keep_likely(model(by_hand)[:, -1] / 0.7, top_k=9, top_p=0.8)
        by_hand = torch.cat([by_hand, logits.softmax(dim=-1).multinomial(1, generator=generator)], dim=1)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=True, seed=11, **options), by_hand)


def frequencies(temperature=1.0, **options):
    model, draws = Bigram([[0.0, 1.0, 2.0, -1.0]] * 4), 4000
    drawn = model.generate([[0]] * draws, max_new_tokens=1, do_sample=True, seed=3, temperature=temperature, **options)
    return [sum(row[1] == i for row in drawn) / draws for i in range(4)]


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (3.0, 2)])
def test_the_draws_have_the_distribution(temperature, top_k):
    kept = keep_likely(torch.tensor([[0.0, 1.0, 2.0, -1.0]]) / temperature, top_k=top_k).softmax(dim=-1)[0].tolist()
    for got, wanted in zip(frequencies(temperature, top_k=top_k), kept, strict=True):
        assert abs(got - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / 4000) + 1e-9


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_at_their_limit_the_options_of_sampling_are_greedy(options):
    model, ids = build(decoder_only=True), tokens(2, 4)
    greedy = model.generate(ids, max_new_tokens=8)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=True, seed=1, **options), greedy)


def test_a_seed_repeats_the_draws_and_none_follows_the_global_generator():
    model, ids = build(decoder_only=True), tokens(2, 4)
    options = {"max_new_tokens": 12, "do_sample": True}
    first, second, other = (model.generate(ids, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.manual_seed(9)
    free = model.generate(ids, **options)
    assert not torch.equal(model.generate(ids, **options), free)
    torch.manual_seed(9)
    assert torch.equal(model.generate(ids, **options), free)


# Beam search.


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(2, 7),
    seed=st.integers(0, 2**31),
    ends=st.booleans(),
    penalty=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_with_a_beam_for_every_hypothesis_the_search_is_exhaustive(size, seed, ends, penalty):
    eos = size - 1 if ends else None
    model, starts = Bigram(random_table(size, seed), eos_token_id=eos), [[0], [size // 2]]
    got = model.generate(starts, max_new_tokens=2, num_beams=size, length_penalty=penalty)
    for (start,), row in zip(starts, got, strict=True):

        def rank(continuation, start=start):
            return model.log_probability(start, continuation) / len(continuation) ** penalty

        best, second = sorted(all_continuations(size, 2, eos), key=rank, reverse=True)[:2]
        assume(rank(best) - rank(second) > 1e-4)
        assert tuple(row[1 : 1 + len(best)]) == best
        assert all(token == eos for token in row[1 + len(best) :])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_longer_exhaustive_search(seed):
    """Three possible first tokens with two successors each: six hypotheses of two tokens, then any of six."""
    table = random_table(7, seed)
    table[6, 3:] = NEVER
    for token in range(3):
        successors = torch.randperm(6, generator=torch.Generator().manual_seed(seed + token))[:2]
        hidden = torch.ones(7, dtype=torch.bool)
        hidden[successors] = False
        table[token, hidden] = NEVER
    model = Bigram(table)
    ranked = sorted(itertools.product(range(7), repeat=3), key=lambda c: model.log_probability(6, c), reverse=True)
    assume(model.log_probability(6, ranked[0]) - model.log_probability(6, ranked[1]) > 1e-4)
    assert model.generate([[6]], max_new_tokens=3, num_beams=6) == [[6, *ranked[0]]]


def test_beams_find_what_greedy_walks_past():
    """After 0, token 1 is likelier than 2; but what follows 1 is spread out, and what follows 2 is certain."""
    table = [[NEVER, 1.0, 0.5, NEVER], [0.0, 0.0, 0.0, 0.0], [NEVER, NEVER, NEVER, 0.0], [0.0, 0.0, 0.0, 0.0]]
    model = Bigram(table)
    assert model.generate([[0]], max_new_tokens=2)[0][1] == 1
    assert model.generate([[0]], max_new_tokens=2, num_beams=2) == [[0, 2, 3]]


def test_the_length_penalty_weighs_length_against_probability():
    """After 0: the end with probability .5, or 2 and then the end, .4 together."""
    table = torch.tensor([[NEVER, 0.5, 0.4, 0.1], [1.0, NEVER, NEVER, NEVER], [NEVER, 1.0, NEVER, NEVER], [1.0] * 4])
    table[0, 1:] = table[0, 1:].log()
    model = Bigram(table, eos_token_id=1, pad_token_id=3)
    by_penalty = {p: model.generate([[0]], max_new_tokens=3, num_beams=2, length_penalty=p) for p in (0.0, 1.0, -1.0)}
    assert by_penalty == {0.0: [[0, 1]], 1.0: [[0, 2, 1]], -1.0: [[0, 1]]}


def test_one_beam_is_greedy():
    model, ids = build(decoder_only=True), tokens(2, 4)
    assert torch.equal(model.generate(ids, max_new_tokens=5, num_beams=1), model.generate(ids, max_new_tokens=5))


# The cache and the configuration.


def test_use_cache_says_whether_keys_are_kept(monkeypatch):
    model, lengths = build(decoder_only=True), []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda ids, **rest: (lengths.append(ids.shape[1]), decode(ids, **rest))[1])
    model.generate(tokens(2, 4), max_new_tokens=3)
    assert lengths == [4, 1, 1]
    lengths.clear()
    model.generate(tokens(2, 4), max_new_tokens=3, use_cache=False)
    assert lengths == [4, 5, 6]


def test_a_configuration_does_what_its_fields_by_name_do():
    model, ids = build(decoder_only=True), tokens(2, 4)
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 5, "seed": 2}
    assert torch.equal(model.generate(ids, GenerationConfig(**options)), model.generate(ids, **options))


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"do_sample": True, "temperature": 0.0}, "temperature: expected above 0, got 0.0\ngreedy is do_sample=False"),
        ({"do_sample": True, "top_k": -1}, "top_k: expected 0 or more, got -1"),
        ({"do_sample": True, "top_p": 0.0}, "top_p: expected 0 < top_p <= 1, got 0.0"),
        ({"do_sample": True, "top_p": 1.1}, "top_p: expected 0 < top_p <= 1, got 1.1"),
        ({"num_beams": 0}, "num_beams: expected at least 1, got 0"),
        ({"num_beams": 2, "do_sample": True}, "num_beams: expected 1 with do_sample, got 2"),
        ({"temperature": 0.5}, "temperature: expected 1.0 without do_sample"),
        ({"top_k": 5}, "top_k: expected 0 without do_sample"),
        ({"top_p": 0.5}, "top_p: expected 1.0 without do_sample"),
        ({"seed": 5}, "seed: expected None without do_sample"),
        ({"length_penalty": 0.5}, "length_penalty: expected 1.0 without beams, got 0.5"),
        ({"max_new_tokens": 2.0}, "max_new_tokens: expected int, got 2.0"),
        ({"use_cache": "yes"}, "use_cache: expected bool, got 'yes'"),
    ],
)
def test_a_value_that_cannot_be_met_or_has_no_effect_is_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        build(decoder_only=True).generate(tokens(1, 3), **options)
    assert str(caught.value).startswith(f"GenerationConfig.{message}")


def test_an_unknown_option_is_named_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"GenerationConfig has no option 'max_tokens'\ndid you mean 'max_new_tokens'\?"
    ):
        build(decoder_only=True).generate(tokens(1, 3), max_tokens=3)


def test_options_and_configuration_both_are_refused():
    with pytest.raises(ConfigError, match="not both"):
        build(decoder_only=True).generate(tokens(1, 3), GenerationConfig(), max_new_tokens=3)


def test_a_prompt_padded_on_the_right_is_refused():
    model, ids = build(decoder_only=True, pad_token_id=0), torch.tensor([[5, 6, 7], [5, 6, 0]])
    with pytest.raises(InputError, match="a prompt's last position is padding; pad prompts on the left"):
        model.generate(ids, max_new_tokens=2)
    with pytest.raises(InputError, match="pad prompts on the left"):
        model.generate(ids, max_new_tokens=2, attention_mask=ids != 0)
    # A source may be padded on either side, and a mask may say that the token is no padding.
    build(pad_token_id=0, bos_token_id=1).generate(ids, max_new_tokens=2)
    model.generate(ids, max_new_tokens=2, attention_mask=torch.ones_like(ids, dtype=torch.bool))


def test_more_than_the_model_holds_is_refused_before_any_work():
    model = build(decoder_only=True, max_seq_len=10)
    with pytest.raises(
        SequenceLengthError, match=r"4 prompt tokens and max_new_tokens = 7 need 11(?s:.*)max_new_tokens=6 or"
    ):
        model.generate(tokens(1, 4), max_new_tokens=7)
    with pytest.raises(SequenceLengthError, match="a prompt of at most 9 tokens"):
        model.generate(tokens(1, 10), max_new_tokens=1)
    with pytest.raises(SequenceLengthError, match="src_tokens: 11 positions"):
        build(bos_token_id=1, max_seq_len=10).generate(tokens(1, 11), max_new_tokens=1)


def test_a_target_needs_its_first_token_and_an_encoder():
    with pytest.raises(ConfigError, match=r"no bos_token_id(?s:.*)causal=True"):
        build().generate(tokens(1, 3), max_new_tokens=2)
    with pytest.raises(ConfigError, match="a decoder_only model has no encoder"):
        build(decoder_only=True, bos_token_id=1).generate(tokens(1, 3), max_new_tokens=2, causal=False)


@pytest.mark.parametrize(
    "mask", [torch.ones(1, 3), torch.ones(1, 4, dtype=torch.bool), torch.ones(3, dtype=torch.bool)]
)
def test_a_mask_of_another_shape_or_type_is_refused(mask):
    with pytest.raises(InputError, match=r"attention_mask: expected bool \[1, 3\]"):
        build(decoder_only=True).generate(tokens(1, 3), max_new_tokens=2, attention_mask=mask)


def test_more_beams_than_tokens_are_refused():
    with pytest.raises(ConfigError, match="num_beams = 38 is more than the 37 tokens there are"):
        build(decoder_only=True).generate(tokens(1, 3), max_new_tokens=2, num_beams=38)


def test_the_mode_of_the_model_is_restored_after_an_error():
    model = build(decoder_only=True).train()
    with pytest.raises(ConfigError):
        model.generate(tokens(1, 3), max_new_tokens=2, num_beams=38)
    assert model.training
