"""The tokenizer: every text comes back whole, and damaged or foreign files are named."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from apt_model.core.errors import ConfigError, DataError, InputError
from apt_model.modeling.tokenizer import Tokenizer, pieces

TEXTS = ["def f(x):\n    return x + 1\n", "the <eos> of a text\r\n", "na\u00efve caf\u00e9 \u4f60\u597d\n"] * 20
TOKENIZER = Tokenizer.train(TEXTS, 300)
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)))
WITH_SPECIALS = st.lists(st.sampled_from(["<pad>", "<bos>", "<eos>", " ", "a", "\n", "\u00e9"])).map("".join)


def foreign(*specials, byte_level=True, model=None):
    """A tokenizer file as another project would write it."""
    if model is None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        model = models.BPE({letter: index for index, letter in enumerate(alphabet)}, [])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if byte_level:
        backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    return backend


@settings(deadline=None)
@given(ANY_TEXT | WITH_SPECIALS)
def test_any_text_comes_back_whole_and_never_becomes_a_special_token(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, skip_special=False) == text
    assert not {TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id} & set(ids)
    assert sum(TOKENIZER.byte_lengths()[index] for index in ids) == len(text.encode())


def test_every_single_byte_has_a_token_of_length_one():
    lengths = TOKENIZER.byte_lengths()
    assert lengths[:3] == [0, 0, 0]
    assert lengths[3:259] == [1] * 256
    assert len(lengths) == TOKENIZER.vocab_size
    assert max(lengths) > 1


def test_special_ids_are_fixed_and_are_skipped_or_spelled():
    assert (TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id) == (0, 1, 2)
    ids = [1, *TOKENIZER.encode("text"), 2, 0]
    assert TOKENIZER.decode(ids) == "text"
    assert TOKENIZER.decode(ids, skip_special=False) == "<bos>text<eos><pad>"


def test_batch_is_the_same_as_one_by_one():
    assert TOKENIZER.encode_batch(TEXTS[:3]) == [TOKENIZER.encode(text) for text in TEXTS[:3]]
    assert TOKENIZER.encode_batch([]) == []


def test_training_is_deterministic_and_survives_a_file(tmp_path):
    again = Tokenizer.train(iter(TEXTS), 300)
    TOKENIZER.save(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    loaded = Tokenizer.load(tmp_path / "a.json")
    assert loaded.encode("a <eos> text\n") == TOKENIZER.encode("a <eos> text\n")
    assert loaded.vocab_size == TOKENIZER.vocab_size == 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_smallest_vocabulary_is_bytes_alone_and_a_smaller_one_is_refused():
    assert Tokenizer.train(TEXTS, 259).vocab_size == 259
    with pytest.raises(ConfigError, match=r"vocab_size: expected at least 259 .*, got 258"):
        Tokenizer.train(TEXTS, 258)


def test_little_text_gives_fewer_tokens_than_asked_for():
    assert Tokenizer.train(["ab"], 1000).vocab_size < 300


@settings(deadline=None)
@given(ANY_TEXT, st.integers(1, 9))
def test_pieces_are_the_text_and_none_is_too_long(text, limit):
    cut = list(pieces(text, limit))
    assert "".join(cut) == text
    assert all(0 < len(piece) <= limit for piece in cut)


def test_pieces_end_at_line_breaks_where_there_are_any():
    assert list(pieces("ab\ncd\nefghijk", 7)) == ["ab\ncd\n", "efghijk"]
    assert list(pieces("abcdefgh", 3)) == ["abc", "def", "gh"]


@pytest.mark.parametrize("text", ["\ud800", 3, None])
def test_what_is_not_text_is_an_input_error(text):
    with pytest.raises(InputError, match="expected strings"):
        TOKENIZER.encode(text)


@pytest.mark.parametrize("ids", [[-1], ["a"]])
def test_what_is_no_id_is_an_input_error(ids):
    with pytest.raises(InputError, match="expected ids from 0 on"):
        TOKENIZER.decode(ids)


def test_ids_beyond_the_vocabulary_decode_to_nothing():
    assert TOKENIZER.decode([10**6, *TOKENIZER.encode("a")]) == "a"


@pytest.mark.parametrize("content", ['{"version": "1.0", "added_tok', "", "\x00\x01", "[1, 2]", "null", '{"a": 1}'])
def test_truncated_and_foreign_files_are_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: .*JSON"):
        Tokenizer.load(path)


def test_missing_file_and_file_that_is_not_utf8_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read"):
        Tokenizer.load(tmp_path / "nowhere.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match=r"binary\.json: expected JSON"):
        Tokenizer.load(tmp_path / "binary.json")


@pytest.mark.parametrize(
    "names", [("<|endoftext|>",), ("<pad>", "<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>")]
)
def test_foreign_special_tokens_are_found_by_their_usual_names(tmp_path, names):
    foreign(*names).save(str(tmp_path / "t.json"))
    loaded = Tokenizer.load(tmp_path / "t.json")
    text = f"a {names[0]} b"
    ids = loaded.encode(text)
    assert loaded.decode(ids) == text
    assert not {loaded.pad_id, loaded.bos_id, loaded.eos_id} & set(ids)
    assert loaded.decode([loaded.bos_id, loaded.eos_id], skip_special=False) == (names * 2)[-2] + names[-1]
    assert loaded.byte_lengths()[loaded.eos_id] == 0


def test_foreign_file_without_special_tokens_is_refused(tmp_path):
    foreign("<unusual>").save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"t\.json: expected a pad token under one of"):
        Tokenizer.load(tmp_path / "t.json")


def test_foreign_truncation_and_padding_are_switched_off(tmp_path):
    backend = foreign("<|endoftext|>")
    backend.enable_truncation(2)
    backend.enable_padding(length=2)
    backend.save(str(tmp_path / "t.json"))
    assert json.loads((tmp_path / "t.json").read_text())["truncation"]
    assert [len(ids) for ids in Tokenizer.load(tmp_path / "t.json").encode_batch(["a", "abcd"])] == [1, 4]


def test_added_tokens_that_are_text_have_their_own_size(tmp_path):
    backend = foreign("<|endoftext|>")
    backend.add_tokens(["\u00e9\u00e9"])
    backend.save(str(tmp_path / "t.json"))
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert [loaded.byte_lengths()[index] for index in loaded.encode("\u00e9\u00e9a")] == [4, 1]


@pytest.mark.parametrize(
    "options",
    [{"byte_level": False}, {"model": models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")}],  # noqa: S106
)
def test_byte_lengths_of_a_tokenizer_that_loses_text_are_refused(options):
    with pytest.raises(DataError, match="expected byte-level BPE with all 256 bytes"):
        Tokenizer(foreign("<|endoftext|>", **options)).byte_lengths()
