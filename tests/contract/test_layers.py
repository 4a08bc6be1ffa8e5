"""A folder's layer says what its files may import: read from the source, functions and lazy tables included."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "apt_model"
LAYERS = {
    "core": 0,
    "core.system": 1,
    "ops": 2,
    "layers": 3,
    "vgpu": 3,
    "cloud": 3,
    "modeling": 4,
    "optimization": 4,
    "integrations": 4,
    "trainer": 5,
    "cli": 6,
}
# Tries Triton by its smallest kernel: a question about the machine.
TRITON_PROBE = "apt_model.core.system.triton_kernel"
# Of entry points, by which other packages register what is theirs: no folder of ours.
GROUPS = {"apt_model.devices"}
PURE = {"ops", "layers"}
INPUT_OUTPUT = {
    "asyncio", "fcntl", "fileinput", "glob", "http", "httpx", "io", "json", "mmap", "multiprocessing", "os", "pathlib",
    "requests", "safetensors", "select", "shutil", "socket", "ssl", "subprocess", "sys", "tempfile", "tokenizers",
    "urllib", "urllib3",
}  # fmt: skip
_NAME = re.compile(r"apt_model(\.[A-Za-z_]\w*)+")


def violations(package: Path) -> list[str]:
    """What the files of `package` import and may not, each as 'file:line: what'."""
    homes = _lazy_table(package / "__init__.py")
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, fault in _faults(_module(package, path), tree, homes):
            found.append(f"{name}:{line}: {fault}")
    return found


def _faults(module: str, tree: ast.Module, homes: dict[str, str]) -> Iterator[tuple[int, str]]:
    folder = _folder(module)
    for line, target in imports(module, tree):
        if target.partition(".")[0] == "apt_model":
            if fault := _wrong_direction(folder, homes.get(target, target)):
                yield line, fault
        elif target.partition(".")[0] == "triton" and folder != "ops" and module != TRITON_PROBE:
            yield line, "triton outside ops"
        elif target.partition(".")[0] in INPUT_OUTPUT and folder in PURE:
            yield line, f"{folder} imports {target}, which is input and output"
    for node in ast.walk(tree):
        if folder in PURE and isinstance(node, ast.Name) and node.id in ("open", "input"):
            yield node.lineno, f"{folder} uses {node.id}()"


def _wrong_direction(folder: str, target: str) -> str | None:
    """Why `folder` may not import `target`, or None where it may."""
    if target == "apt_model":
        return "'import apt_model' hides what is used: import it from its home"
    to = _folder(target)
    for name in (folder, to):
        if name and name not in LAYERS:
            return f"the folder {name} has no layer"
    if target == "apt_model.__version__" or folder in ("", to):
        return None  # the top of the package may name anything
    if to in ("core.files", "core") and target.startswith("apt_model.core.files") and folder in PURE:
        return f"{folder} imports {target}, which is input and output"
    if to and LAYERS[to] < LAYERS[folder]:
        return None
    how = "of the same layer" if to and LAYERS[to] == LAYERS[folder] else "above it"
    return f"{folder} imports {target}, {how}"


def imports(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that `module` imports, or names in a string of its code."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=home, names=names, level=level):
                base = ".".join([*module.split(".")[:-level], *([home] if home else [])]) if level else str(home)
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Constant(value=str(text)) if _is_module(text) and id(node) not in docstrings:
                yield node.lineno, text
            case ast.Call(func=ast.Name(id="__import__") | ast.Attribute(attr="import_module"), args=[first, *_]):
                if isinstance(first, ast.Constant) and not _NAME.fullmatch(str(first.value)):
                    yield node.lineno, str(first.value)


def _is_module(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and text not in GROUPS


def _module(package: Path, path: Path) -> str:
    """The dotted name, with `__init__` kept, so that its last part is always a file."""
    return ".".join(["apt_model", *path.relative_to(package).with_suffix("").parts])


def _folder(module: str) -> str:
    """The folder, by its key in LAYERS; '' for the top of the package."""
    parts = module.split(".")[1:]
    if parts[:2] == ["core", "system"]:
        return "core.system"
    if parts[:1] == ["__main__"]:
        return "cli"
    return "" if not parts or parts[0].startswith("__") else parts[0]


def _lazy_table(path: Path) -> dict[str, str]:
    """What `from apt_model import name` loads, by `apt_model.name`."""
    return {
        f"apt_model.{key.value}": str(value.value)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
    }


def test_every_file_imports_only_what_its_layer_may():
    assert violations(PACKAGE) == []


def test_there_is_something_to_look_at():
    found = {_folder(_module(PACKAGE, path)) for path in PACKAGE.rglob("*.py")}
    assert {"", "core", "core.system", "ops", "layers", "modeling", "optimization", "trainer", "cli"} <= found
    edges = list(imports("apt_model.__init__", ast.parse((PACKAGE / "__init__.py").read_text())))
    assert "apt_model.modeling.apt_model" in {target for _, target in edges}


# --- it can fail

CLEAN = {
    "__init__.py": '"""See apt_model.cli."""\nT = {"Model": "apt_model.modeling.model", "go": "apt_model.cli.go"}',
    "__main__.py": "from apt_model.cli.go import main",
    "core/errors.py": "",
    "core/files.py": "import os",
    "core/system/device.py": "from apt_model.core import errors\nfrom apt_model.core.files import x",
    "ops/fp4/__init__.py": "from apt_model.ops.fp4.naive import f",
    "ops/fp4/naive.py": "import torch, math\nfrom apt_model.core.errors import E",
    "ops/fp4/kernel.py": "import triton\nimport triton.language as tl",
    "layers/linear.py": "from apt_model.ops.fp4 import f\nfrom apt_model.core.system import device",
    "vgpu/stack.py": "import os\nimport apt_model.core.system.device",
    "modeling/model.py": "from apt_model import __version__\nfrom apt_model.layers.linear import L",
    "optimization/__init__.py": 'table = {"get_device": "apt_model.core.system"}',
    "trainer/loop.py": "from apt_model.modeling.model import Model\nfrom apt_model.trainer import loop",
    "cli/go.py": "def main():\n    import apt_model.trainer.loop",
}


def tree(root, **changes):
    package = root / "apt_model"
    for name, source in {**CLEAN, **changes}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source)
    return package


def test_a_clean_tree_has_none(tmp_path):
    assert violations(tree(tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("core/errors.py", "from apt_model.core.system import device", "imports apt_model.core.system.device, above"),
        ("core/errors.py", "from apt_model.core import system", "imports apt_model.core.system, above"),
        ("core/errors.py", "import apt_model.trainer.loop", "imports apt_model.trainer.loop, above"),
        ("core/system/device.py", "from apt_model.ops.fp4 import f", "imports apt_model.ops.fp4.f, above"),
        ("ops/fp4/naive.py", "from apt_model.layers.linear import L", "imports apt_model.layers.linear.L, above"),
        ("layers/linear.py", "from apt_model.vgpu.stack import S", "imports apt_model.vgpu.stack.S, of the same"),
        ("vgpu/stack.py", "from apt_model.layers.linear import L", "imports apt_model.layers.linear.L, of the same"),
        ("vgpu/stack.py", "from apt_model.cloud import wire", "imports apt_model.cloud.wire, of the same"),
        ("modeling/model.py", "import apt_model.optimization", "imports apt_model.optimization, of the same"),
        ("modeling/model.py", "from apt_model import go", "imports apt_model.cli.go, above"),
        ("modeling/model.py", "import apt_model\napt_model.trainer", "'import apt_model' hides what is used"),
        ("optimization/__init__.py", 'T = {"a": "apt_model.modeling.model"}', "imports apt_model.modeling"),
        ("optimization/__init__.py", 'T = {"a": "apt_model.trainer.loop"}', "imports apt_model.trainer"),
        ("trainer/loop.py", "def f():\n    from apt_model.cli.go import main", "imports apt_model.cli.go.main, above"),
        ("trainer/loop.py", "from apt_model import __main__", "imports apt_model.__main__, above"),
        ("trainer/loop.py", "i = __import__\ni('apt_model.cli.go')", "imports apt_model.cli.go"),
        ("trainer/loop.py", "if TYPE_CHECKING:\n    import apt_model.cli.go", "imports apt_model.cli.go, above"),
        ("trainer/loop.py", "from ..cli import go", "imports apt_model.cli.go, above"),
        ("trainer/loop.py", "from .. import cli", "imports apt_model.cli, above"),
        ("attic/old.py", "from apt_model.core.errors import E", "the folder attic has no layer"),
        ("trainer/loop.py", "from apt_model.attic import old", "the folder attic has no layer"),
        ("layers/linear.py", "import triton", "triton outside ops"),
        ("core/system/device.py", "import triton", "triton outside ops"),
        ("trainer/loop.py", "def f():\n    from triton.language import load", "triton outside ops"),
        ("cli/go.py", "import importlib\nimportlib.import_module('triton')", "triton outside ops"),
        ("ops/fp4/naive.py", "import json", "ops imports json, which is input and output"),
        ("layers/linear.py", "def f():\n    from os.path import join", "layers imports os.path.join, which is input"),
        ("layers/linear.py", "from safetensors.torch import load_file", "layers imports safetensors.torch.load_file"),
        ("layers/linear.py", "from apt_model.core.files import sha256", "imports apt_model.core.files.sha256"),
        ("ops/fp4/kernel.py", "with open('x') as file: pass", "ops uses open()"),
    ],
)  # fmt: skip
def test_it_can_fail(tmp_path, name, source, fault):
    found = violations(tree(tmp_path, **{name: source}))
    assert len(found) >= 1
    assert all(line.startswith(f"{name}:") for line in found)
    assert fault in found[0]
