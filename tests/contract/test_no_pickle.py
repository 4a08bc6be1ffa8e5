"""No file of ours can run code when it is read: nothing is pickled."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "apt_model"
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def pickling(source: str) -> Iterator[int]:
    """Lines of `source` that pickle or unpickle."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names) if any(alias.name.partition(".")[0] in PICKLERS for alias in names):
                yield node.lineno
            case ast.ImportFrom(module=str(module), names=names):
                unsafe = module == "torch" and any(alias.name in ("load", "save") for alias in names)
                if module.partition(".")[0] in PICKLERS or unsafe:
                    yield node.lineno
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords):
                if not any(word.arg == "weights_only" and _is_true(word.value) for word in keywords):
                    yield node.lineno
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="save")):
                yield node.lineno
            case ast.keyword(arg="allow_pickle", value=value) if _is_true(value):
                yield node.value.lineno


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def test_nothing_is_pickled():
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if (lines := list(pickling(path.read_text(encoding="utf-8"))))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import shelve as s",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.save(state, path)",
        "from torch import load",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
    ],
)
def test_it_can_fail(source):
    assert list(pickling(source))


@pytest.mark.parametrize("source", ["import torch\ntorch.load(path, weights_only=True)", "tokenizer.save(path)"])
def test_it_lets_others_pass(source):
    assert not list(pickling(source))
