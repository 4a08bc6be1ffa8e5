"""One file of the package says `torch.cuda`, one folder what torch has for others; the rest asks that folder."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "apt_model"
SYSTEM = PACKAGE / "core" / "system"
CUDA_FILE = SYSTEM / "cuda.py"
CUDA = frozenset({"cuda"})
OTHERS = frozenset({"xpu", "npu", "hpu", "accelerator", "get_device_module"})


def _constant(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def _in_torch(name: object, names: frozenset[str]) -> bool:
    """Whether a module's dotted name is torch's `names`, or within them."""
    return any(f"{name}.".startswith(f"torch.{each}.") for each in names)


def uses(source: str, names: frozenset[str]) -> list[int]:
    """Lines of `source` that reach `torch.<one of names>`, under whatever name torch is imported."""
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
                case ast.Attribute(value=value, attr=attr) if attr in names and is_torch(value):
                    yield node.lineno
                case ast.Import(names=aliases) if any(_in_torch(alias.name, names) for alias in aliases):
                    yield node.lineno
                case ast.ImportFrom(module=str(module)) if _in_torch(module, names):
                    yield node.lineno
                case ast.ImportFrom(module="torch", names=aliases) if any(alias.name in names for alias in aliases):
                    yield node.lineno
                case ast.Call(func=ast.Name(id="getattr"), args=[module, name, *_]) if is_torch(module):
                    if _constant(name) in names:
                        yield node.lineno
                case ast.Call(func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"), args=[name, *_]):
                    if _in_torch(_constant(name), names):
                        yield node.lineno

    return sorted(lines())


def found(package: Path) -> dict[str, list[int]]:
    """What the files of a package use and may not, by file."""
    system = package / "core" / "system"
    lines = {}
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        wrong = [] if path == system / "cuda.py" else uses(source, CUDA)
        wrong += [] if system in path.parents else uses(source, OTHERS)
        if wrong:
            lines[path.relative_to(package).as_posix()] = sorted(wrong)
    return lines


def test_only_one_file_says_torch_cuda_and_one_folder_the_others():
    assert not found(PACKAGE), "ask apt_model.core.system.get_device_manager instead"


def test_the_owners_are_found_by_the_same_lint():
    assert uses(CUDA_FILE.read_text(encoding="utf-8"), CUDA)
    assert uses((SYSTEM / "accelerator.py").read_text(encoding="utf-8"), OTHERS)


def test_where_they_may_be_said(tmp_path):
    files = {
        "core/system/cuda.py": "import torch\ntorch.cuda.synchronize()\ntorch.accelerator.synchronize()",
        "core/system/npu.py": "import torch\ntorch.npu.synchronize()\n\ntorch.cuda.synchronize()",
        "vgpu/lanes.py": "import torch\ntorch.xpu.synchronize()\ntorch.cuda.synchronize()",
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert found(tmp_path) == {"core/system/npu.py": [4], "vgpu/lanes.py": [2, 3]}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.NAME.synchronize()",
        "import torch as t\nif t.NAME.is_available(): pass",
        "import torch.NAME",
        "import torch.NAME.amp as amp",
        "from torch import NAME as gpu",
        "from torch.NAME import Stream",
        "from torch.NAME.amp import autocast",
        "import torch\ngetattr(torch, 'NAME').empty_cache()",
        "import importlib\nimportlib.import_module('torch.NAME')",
        "def f():\n    import torch\n    return torch.NAME",
    ],
)
@pytest.mark.parametrize("name", sorted(CUDA | OTHERS))
def test_the_lint_can_fail(source, name):
    assert uses(source.replace("NAME", name), CUDA if name in CUDA else OTHERS)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.backends.cuda.flash_sdp_enabled()",
        "import torch\ntorch.version.cuda",
        "import torch\ntorch.device('cuda')",
        "'torch.cuda in words'",
        "from apt_model.core.system.cuda import CudaDevice",
        "model.npu()",
        "from apt_model.core.system import npu",
    ],
)
def test_the_lint_lets_words_and_other_names_pass(source):
    assert not uses(source, CUDA | OTHERS)
