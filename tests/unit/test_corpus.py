"""Reading and splitting text: nothing leaks, nothing depends on its neighbours, every bad file is named."""

import ast
import contextlib
import json
import logging
import os
import sysconfig
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_model.core.errors import ConfigError, DataError
from apt_model.trainer import sources
from apt_model.trainer.config import DataConfig
from apt_model.trainer.corpus import Corpus, Document, Pair, _fraction, read_corpus
from apt_model.trainer.functions import documented_functions

FUNCTION = 'def f{0}(x):\n    """Add {0} to x.\n\n    More.\n    """\n    return x + {0}\n'


@pytest.fixture(scope="session")
def stdlib():
    return read_corpus(DataConfig())


@pytest.fixture
def small_stdlib(tmp_path, monkeypatch):
    """A folder that stands for the standard library, with everything in it that the real one has."""
    root = tmp_path / "lib" / "python"
    for name in ("a.py", "pkg/b.py", "pkg/test/c.py", "idlelib/idle_test/d.py", "test/e.py", "x/tests/f.py"):
        write(root / name, FUNCTION.format(1))
    write(root / "site-packages/g.py", "installed\n")
    write(root / "dist-packages/h.py", "installed\n")
    write(root / "__pycache__/i.py", "cached\n")
    write(root / "empty.py", " \n")
    write(root / "lib.so", "binary")
    write(root / "test/broken.py", "def f(:\n")
    (root / "test" / "latin1.py").write_bytes(b"# -*- coding: latin1 -*-\n# \xe9\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def folder_of(root, count, text="text of {}\n"):
    for number in range(count):
        write(root / f"f{number}.txt", text.format(number))
    return root


def jsonl(path, records):
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def names(corpus):
    return {item.name for item in corpus.train}, {item.name for item in corpus.heldout}


def read(source, **options):
    return read_corpus(DataConfig(source=str(source), **options))


# The standard library


def test_real_stdlib_is_complete_sorted_and_split_by_file(stdlib):
    train, heldout = names(stdlib)
    assert "argparse.py" in train | heldout
    assert "asyncio/tasks.py" in train | heldout
    assert not train & heldout
    assert 400 < len(train | heldout) < 1000
    assert sum(len(document.text) for document in stdlib.train) > 8_000_000
    assert not any("site-packages" in name or "/test/" in name for name in train | heldout)
    assert [document.name for document in stdlib.train] == sorted(train)


def test_stdlib_leaves_out_tests_caches_and_what_is_installed_beside_it(small_stdlib):
    assert set.union(*names(read_corpus(DataConfig()))) == {"a.py", "pkg/b.py"}


def test_include_tests_adds_the_test_suites(small_stdlib):
    found = set.union(*names(read_corpus(DataConfig(include_tests=True))))
    assert found == {
        *("a.py", "pkg/b.py", "pkg/test/c.py", "idlelib/idle_test/d.py", "test/e.py", "x/tests/f.py", "test/broken.py")
    }


def test_stdlib_files_that_are_not_utf8_are_counted_once_in_the_log(small_stdlib, caplog):
    with caplog.at_level(logging.INFO, logger=sources.__name__):
        read_corpus(DataConfig(include_tests=True))
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 9 files of the standard library are not UTF-8 and were left out"
    ]


def test_stdlib_pairs_skip_files_that_do_not_parse(small_stdlib):
    corpus = read_corpus(DataConfig(task="seq2seq", include_tests=True))
    assert len(corpus.train + corpus.heldout) == 6
    assert {pair.target for pair in corpus.train} == {"Add 1 to x."}


