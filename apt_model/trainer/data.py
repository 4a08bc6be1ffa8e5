"""Batches of token ids, each a pure function of seed and index, and passes over what was held out.

Letters: B sequences in a batch, T positions that predict, S positions of a source, N tokens of a split.
"""

import abc
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from apt_model.core.errors import DataError
from apt_model.core.options import require
from apt_model.modeling.tokenizer import Tokenizer, pieces
from apt_model.trainer.config import DataConfig
from apt_model.trainer.corpus import Corpus, Document, Pair

IGNORED = -100
"""The label of a position where there is nothing to predict (`cross_entropy` leaves it out by default)."""
_GROUP = 4_000_000  # characters given to the tokenizer at once: enough for its threads, little beside the text


class Batch(NamedTuple):
    """What the model is called with, and what it should predict."""

    inputs: tuple[Tensor, ...]
    """causal: (ids [B, T],); seq2seq: (source [B, S], target_in [B, T]); int64."""
    labels: Tensor
    """[B, T] int64, `IGNORED` where there is nothing to predict."""


class TokenData(abc.ABC):
    """Training batches by number, held-out batches in order, and bytes for bits per byte. Tensors lie on the CPU."""

    tokenizer: Tokenizer
    """What turned the text into ids."""
    heldout_bytes: int
    """UTF-8 bytes of what a full pass over `heldout_batches` predicts."""
    heldout_tokens: int
    """Labels in such a pass."""
    train_tokens: int
    """Tokens to learn from."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, seed: int) -> None:
        self.tokenizer = tokenizer
        self._config = config
        self._seed = seed
        self._bytes = torch.tensor(tokenizer.byte_lengths())  # [vocab_size]

    @abc.abstractmethod
    def batch(self, index: int, batch_size: int) -> Batch:
        """Training batch number `index`: the same whenever and in whatever order it is asked for."""

    @abc.abstractmethod
    def heldout_batches(self, batch_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
        """Every held-out token once as a label; with `max_tokens` at most so many, spread over the whole of it."""

    def count_bytes(self, labels: Tensor) -> int:
        """UTF-8 bytes of the tokens in `labels`, which may lie on any device; special tokens count none."""
        return int(self._bytes[labels[labels != IGNORED].cpu()].sum())

    def _draw(self, index: int, high: int, count: int) -> Tensor:
        """`count` numbers below `high`, from a generator of their own, so that a resumed run needs no state."""
        digest = hashlib.sha256(f"{self._seed}:{index}".encode()).digest()
        # torch's CPU generator takes 32 bits of a seed: two of many batches may agree, as they may by chance anyway.
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        return torch.randint(high, (count,), generator=generator)


class CausalData(TokenData):
    """Windows of `seq_len` tokens out of documents laid end to end, each followed by the end token."""

    def __init__(self, corpus: Corpus[Document], tokenizer: Tokenizer, config: DataConfig, *, seed: int) -> None:
        super().__init__(tokenizer, config, seed)
        self._train = _stream(tokenizer, (document.text for document in corpus.train))  # [N]
        heldout = _stream(tokenizer, (document.text for document in corpus.heldout))  # [N]
        self._heldout = torch.cat([torch.tensor([tokenizer.eos_id], dtype=torch.int32), heldout])  # [1 + N]
        self.heldout_bytes = sum(len(document.text.encode()) for document in corpus.heldout)
        self.heldout_tokens = len(heldout)
        self.train_tokens = len(self._train)
        _need(config, config.seq_len + 1, self.train_tokens, "tokens to train on (seq_len + 1)")
        _need(config, 1, self.heldout_bytes, "byte held out")

    def batch(self, index: int, batch_size: int) -> Batch:
        """Random windows; neighbouring positions are neighbours in the text, across documents too."""
        starts = self._draw(index, self.train_tokens - self._config.seq_len, batch_size)  # [B]
        at = starts[:, None] + torch.arange(self._config.seq_len)  # [B, T]
        return Batch((self._train[at].long(),), self._train[at + 1].long())

    def heldout_batches(self, batch_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
        """Windows that overlap by half: only tokens not scored before have labels, with half a window before them.

        The first window has less before it; its first token is predicted from the end token. All rows are as wide.
        """
        length = min(self._config.seq_len, self.heldout_tokens)
        left = self.heldout_tokens if max_tokens is None else min(max_tokens, self.heldout_tokens)
        windows = _thin(_windows(self.heldout_tokens, length), length, left)  # [W, 2]
        for row in range(0, len(windows), batch_size):
            start, first = windows[row : row + batch_size].T[..., None]  # [B, 1] each
            at = start + torch.arange(length)  # [B, T]
            scored = at >= first
            scored &= scored.flatten().cumsum(0).view_as(scored) <= left
            left -= int(scored.sum())
            labels = self._heldout[at + 1].long().masked_fill(~scored, IGNORED)
            yield Batch((self._heldout[at].long(),), labels)


class Seq2SeqData(TokenData):
    """Pairs: a source of at most `seq_len` tokens, and start + target + end of at most `target_len`."""

    def __init__(self, corpus: Corpus[Pair], tokenizer: Tokenizer, config: DataConfig, *, seed: int) -> None:
        super().__init__(tokenizer, config, seed)
        self._train = self._encode_pairs(corpus.train)
        self._heldout = self._encode_pairs(corpus.heldout)
        self.heldout_bytes = sum(self.count_bytes(target) for _, target in self._heldout)
        self.heldout_tokens = sum(len(target) - 1 for _, target in self._heldout)
        self.train_tokens = sum(len(source) + len(target) - 1 for source, target in self._train)
        _need(config, 1, len(self._train), "pair to train on")
        _need(config, 1, len(self._heldout), "pair held out")

    def batch(self, index: int, batch_size: int) -> Batch:
        """Random pairs, padded to the longest of them."""
        return self._pad([self._train[at] for at in self._draw(index, len(self._train), batch_size).tolist()])

    def heldout_batches(self, batch_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
        """Each held-out pair once, in order; `max_tokens` counts target tokens, and one pair comes at least."""
        limit = max_tokens or self.heldout_tokens
        chosen: list[tuple[Tensor, Tensor]] = []
        left = limit
        for pair in self._heldout[:: -(-self.heldout_tokens // limit)]:
            left -= len(pair[1]) - 1
            if chosen and left < 0:
                break
            chosen.append(pair)
        for start in range(0, len(chosen), batch_size):
            yield self._pad(chosen[start : start + batch_size])

    def _encode_pairs(self, pairs: tuple[Pair, ...]) -> list[tuple[Tensor, Tensor]]:
        bos, eos = (torch.tensor([index]) for index in (self.tokenizer.bos_id, self.tokenizer.eos_id))
        sources = _encode(self.tokenizer, (pair.source for pair in pairs))
        targets = _encode(self.tokenizer, (pair.target for pair in pairs))
        return [
            (source[: self._config.seq_len].clone(), torch.cat([bos, target, eos])[: self._config.target_len].clone())
            for source, target in zip(sources, targets, strict=True)
        ]

    def _pad(self, pairs: list[tuple[Tensor, Tensor]]) -> Batch:
        def stack(rows: list[Tensor], fill: int) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=fill).long()

        pad = self.tokenizer.pad_id
        source_BS = stack([source for source, _ in pairs], pad)
        target_BT = stack([target[:-1] for _, target in pairs], pad)
        # The label of padding is set by length and not by id: with some tokenizers padding and the end share one.
        return Batch((source_BS, target_BT), stack([target[1:] for _, target in pairs], IGNORED))


def make_data(config: DataConfig, tokenizer: Tokenizer, corpus: Corpus[Any], seed: int) -> TokenData:
    """The data of `config.task`; `corpus` is what `read_corpus` gave for the same `config`."""
    kind = CausalData if config.task == "causal" else Seq2SeqData
    return kind(corpus, tokenizer, config, seed=seed)


def load_or_train_tokenizer(config: DataConfig, vocab_size: int, corpus: Corpus[Any]) -> Tokenizer:
    """The tokenizer of `config`, or one trained on the training split (sources and targets of pairs).

    Raises:
        ConfigError: the file's tokenizer has more ids than the model's `vocab_size`.
        DataError: the file cannot be read, or is not byte-level.
    """
    if config.tokenizer is None:
        return Tokenizer.train((text for item in corpus.train for text in _texts(item)), vocab_size)
    tokenizer = Tokenizer.load(Path(config.tokenizer).expanduser())
    require(
        tokenizer.vocab_size <= vocab_size,
        "DataConfig.tokenizer",
        f"a tokenizer of at most model.vocab_size = {vocab_size} ids",
        tokenizer.vocab_size,
        f"--model.vocab-size {tokenizer.vocab_size}",
    )
    tokenizer.byte_lengths()  # what the evaluation would refuse is refused before training
    return tokenizer


def _texts(item: Document | Pair) -> tuple[str, ...]:
    return (item.text,) if isinstance(item, Document) else (item.source, item.target)


def _need(config: DataConfig, least: int, got: int, what: str) -> None:
    if got < least:
        raise DataError(
            f"{config.source}: expected at least {least} {what}, got {got}",
            remedy="give more text with --data.source, or take shorter windows with --data.seq-len",
        )


def _windows(total: int, length: int) -> Tensor:
    """[W, 2] start of each window over `total` labels, and the first label that no window before it holds."""
    starts = [*range(0, total - length, max(1, length // 2)), total - length]  # the last one ends with the text
    firsts = [0, *(start + length for start in starts[:-1])]
    return torch.tensor([starts, firsts]).T


def _thin(windows: Tensor, length: int, labels: int) -> Tensor:
    """As few of the windows, evenly spread, as hold `labels`: the first has `length` of them, others half of that."""
    count = min(len(windows), 1 + max(0, -((length - labels) // max(1, length // 2))))
    return windows[torch.arange(count) * len(windows) // count]


def _stream(tokenizer: Tokenizer, texts: Iterable[str]) -> Tensor:
    """[N] int32: the tokens of all texts, each followed by the end token."""
    end = torch.tensor([tokenizer.eos_id], dtype=torch.int32)
    parts = [part for ids in _encode(tokenizer, texts) for part in (ids, end)]
    return torch.cat(parts) if parts else end[:0]


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[Tensor]:
    """The tokens of each text, int32; the tokenizer sees many texts at once, and parts of long ones."""
    parts: list[Tensor] = []
    for group in _groups(texts):
        for ids, (_, is_last) in zip(tokenizer.encode_batch([piece for piece, _ in group]), group, strict=True):
            parts.append(torch.tensor(ids, dtype=torch.int32))
            if is_last:
                yield torch.cat(parts)
                parts = []


def _groups(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of texts, each with whether it ends its text, in groups of about `_GROUP` characters."""
    group: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        cut = list(pieces(text)) or [""]
        for number, piece in enumerate(cut, start=1):
            group.append((piece, number == len(cut)))
            size += len(piece)
            if size >= _GROUP:
                yield group
                group, size = [], 0
    if group:
        yield group
