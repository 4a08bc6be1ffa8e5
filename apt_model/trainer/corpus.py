"""Text for training and text held out from it. Imports no torch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from apt_model.core.errors import DataError
from apt_model.trainer.config import DataConfig
from apt_model.trainer.functions import documented_functions
from apt_model.trainer.sources import TextFile, read_folder, read_records, read_stdlib, read_text

STDLIB = "stdlib"


@dataclass(frozen=True)
class Document:
    """One text. `name` says where it came from."""

    name: str
    text: str


@dataclass(frozen=True)
class Pair:
    """A text and what to make of it. `name` says where it came from ('file:line')."""

    name: str
    source: str
    target: str


Item = TypeVar("Item", Document, Pair)


@dataclass(frozen=True)
class Corpus(Generic[Item]):
    """What is trained on, and what is kept for evaluation; neither is empty."""

    train: tuple[Item, ...]
    heldout: tuple[Item, ...]


def read_corpus(config: DataConfig) -> Corpus[Document] | Corpus[Pair]:
    """Read `config.source` and split it: documents for the task 'causal', pairs for 'seq2seq'.

    Files are split whole, by a hash of their name relative to the source; records of a .jsonl file by a hash of their
    text (of the source in a pair), so that equal ones fall on the same side. Neither depends on what else is there.

    Raises:
        DataError: a file is missing, unreadable, not UTF-8, empty or not in the expected form, or there is too little
            to split.
    """
    if config.source != STDLIB and config.source.lower().endswith(".jsonl"):
        return _from_records(Path(config.source).expanduser(), config)
    files = _read_files(config)
    if config.task == "seq2seq":
        return _from_functions(files, config)
    documents = [Document(*file) for file in files if file.text.strip()]
    if len(documents) == 1:
        return _cut(documents[0], config.holdout)
    return _split([(document.name, document) for document in documents], config)


def _read_files(config: DataConfig) -> list[TextFile]:
    if config.source == STDLIB:
        return read_stdlib(include_tests=config.include_tests)
    path = Path(config.source).expanduser()
    if path.is_dir():
        return read_folder(path, config.suffixes)
    file = TextFile(path.name, read_text(path))
    if not file.text.strip():
        raise DataError(f"{path}: empty", remedy="give --data.source a file with text in it")
    if config.task == "seq2seq":
        raise DataError(
            f"{path}: expected pairs for the task 'seq2seq', got one file of text",
            remedy='give a .jsonl file of {"source": ..., "target": ...}, a folder of .py files, or stdlib',
        )
    return [file]


def _from_records(path: Path, config: DataConfig) -> Corpus[Document] | Corpus[Pair]:
    if config.task == "causal":
        documents = [Document(name, *values) for name, values in read_records(path, ("text",))]
        return _split([(document.text, document) for document in documents if document.text.strip()], config)
    pairs = [Pair(name, *values) for name, values in read_records(path, ("source", "target"))]
    for pair in pairs:
        if not (pair.source.strip() and pair.target.strip()):
            raise DataError(
                f"{path.parent / pair.name}: expected text under 'source' and 'target', got an empty one",
                remedy="remove the line",
            )
    return _split([(pair.source, pair) for pair in pairs], config)


def _from_functions(files: Sequence[TextFile], config: DataConfig) -> Corpus[Pair]:
    keyed = []
    for file in files:
        if not file.name.lower().endswith(".py"):
            continue
        try:
            found = list(documented_functions(file.text))
        except SyntaxError as error:
            if config.source == STDLIB:  # its test suites hold such files on purpose
                continue
            raise DataError(
                f"{Path(config.source) / file.name}:{error.lineno}: not Python {error.msg!r}",
                remedy="correct or remove the file, or give the pairs as a .jsonl file",
            ) from error
        keyed += [(file.name, Pair(f"{file.name}:{line}", source, target)) for line, source, target in found]
    return _split(keyed, config)


def _fraction(key: str) -> float:
    """A number in [0, 1) that follows from `key` alone."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()  # names of files need not be UTF-8
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits: a double holds them without rounding up to 1


def _split(keyed: Sequence[tuple[str, Item]], config: DataConfig) -> Corpus[Item]:
    """Items by their keys: equal keys fall on the same side."""
    fractions = [_fraction(key) for key, _ in keyed]
    distinct = sorted(set(fractions))
    if len(distinct) < 2:
        unit = "different records" if config.source.lower().endswith(".jsonl") else "files with something to learn from"
        kind = "texts" if config.task == "causal" else "pairs (in Python: functions with a docstring)"
        raise DataError(
            f"{config.source}: expected {kind} in at least 2 {unit}, so that one can be held out, got {len(distinct)}",
            remedy="give more of them with --data.source",
        )
    # With few files a side could come out empty: hold out the lowest hash at least, and never the highest.
    limit = min(max(config.holdout, distinct[1]), distinct[-1])
    sides: dict[bool, list[Item]] = {False: [], True: []}
    for fraction, (_, item) in zip(fractions, keyed, strict=True):
        sides[fraction < limit].append(item)
    return Corpus(train=tuple(sides[False]), heldout=tuple(sides[True]))


def _cut(document: Document, holdout: float) -> Corpus[Document]:
    """One text in two: its last `holdout` share is held out, from a line break on where there is one."""
    text = document.text
    share = int(len(text) * (1 - holdout))
    at = text.rfind("\n", 0, share) + 1 or text.find("\n", share) + 1
    if not 0 < at < len(text):
        at = min(max(share, 1), len(text) - 1)
    train, heldout = text[:at], text[at:]
    if not (train.strip() and heldout.strip()):
        raise DataError(
            f"{document.name}: too short to hold out {holdout:.0%} of its {len(text)} characters",
            remedy="give more text with --data.source",
        )
    return Corpus(train=(Document(document.name, train),), heldout=(Document(document.name, heldout),))