def test_stdlib_that_is_not_there_or_cannot_be_read_is_an_error(tmp_path, monkeypatch, small_stdlib):
    def denied(path):
        raise PermissionError(13, "denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(DataError, match=r"a\.py: cannot be read \(denied\)"):
        read_corpus(DataConfig())
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib" / "python" / "__pycache__")})
    write(tmp_path / "lib/python/__pycache__/i.py", "").unlink()
    with pytest.raises(DataError, match=r"expected the \.py files of Python's standard library, found none"):
        read_corpus(DataConfig())


# The split


def test_split_is_close_to_holdout_and_follows_it(tmp_path):
    folder_of(tmp_path, 400)
    shares = [len(read(tmp_path, holdout=holdout).heldout) / 400 for holdout in (0.04, 0.3, 0.9)]
    assert shares == pytest.approx([0.04, 0.3, 0.9], abs=0.05)


def test_split_of_a_file_does_not_depend_on_the_others_or_on_the_place(tmp_path):
    many = names(read(folder_of(tmp_path / "a", 60), holdout=0.3))
    few = names(read(folder_of(tmp_path / "elsewhere" / "b", 40), holdout=0.3))
    assert few[0] < many[0]
    assert few[1] < many[1]


def test_growing_holdout_never_gives_a_file_back(tmp_path):
    folder_of(tmp_path, 50)
    sides = [names(read(tmp_path, holdout=holdout))[1] for holdout in (0.1, 0.3, 0.6)]
    assert sides[0] < sides[1] < sides[2]


@pytest.mark.parametrize(("holdout", "expected"), [(1e-9, 1), (1 - 1e-9, 2)])
def test_neither_side_of_a_few_files_is_empty(tmp_path, holdout, expected):
    corpus = read(folder_of(tmp_path, 3), holdout=holdout)
    lowest = min((f"f{number}.txt" for number in range(3)), key=_fraction)
    assert len(corpus.heldout) == expected
    assert lowest in names(corpus)[1]


@settings(deadline=None)
@given(st.text())
def test_fraction_is_below_one_and_follows_from_the_name(name):
    name = name.encode("utf-8", "replace").decode()
    assert 0 <= _fraction(name) < 1
    assert _fraction(name) == _fraction(name)


def test_fraction_is_the_same_on_every_machine():
    # printf os.py | sha256sum begins with d9d7c69c64b6688c
    assert _fraction("os.py") == pytest.approx(0xD9D7C69C64B6688C / 2**64, abs=1e-15)


def test_name_that_is_not_utf8_is_taken(tmp_path):
    folder_of(tmp_path, 1)
    (tmp_path / os.fsdecode(b"\xe9.txt")).write_text("text\n")
    assert len(set.union(*names(read(tmp_path)))) == 2


# One file and folders


@settings(deadline=None)
@given(
    st.text(st.sampled_from("ab\n \u00e9"), min_size=1).filter(str.strip),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_one_file_is_cut_in_two_without_loss(tmp_path_factory, text, holdout):
    path = tmp_path_factory.mktemp("one") / "a.txt"
    path.write_bytes(text.encode())
    with contextlib.suppress(DataError):  # too short: tested by itself below
        corpus = read(path, holdout=holdout)
        assert corpus.train[0].text + corpus.heldout[0].text == text
        assert corpus.train[0].text.strip()
        assert corpus.heldout[0].text.strip()


@pytest.mark.parametrize("inside_a_folder", [False, True])
def test_one_file_is_cut_at_a_line_break(tmp_path, inside_a_folder):
    path = write(tmp_path / "a.txt", "".join(f"line {number:02}\r\n" for number in range(100)))
    corpus = read(tmp_path if inside_a_folder else path, holdout=0.104)
    assert corpus.heldout[0].text.startswith("line 89\r\n")
    assert corpus.heldout[0].text.endswith("line 99\r\n")
    assert names(corpus) == ({"a.txt"}, {"a.txt"})


def test_one_long_line_is_cut_within(tmp_path):
    corpus = read(write(tmp_path / "a.txt", "a" * 100), holdout=0.25)
    assert (len(corpus.train[0].text), len(corpus.heldout[0].text)) == (75, 25)


def test_one_letter_is_too_short(tmp_path):
    with pytest.raises(DataError, match=r"a\.txt: too short to hold out 4% of its 1 characters"):
        read(write(tmp_path / "a.txt", "a"))


def test_folder_takes_suffixes_below_it_and_nothing_hidden(tmp_path):
    for name in ("a.py", "b.MD", "sub/c.txt", "d.rst", "e.csv", ".git/f.txt", ".g.txt", "__pycache__/h.py", "i_txt"):
        write(tmp_path / name, "text\n")
    write(tmp_path / "blank.txt", "\n \n")
    assert set.union(*names(read(tmp_path))) == {"a.py", "b.MD", "sub/c.txt", "d.rst"}
    assert set.union(*names(read(tmp_path, suffixes="csv, .TXT"))) == {"e.csv", "sub/c.txt"}


def test_suffixes_that_name_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"DataConfig\.suffixes: expected endings"):
        read(folder_of(tmp_path, 2), suffixes=" , .")


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_folder_without_text_is_named_with_the_suffixes(tmp_path, text):
    if text is not None:
        write(tmp_path / "a.txt", text)
    with pytest.raises(DataError, match=r"no text in this folder \(. files end in \.txt, \.md\)") as caught:
        read(tmp_path, suffixes=".txt,.md")
    assert str(tmp_path) in str(caught.value)


def test_missing_empty_unreadable_and_foreign_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file or folder"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"empty\.txt: empty"):
        read(write(tmp_path / "empty.txt", " \n"))
    (tmp_path / "latin 1.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"latin 1\.txt: expected UTF-8 text, got byte 0xe9 at offset 3") as caught:
        read(tmp_path)
    assert "iconv" in caught.value.remedy
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"folder\.jsonl: cannot be read"):
        read(tmp_path / "folder.jsonl")


def test_link_to_nowhere_and_folder_that_may_not_be_listed_are_named(tmp_path, monkeypatch):
    folder_of(tmp_path, 2)
    (tmp_path / "z.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"z\.txt: no such file"):
        read(tmp_path)
    denied = PermissionError(13, "denied", str(tmp_path / "locked"))
    monkeypatch.setattr(os, "walk", lambda _, onerror: onerror(denied))
    with pytest.raises(DataError, match=r"locked: cannot be read \(denied\)"):
        read(tmp_path)


# JSON lines


def test_jsonl_texts_keep_everything_and_skip_blank_lines(tmp_path):
    texts = ["a\u2028b", "caf\u00e9\r\n", "<eos>", "x" * 9]
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts]
    path = write(tmp_path / "a.jsonl", "\ufeff" + "\r\n".join([*lines, "", '{"text": " "}', ""]))
    corpus = read(path)
    found = {item.name: item.text for item in corpus.train + corpus.heldout}
    assert found == {f"a.jsonl:{number}": text for number, text in enumerate(texts, start=1)}


def test_jsonl_records_that_are_equal_fall_on_the_same_side(tmp_path):
    records = [{"text": f"text {number % 20}"} for number in range(100)]
    corpus = read(jsonl(tmp_path / "a.jsonl", records), holdout=0.3)
    train, heldout = ({item.text for item in side} for side in (corpus.train, corpus.heldout))
    assert not train & heldout
    assert len(corpus.train) + len(corpus.heldout) == 100
    shuffled = read(jsonl(tmp_path / "b.jsonl", [{"text": "new"}, *reversed(records)]), holdout=0.3)
    assert heldout <= {item.text for item in shuffled.heldout}


def test_jsonl_pairs_split_by_their_source(tmp_path):
    records = [{"source": f"s{number % 20}", "target": f"t{number}"} for number in range(60)]
    corpus = read(jsonl(tmp_path / "a.jsonl", records), task="seq2seq", holdout=0.3)
    assert not {pair.source for pair in corpus.train} & {pair.source for pair in corpus.heldout}
    assert Pair("a.jsonl:1", "s0", "t0") in corpus.train + corpus.heldout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"bad\.jsonl:2: expected JSON, got '\{\"text\": \"cut'"),
        ("[" * 100_000, r"bad\.jsonl:2: expected JSON"),
        ('["text"]', r"bad\.jsonl:2: expected an object, got list"),
        ('{"txt": "a"}', r"bad\.jsonl:2: expected text under the key 'text', got 'txt'"),
        ("{}", r"bad\.jsonl:2: expected text under the key 'text', got no keys"),
        ('{"text": 3}', r"bad\.jsonl:2: expected text under the key 'text', got int"),
        ('{"text": "\\ud800"}', r"bad\.jsonl:2: 'text' holds half of a surrogate pair"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", '{"text": "good"}\n' + line + '\n{"text": "good too"}\n')
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert '{"text": "..."}' in caught.value.remedy


def test_jsonl_without_records_or_without_two_that_differ_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl: empty"):
        read(write(tmp_path / "a.jsonl", "\n"))
    with pytest.raises(DataError, match="at least 2 different records, so that one can be held out, got 1"):
        read(jsonl(tmp_path / "a.jsonl", [{"text": "same"}] * 5))
    with pytest.raises(DataError, match=r"a\.jsonl:1: expected text under 'source' and 'target', got an empty one"):
        read(jsonl(tmp_path / "a.jsonl", [{"source": " ", "target": "t"}]), task="seq2seq")


# Pairs out of Python


def test_task_decides_between_documents_and_pairs(tmp_path):
    for number in range(4):
        write(tmp_path / f"m{number}.py", FUNCTION.format(number))
    write(tmp_path / "notes.txt", "not Python\n")
    causal, seq2seq = read(tmp_path), read(tmp_path, task="seq2seq")
    assert isinstance(causal, Corpus)
    assert all(isinstance(item, Document) for item in causal.train)
    assert "notes.txt" in set.union(*names(causal))
    found = {pair.name: pair for pair in seq2seq.train + seq2seq.heldout}
    assert found["m3.py:1"] == Pair("m3.py:1", "def f3(x):\n    return x + 3", "Add 3 to x.")
    assert len(found) == 4


def test_pairs_of_one_file_stay_together(tmp_path):
    for number in range(30):
        write(tmp_path / f"m{number}.py", FUNCTION.format(1) + FUNCTION.format(2))
    corpus = read(tmp_path, task="seq2seq", holdout=0.3)
    sides = [{pair.name.split(":")[0] for pair in side} for side in (corpus.train, corpus.heldout)]
    assert not sides[0] & sides[1]


def test_seq2seq_from_what_holds_no_pairs_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"a\.py: expected pairs for the task 'seq2seq', got one file of text"
    ) as caught:
        read(write(tmp_path / "a.py", FUNCTION.format(1)), task="seq2seq")
    assert '{"source": ..., "target": ...}' in caught.value.remedy
    with pytest.raises(DataError, match=r"pairs \(in Python: functions with a docstring\) in at least 2 files.*got 1"):
        read(tmp_path, task="seq2seq")


