"""Text to token ids and back: byte-level BPE over the `tokenizers` library, so that every text comes back whole."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from apt_model.core.errors import DataError, InputError
from apt_model.core.files import write_text
from apt_model.core.options import require

TOKENIZER_FILE = "tokenizer.json"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
# What the same tokens are called elsewhere, most specific first: a file of GPT-2 has one token for all three.
_NAMES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>"),
    "bos": ("<bos>", "<s>", "<|begin_of_text|>", "[CLS]", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "[SEP]", "<|endoftext|>"),
}
_PIECE = 1 << 20


def pieces(text: str, limit: int = _PIECE) -> Iterator[str]:
    """Cut `text` into parts of at most `limit` characters, after a line break where there is one.

    The library keeps tens of bytes of notes for each byte of a string while it works on it, and one thread for one
    string: a file of gigabytes must reach it in parts. Their tokens one after another are a valid encoding of the text.
    """
    start = 0
    while start < len(text):
        end = min(start + limit, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


class Tokenizer:
    """Byte-level BPE. Text is data: a literal '<eos>' in it is five characters, never the special token.

    Make one with `train` or `load`. Files of other projects are taken when they name a padding, a start and an end
    token in one of the usual ways; those that are not byte-level can encode, but `byte_lengths` refuses them.
    """

    def __init__(self, backend: tokenizers.Tokenizer, origin: str = "the tokenizer") -> None:
        # Files of other projects may say to cut or fill every text to one length.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # as the library calls it: encode their spelling like any other text
        self._backend = backend
        self._origin = origin
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.pad_id, self.bos_id, self.eos_id = (_find(vocabulary, kind, origin) for kind in _NAMES)
        self.vocab_size = 1 + max(vocabulary.values())
        """One more than the highest id, which a model's vocab_size must reach."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn merges from `texts`; the same texts give the same tokenizer. Little text gives fewer than `vocab_size`.

        Ids: 0 `<pad>`, 1 `<bos>`, 2 `<eos>`, then the 256 bytes, then merges, most frequent first.
        """
        smallest = len(SPECIAL_TOKENS) + 256
        require(
            vocab_size >= smallest,
            "vocab_size",
            f"at least {smallest} (256 bytes and {len(SPECIAL_TOKENS)} special tokens)",
            vocab_size,
            f"--model.vocab-size {smallest} or more",
        )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json. Raises `DataError` that names the file when it is not one, or lacks special tokens."""
        remedy = "give a tokenizer.json as `tokenizers` or `Tokenizer.save` writes it, or none to train one"
        try:
            text = Path(path).read_text(encoding="utf-8")
            json.loads(text)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})", remedy=remedy) from error
        except ValueError as error:
            raise DataError(f"{path}: expected JSON, got a damaged or foreign file ({error})", remedy=remedy) from error
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path}: JSON, but not of a tokenizer ({error})", remedy=remedy) from error
        return cls(backend, str(path))

    def save(self, path: Path) -> None:
        """Write tokenizer.json, whole or not at all."""
        write_text(path, self._backend.to_str(pretty=True))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, in parallel. Raises `InputError` for what is not text or has no UTF-8."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:
            raise InputError("encode: expected strings of whole characters (no half of a surrogate pair)") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids beyond the vocabulary nothing.

        With `skip_special=False` special tokens are spelled out.
        """
        try:
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))
        except (OverflowError, TypeError) as error:
            raise InputError(f"decode: expected ids from 0 on, got {ids!r:.60}") from error

    def byte_lengths(self) -> list[int]:
        """UTF-8 bytes that each id stands for, by id; 0 for special tokens. Their sum over a text is its size.

        Raises `DataError` when the tokenizer is not byte-level: its tokens have no fixed size.
        """
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if not (isinstance(self._backend.decoder, decoders.ByteLevel) and vocabulary.keys() >= set(alphabet)):
            raise DataError(
                f"{self._origin}: expected byte-level BPE with all 256 bytes, as GPT-2, Llama 3 and Qwen use, got "
                f"{type(self._backend.model).__name__} with {type(self._backend.decoder).__name__}: bits per byte "
                "would have no meaning",
                remedy="leave --data.tokenizer out to train one",
            )
        lengths = [0] * self.vocab_size
        for token, index in vocabulary.items():
            lengths[index] = len(token)  # in the byte-level alphabet a character is a byte
        for index, added in self._backend.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return lengths


def _find(vocabulary: dict[str, int], kind: str, origin: str) -> int:
    for name in _NAMES[kind]:
        if name in vocabulary:
            return vocabulary[name]
    raise DataError(
        f"{origin}: expected a {kind} token under one of the names {', '.join(_NAMES[kind])}, found none",
        remedy="add it to the file, or leave --data.tokenizer out to train one",
    )
