"""Builds the device of `device.cpp`, once for a version of torch and of the source; kept outside of the tree."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("device.cpp")
NAME = "apt_test_device"
PACKAGES = Path(__file__).with_name("packages")
LIBRARY = "APT_TEST_DEVICE_LIBRARY"
"""Names the built file to the packages that load it."""


class NoCompilerError(Exception):
    """There is nothing to build with; the message says what is missing."""


def library() -> Path:
    """The built file; another process that builds it is waited for."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if sys.platform != "linux" or not compiler:
        raise NoCompilerError("the built device needs Linux and a C++ compiler (g++ or clang++)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        raise NoCompilerError("the built device needs Python's headers (python3-dev)")
    command = _command(compiler)
    key = hashlib.sha256("\0".join([*command, torch.__version__, sys.version, SOURCE.read_text()]).encode()).hexdigest()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "apt_model_tests" / f"device-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"{NAME}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.is_file():
            partial = folder / f"{NAME}.{os.getpid()}.partial"
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.rename(built)
    return built


def _command(compiler: str) -> list[str]:
    root = Path(torch.__file__).parent
    include = [
        root / "include",
        root / "include" / "torch" / "csrc" / "api" / "include",
        sysconfig.get_paths()["include"],
    ]
    return [
        compiler, "-O0", "-std=c++20", "-shared", "-fPIC", f"-DTORCH_EXTENSION_NAME={NAME}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", *(f"-I{folder}" for folder in include),
        str(SOURCE), f"-L{root / 'lib'}", "-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip


def environment(kind: str, **more: str) -> dict[str, str]:
    """For a process in which the package of the vendor of `kind` is there, and is the built device's."""
    path = [str(PACKAGES / kind), str(PACKAGES / "shared"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), LIBRARY: str(library()), "OMP_NUM_THREADS": "1", **more}