def test_users_file_that_is_not_python_is_named_with_its_line(tmp_path):
    write(tmp_path / "a.py", FUNCTION.format(1))
    write(tmp_path / "old.py", "x = 1\nprint 'x'\n")
    with pytest.raises(DataError, match=r"old\.py:2: not Python"):
        read(tmp_path, task="seq2seq")


@pytest.mark.parametrize(
    ("text", "source", "summary"),
    [
        ('def f(): "Doc."; return 1\n', "def f(): return 1", "Doc."),
        ('def f():\n    "Doc."; return 1\n', "def f():\n    return 1", "Doc."),
        ('def f():\n    """Doc."""  # why\n    return 1\n', "def f():\n    # why\n    return 1", "Doc."),
        ('@decorated\ndef f():  # note\n    """\n    Doc.\n    """\n', "def f():  # note", "Doc."),
        ('async def f():\r\n    """Doc."""\r\n    return 1\r\n', "async def f():\r\n    return 1", "Doc."),
        ('class A:\n\tdef f(self):\n\t\t"""D\u00f6c."""\n\n\t\treturn """\na"""\n', None, "D\u00f6c."),
        ('\ufeffdef f():\n    """Doc."""\n    return "\u00e9"\n', 'def f():\n    return "\u00e9"', "Doc."),
        ('def f():\n    ("Doc.")\n    return 1\n', "def f():\n    return 1", "Doc."),
        ('\x0c\ndef f():\n    """Doc."""\n    return "\u2028"\n', 'def f():\n    return "\u2028"', "Doc."),
        ('def f():\n    "\\ud800 half"\n', "def f():", "? half"),
        ('def f():\n    "\\d"\n', "def f():", "\\d"),
    ],
)
def test_function_loses_its_docstring_and_its_indentation(text, source, summary):
    [(_, found, target)] = documented_functions(text)
    assert target == summary
    assert found == (source if source is not None else 'def f(self):\n\n\treturn """\na"""')


