"""Batches are pure functions of seed and index; a held-out pass scores every token once and every byte with it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_model.core.errors import ConfigError, DataError
from apt_model.modeling import tokenizer as tokenizer_module
from apt_model.modeling.tokenizer import Tokenizer
from apt_model.trainer import data as data_module
from apt_model.trainer.config import DataConfig
from apt_model.trainer.corpus import Corpus, Document, Pair, read_corpus
from apt_model.trainer.data import IGNORED, CausalData, Seq2SeqData, load_or_train_tokenizer, make_data

TRAIN = tuple(Document(f"t{n}", f"value_{n} = {n} + x  # na\u00efve {n * n}\n" * 3) for n in range(20))
HELDOUT = (
    Document("h0", "caf\u00e9 = value_1 + <eos> \u4f60\u597d\n" * 7),
    Document("h1", "x"),
    Document("h2", "last\r\n"),
)
CORPUS = Corpus(TRAIN, HELDOUT)
PAIRS = Corpus(
    tuple(Pair(f"p{n}", f"def f{n}(x): return x + {n}", f"Add {n}.") for n in range(20)),
    tuple(Pair(f"q{n}", "def g(): return " + "9" * n, "Give " + "\u00e9" * n + ".") for n in range(1, 9)),
)
TOKENIZER = Tokenizer.train([document.text for document in TRAIN], 300)
EOS, PAD, BOS = TOKENIZER.eos_id, TOKENIZER.pad_id, TOKENIZER.bos_id


def causal(corpus=CORPUS, *, seed=0, **options):
    return make_data(DataConfig(**options), TOKENIZER, corpus, seed)


def seq2seq(corpus=PAIRS, *, seed=0, **options):
    return make_data(DataConfig(task="seq2seq", **options), TOKENIZER, corpus, seed)


def stream(documents):
    return [index for document in documents for index in [*TOKENIZER.encode(document.text), EOS]]


def same(first, second):
    pairs = zip((*first.inputs, first.labels), (*second.inputs, second.labels), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("make", [causal, seq2seq])
class TestBothTasks:
    def test_batch_follows_from_seed_and_index_alone(self, make):
        one, two = make(seed=3, seq_len=8), make(seed=3, seq_len=8)
        forward = [one.batch(index, 4) for index in range(5)]
        torch.manual_seed(99)
        backward = [two.batch(index, 4) for index in reversed(range(5))][::-1]
        assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
        assert not same(one.batch(0, 4), one.batch(1, 4))
        assert not same(one.batch(0, 4), make(seed=4, seq_len=8).batch(0, 4))

    def test_global_generator_is_left_alone(self, make):
        data = make(seq_len=8)
        before = torch.get_rng_state()
        data.batch(0, 4)
        assert torch.equal(before, torch.get_rng_state())

    def test_every_tensor_is_int64_and_contiguous(self, make):
        data = make(seq_len=8)
        for batch in (data.batch(0, 3), *data.heldout_batches(3)):
            for tensor in (*batch.inputs, batch.labels):
                assert tensor.dtype == torch.int64
                assert tensor.is_contiguous()
                assert tensor.shape[0] == batch.labels.shape[0] <= 3

    def test_full_pass_counts_every_token_and_byte(self, make):
        data = make(seq_len=8)
        batches = list(data.heldout_batches(3))
        assert sum(int((batch.labels != IGNORED).sum()) for batch in batches) == data.heldout_tokens
        assert sum(data.count_bytes(batch.labels) for batch in batches) == data.heldout_bytes

    def test_batch_size_changes_nothing_in_what_a_pass_scores(self, make):
        data = make(seq_len=8)
        passes = [[b.labels[b.labels != IGNORED] for b in data.heldout_batches(size)] for size in (1, 3, 100)]
        flat = [torch.cat(labels).tolist() for labels in passes]
        assert flat[0] == flat[1] == flat[2]

    def test_no_batch_is_without_labels(self, make):
        data = make(seq_len=8)
        for limit in (None, *range(1, data.heldout_tokens + 2)):
            assert all((batch.labels != IGNORED).any() for batch in data.heldout_batches(1, limit))


def test_causal_heldout_bytes_are_the_size_of_the_text():
    assert causal().heldout_bytes == sum(len(document.text.encode()) for document in HELDOUT)


def test_causal_batch_is_windows_of_the_training_tokens():
    tokens = stream(TRAIN)
    (ids,), labels = causal(seq_len=16).batch(0, 50)
    assert ids.shape == labels.shape == (50, 16)
    windows = {tuple(tokens[start : start + 17]) for start in range(len(tokens) - 16)}
    assert all((*row, last) in windows for row, last in zip(ids.tolist(), labels[:, -1].tolist(), strict=True))
    assert torch.equal(ids[:, 1:], labels[:, :-1])
    assert causal().train_tokens == len(tokens)


def test_causal_windows_reach_both_ends_of_the_training_tokens():
    tokens = stream(TRAIN)
    data = causal(seq_len=len(tokens) - 3)
    found = {tuple(row) for index in range(50) for row in data.batch(index, 1).inputs[0].tolist()}
    assert found == {tuple(tokens[start : start + len(tokens) - 3]) for start in range(3)}


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(2, 40), st.integers(1, 7))
def test_causal_pass_covers_every_token_once_with_half_a_window_before_it(size, seq_len, batch_size):
    text = "".join(chr(97 + n % 26) + " " for n in range(size))
    data = causal(Corpus(TRAIN, (Document("h", text),)), seq_len=seq_len)
    expected = [EOS, *stream([Document("h", text)])]
    at = 0
    for (ids,), labels in data.heldout_batches(batch_size):
        for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
            scored = [place for place, index in enumerate(label) if index != IGNORED]
            assert at == 0 or scored[0] >= len(row) / 2 - 1
            for place in scored:  # position `at` of the text: its label, and everything the model sees before it
                assert label[place] == expected[at + 1]
                assert row[: place + 1] == expected[at - place : at + 1]
                at += 1
    assert at == len(expected) - 1


def test_first_token_is_predicted_from_the_end_token():
    batch = next(causal(seq_len=8).heldout_batches(1))
    assert batch.inputs[0][0, 0] == EOS
    assert batch.labels[0, 0] == TOKENIZER.encode(HELDOUT[0].text)[0]


def test_partial_causal_pass_scores_exactly_so_many_spread_over_the_text():
    text = "".join(f"{n} " for n in range(2000))
    data = causal(Corpus(TRAIN, (Document("h", text),)), seq_len=16)
    for limit in (1, 7, 16, 17, 100, 1000, data.heldout_tokens - 1, data.heldout_tokens, 10**9):
        labels = [batch.labels for batch in data.heldout_batches(4, limit)]
        assert sum(int((part != IGNORED).sum()) for part in labels) == min(limit, data.heldout_tokens)
    seen = "".join(TOKENIZER.decode(b.labels[b.labels != IGNORED].tolist()) for b in data.heldout_batches(4, 200))
    assert seen.startswith("0 1 2 ")
    assert " 17" in seen  # from the last fifth


def test_partial_pass_counts_the_bytes_of_what_it_scored():
    data = causal(seq_len=8)
    for limit in (5, 20):
        batches = list(data.heldout_batches(2, limit))
        scored = torch.cat([batch.labels[batch.labels != IGNORED] for batch in batches]).tolist()
        lengths = TOKENIZER.byte_lengths()
        assert sum(data.count_bytes(b.labels) for b in batches) == sum(lengths[index] for index in scored)


def test_uniform_model_has_the_bits_per_byte_that_arithmetic_gives():
    data, nats, size = causal(seq_len=8), 0.0, 0
    for batch in data.heldout_batches(4):
        logits = torch.zeros(batch.labels.numel(), TOKENIZER.vocab_size)
        nats += torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="sum").item()
        size += data.count_bytes(batch.labels)
    expected = math.log2(TOKENIZER.vocab_size) * len(stream(HELDOUT)) / data.heldout_bytes
    assert nats / math.log(2) / size == pytest.approx(expected, rel=1e-5)


def test_long_documents_reach_the_tokenizer_in_pieces_and_groups(monkeypatch):
    whole = causal()
    monkeypatch.setattr(data_module, "_GROUP", 40)
    monkeypatch.setattr(data_module, "pieces", lambda text: tokenizer_module.pieces(text, 30))
    cut = causal()
    assert TOKENIZER.decode(cut._train.tolist()) == TOKENIZER.decode(whole._train.tolist())
    assert (cut._train == EOS).sum() == len(TRAIN)


def test_causal_text_that_is_too_short_is_refused_with_numbers():
    short = Corpus((Document("a", "ab"),), HELDOUT)
    with pytest.raises(DataError, match=r"expected at least 257 tokens to train on \(seq_len \+ 1\), got 3"):
        causal(short)
    assert causal(short, seq_len=2).batch(0, 1).labels.shape == (1, 2)
    with pytest.raises(DataError, match="expected at least 1 byte held out, got 0"):
        causal(Corpus(TRAIN, ()))


def test_seq2seq_batch_is_padded_pairs():
    batch = seq2seq().batch(0, 6)
    source, target_in = batch.inputs
    expected = {TOKENIZER.decode(TOKENIZER.encode(pair.source)): pair.target for pair in PAIRS.train}
    for row_S, row_T, label_T in zip(source.tolist(), target_in.tolist(), batch.labels.tolist(), strict=True):
        target = expected[TOKENIZER.decode(row_S)]
        ids = TOKENIZER.encode(target)
        assert row_T[: len(ids) + 1] == [BOS, *ids]
        assert label_T[: len(ids) + 1] == [*ids, EOS]
        assert set(row_T[len(ids) + 1 :]) <= {PAD}
        assert set(label_T[len(ids) + 1 :]) <= {IGNORED}
    assert (source[:, -1] != PAD).any()  # as wide as the longest and no wider
    assert (batch.labels[:, -1] != IGNORED).any()


def test_seq2seq_pass_has_each_pair_once_in_order():
    data = seq2seq()
    rows = [row for batch in data.heldout_batches(3) for row in batch.labels.tolist()]
    assert [TOKENIZER.decode([index for index in row if index != IGNORED]) for row in rows] == [
        pair.target for pair in PAIRS.heldout
    ]
    assert data.heldout_bytes == sum(len(pair.target.encode()) for pair in PAIRS.heldout)


def test_seq_len_and_target_len_cut_and_the_end_is_dropped_with_the_rest():
    data = seq2seq(seq_len=5, target_len=4)
    for batch in (data.batch(0, 20), *data.heldout_batches(4)):
        source, target_in = batch.inputs
        assert source.shape[1] == 5
        assert target_in.shape[1] == batch.labels.shape[1] == 3
        assert not (batch.labels == EOS).any()
    lengths = TOKENIZER.byte_lengths()
    scored = [TOKENIZER.encode(pair.target)[:3] for pair in PAIRS.heldout]
    assert data.heldout_bytes == sum(lengths[index] for ids in scored for index in ids)


def test_partial_seq2seq_pass_takes_pairs_from_all_over_and_at_most_so_many_tokens():
    data = seq2seq()
    for limit in (1, 20, 60, data.heldout_tokens):
        labels = [batch.labels for batch in data.heldout_batches(2, limit)]
        scored = sum(int((part != IGNORED).sum()) for part in labels)
        assert scored <= limit or len(labels) == labels[0].shape[0] == 1
    assert scored == data.heldout_tokens


@pytest.mark.parametrize("corpus", [Corpus((), PAIRS.heldout), Corpus(PAIRS.train, ())])
def test_seq2seq_without_pairs_is_refused(corpus):
    with pytest.raises(DataError, match=r"expected at least 1 pair .*, got 0"):
        seq2seq(corpus)


def test_padding_that_is_also_the_end_does_not_hide_the_end(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "pad_id", EOS)
    batch = seq2seq().batch(0, 20)
    assert ((batch.labels == EOS).sum(1) == 1).all()


def test_make_data_picks_by_task():
    assert isinstance(causal(), CausalData)
    assert isinstance(seq2seq(), Seq2SeqData)


def test_tokenizer_is_trained_on_the_training_split_alone():
    secret = Corpus(TRAIN, (Document("h", "zqzqzqzq " * 500),))
    made = load_or_train_tokenizer(DataConfig(), 400, secret)
    assert made.encode("zqzqzqzq") == load_or_train_tokenizer(DataConfig(), 400, CORPUS).encode("zqzqzqzq")
    assert len(made.encode("zqzqzqzq")) == 8


def test_tokenizer_of_pairs_knows_sources_and_targets():
    pairs = Corpus(tuple(Pair("p", f"source_{n} " * 9, f"target_{n} " * 9) for n in range(9)), PAIRS.heldout)
    made = load_or_train_tokenizer(DataConfig(task="seq2seq"), 320, pairs)
    assert len(made.encode("source")) < 4
    assert len(made.encode("target")) < 4


def test_tokenizer_file_is_used_and_must_fit_the_model(tmp_path):
    TOKENIZER.save(tmp_path / "t.json")
    config = DataConfig(tokenizer=str(tmp_path / "t.json"))
    assert load_or_train_tokenizer(config, 300, CORPUS).encode("value_1") == TOKENIZER.encode("value_1")
    with pytest.raises(ConfigError, match=r"at most model\.vocab_size = 299 ids, got 300") as caught:
        load_or_train_tokenizer(config, 299, CORPUS)
    assert caught.value.remedy == "--model.vocab-size 300"
    with pytest.raises(DataError, match=r"nowhere\.json"):
        load_or_train_tokenizer(DataConfig(tokenizer="nowhere.json"), 300, CORPUS)


def test_tokenizer_that_is_not_byte_level_is_refused_before_training(tmp_path):
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))  # noqa: S106
    backend.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    backend.save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"t\.json: expected byte-level BPE"):
        load_or_train_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")), 300, CORPUS)


def test_folder_to_batches_end_to_end(tmp_path):
    for number in range(12):
        (tmp_path / f"m{number}.py").write_text(
            f'def f{number}(x):\n    """Add {number}."""\n    return x + {number}\n'
        )
    for task in ("causal", "seq2seq"):
        config = DataConfig(source=str(tmp_path), task=task, holdout=0.3, seq_len=16)
        corpus = read_corpus(config)
        data = make_data(config, load_or_train_tokenizer(config, 280, corpus), corpus, 0)
        assert data.batch(0, 2).labels.shape[0] == 2
        assert sum(data.count_bytes(batch.labels) for batch in data.heldout_batches(8)) == data.heldout_bytes
