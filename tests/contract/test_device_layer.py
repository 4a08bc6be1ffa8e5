"""One file of the package says `torch.cuda`; all others ask the device layer."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "apt_model"
OWNER = PACKAGE / "core" / "system" / "cuda.py"


def _constant(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def uses_of_torch_cuda(source: str) -> list[int]:
    """Lines of `source` that reach `torch.cuda`, under whatever name torch is imported."""
    tree = ast.parse(source)
    torches = {"torch"} | {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "torch" and alias.asname
    }

    def is_torch(node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id in torches

    def lines() -> Iterator[int]:
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=value, attr="cuda") if is_torch(value):
                    yield node.lineno
                case ast.Import(names=names) if any(f"{alias.name}.".startswith("torch.cuda.") for alias in names):
                    yield node.lineno
                case ast.ImportFrom(module=str(module)) if f"{module}.".startswith("torch.cuda."):
                    yield node.lineno
                case ast.ImportFrom(module="torch", names=names) if any(alias.name == "cuda" for alias in names):
                    yield node.lineno
                case ast.Call(func=ast.Name(id="getattr"), args=[module, name, *_]) if is_torch(module):
                    if _constant(name) == "cuda":
                        yield node.lineno
                case ast.Call(func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"), args=[name, *_]):
                    if f"{_constant(name)}.".startswith("torch.cuda."):
                        yield node.lineno
                case ast.Call(func=ast.Attribute(attr="get_device_module")):
                    yield node.lineno

    return sorted(lines())


def test_only_one_file_says_torch_cuda():
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != OWNER and (lines := uses_of_torch_cuda(path.read_text(encoding="utf-8")))
    }
    assert not found, f"ask apt_model.core.system.get_device_manager instead: {found}"


def test_the_owner_is_found_by_the_same_lint():
    assert uses_of_torch_cuda(OWNER.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cuda.synchronize()",
        "import torch as t\nif t.cuda.is_available(): pass",
        "import torch.cuda",
        "import torch.cuda.amp as amp",
        "from torch import cuda as gpu",
        "from torch.cuda import Stream",
        "from torch.cuda.amp import autocast",
        "import torch\ngetattr(torch, 'cuda').empty_cache()",
        "import importlib\nimportlib.import_module('torch.cuda')",
        "import torch\ntorch.get_device_module(device).empty_cache()",
        "def f():\n    import torch\n    return torch.cuda",
    ],
)
def test_the_lint_can_fail(source):
    assert uses_of_torch_cuda(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.backends.cuda.flash_sdp_enabled()",
        "import torch\ntorch.version.cuda",
        "import torch\ntorch.device('cuda')",
        "'torch.cuda in words'",
        "from apt_model.core.system.cuda import CudaDevice",
    ],
)
def test_the_lint_lets_words_and_other_names_pass(source):
    assert not uses_of_torch_cuda(source)
