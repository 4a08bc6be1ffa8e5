"""Every environment variable of the package stands in `core/env.py` and in `docs/environment.md`, and nowhere else."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from apt_model.core.env import VARIABLES

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "apt_model"
OWNER = PACKAGE / "core" / "env.py"
GUIDE = ROOT / "docs" / "environment.md"


def readings(source: str) -> Iterator[int]:
    """Lines of `source` that read an APT_ variable, or one whose name is not written there, past `core/env.py`."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=value, slice=key) if _is_environ(value):
                keys = [key]
            case ast.Call(func=ast.Attribute(value=value), args=keys) if _is_environ(value):
                pass
            case ast.Call(func=ast.Attribute(attr="getenv" | "getenvb") | ast.Name(id="getenv"), args=keys):
                pass
            case ast.Compare(left=key, comparators=[value]) if _is_environ(value):
                keys = [key]
            case _:
                continue
        if not (keys and isinstance(keys[0], ast.Constant) and not str(keys[0].value).startswith("APT_")):
            yield node.lineno


def _is_environ(node: ast.expr) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb")) or (
        isinstance(node, ast.Name) and node.id == "environ"
    )


def test_the_guide_has_the_same_table():
    rows = re.findall(r"^\| `(APT_\w+)` \| (.*?) \| (.*?) \|$", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert rows == [(variable.name, variable.takes, variable.does) for variable in VARIABLES]


def test_the_guide_names_no_other():
    assert set(re.findall(r"\bAPT_[A-Z0-9_]+", GUIDE.read_text(encoding="utf-8"))) == {each.name for each in VARIABLES}


def test_only_one_file_reads_them():
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != OWNER and (lines := list(readings(path.read_text(encoding="utf-8"))))
    }
    assert not found, f"declare the variable in core/env.py and use its get(): {found}"
    assert list(readings(OWNER.read_text(encoding="utf-8")))


def test_names_in_the_code_are_those_of_the_list():
    for path in PACKAGE.rglob("*.py"):
        named = set(re.findall(r"\bAPT_[A-Z][A-Z0-9_]*", path.read_text(encoding="utf-8"))) - {"APT_"}
        assert named <= {variable.name for variable in VARIABLES}, path


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda variable: variable.name)
def test_an_empty_variable_is_an_unset_one(variable, monkeypatch):
    for value, read in ((None, None), ("", None), ("cpu", "cpu")):
        if value is None:
            monkeypatch.delenv(variable.name, raising=False)
        else:
            monkeypatch.setenv(variable.name, value)
        assert variable.get() == read


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['APT_SPEED']",
        "import os\nos.environ.get('APT_SPEED', '')",
        "import os\nos.getenv('APT_SPEED')",
        "from os import environ\n'APT_SPEED' in environ",
        "from os import getenv\ngetenv('APT_SPEED')",
        "import os\nname = 'APT_' + 'SPEED'\nos.environ.get(name)",
        "import os\nos.environ.copy()",
        "def f():\n    import os\n    return os.environ['APT_SPEED']",
    ],
)
def test_it_can_fail(source):
    assert list(readings(source))


@pytest.mark.parametrize("source", ["import os\nos.environ['TERM']", "x.get('APT_SPEED')", "'os.environ in words'"])
def test_it_lets_others_pass(source):
    assert not list(readings(source))