@pytest.mark.parametrize("text", ["", "def f():\n    pass\n", 'def f():\n    " "\n', 'class A:\n    """Doc."""\n'])
def test_what_has_no_docstring_is_no_pair(text):
    assert list(documented_functions(text)) == []


def test_nested_functions_come_too_in_order():
    text = 'def g():\n    """Outer."""\n    def h():\n        """Inner."""\n        return 1\n' + FUNCTION.format(2)
    assert [(line, target) for line, _, target in documented_functions(text)] == [
        (1, "Outer."),
        (3, "Inner."),
        (6, "Add 2 to x."),
    ]


@pytest.mark.parametrize("text", ["def f(:\n", "x = '\x00'\n", "(" * 5000])
def test_what_does_not_parse_is_a_syntax_error(text):
    with pytest.raises(SyntaxError):
        list(documented_functions(text))


@pytest.mark.parametrize("module", [textwrap, json, ast])
def test_sources_of_real_functions_parse_to_the_same_code_without_the_docstring(module):
    text = Path(module.__file__).read_text()
    nodes = {node.lineno: node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    pairs = [pair for pair in documented_functions(text) if len(nodes[pair[0]].body) > 1]
    assert pairs
    for line, source, _ in pairs:
        node = nodes[line]
        node.body, node.decorator_list = node.body[1:], []
        assert ast.dump(ast.parse(source).body[0]) == ast.dump(node)
