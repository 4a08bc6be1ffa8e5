"""Made-up machines: a folder of packages, a tree of /proc, /sys and /dev, an environment; the processes are real."""

import functools
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from apt_model.cli.diagnosis.system import System

ROOT = Path(__file__).parents[2]
GIB, MIB = 2**30, 2**20
STDLIB = tuple(
    path for path in sys.path if Path(path).is_relative_to(sysconfig.get_path("stdlib")) and "site" not in path
)
REAL = Path(sysconfig.get_path("purelib"))
NVRM = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Jan 14 07:22:00 UTC 2025\nGCC version:  gcc 12\n"
MEMINFO = "MemTotal:       65536000 kB\nMemAvailable:   60000000 kB\n"
LIMITS = "Limit           Soft Limit    Hard Limit    Units\nMax locked memory         {}      {}      bytes\n"
MOUNTS = "25 1 0:22 / / rw,relatime - ext4 /dev/sda1 rw\n"
TORCH = '''
"""Enough of torch for the probes: it computes on lists."""
from torch import version

__version__ = version.__version__


class Tensor:
    def __init__(self, rows):
        self.rows = rows

    def __matmul__(self, other):
        columns = list(zip(*other.rows))
        return Tensor([[float(sum(map(float.__mul__, row, column))) for column in columns] for row in self.rows])

    def tolist(self):
        return self.rows

    def numpy(self):
        return self.rows


class device:
    def __init__(self, kind, index=None):
        self.type = kind


class Anything:
    """What the probes load along with what they use: it is named, and does nothing."""

    def __getattr__(self, name):
        return Anything()

    def __call__(self, *given, **named):
        return Anything()

    __or__ = __ror__ = __getitem__ = __call__

    def __mro_entries__(self, bases):
        return ()


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything()


class Cuda(Anything):
    def is_available(self):
        return False


cuda = Cuda()


def tensor(rows, dtype=None, device=None):
    return Tensor([[float(x) for x in row] for row in rows])


def ones(count):
    return Tensor([1.0] * count)


def mm(a, b):
    return a @ b
'''
DRIVER = """
#include <stdlib.h>
static int number(const char *name) { const char *text = getenv(name); return text ? atoi(text) : 0; }
int cuInit(unsigned flags) { return number("FAKE_INIT"); }
int cuDriverGetVersion(int *version) { *version = number("FAKE_CUDA"); return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
"""


@dataclass
class Machine:
    """A sound one without a GPU, until something is done to it."""

    folder: Path
    real: bool = False
    """Whether torch is the one of this environment, instead of one that computes on lists."""
    first: list[str] = field(default_factory=list)
    """Folders in front of the packages, as PYTHONPATH puts them."""
    changes: dict = field(default_factory=dict)
    """What is said to `System` directly."""
    free: dict = field(default_factory=dict)
    """Folder -> (bytes, free bytes)."""
    given: str | None = None
    """What --folder says."""

    def __post_init__(self):
        self.site, self.root, self.tmp = (self.folder / name for name in ("site", "root", "tmp"))
        for path in (self.site, self.root / "dev/shm", self.tmp, self.folder / "bin"):
            path.mkdir(parents=True)
        self.environ = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", "TMPDIR": str(self.tmp), "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.file("proc/meminfo", MEMINFO)
        self.file("proc/version", "Linux version 6.8.0-45-generic (buildd@host) #45-Ubuntu SMP")
        self.file("proc/self/limits", LIMITS.format(8 * MIB, 8 * MIB))
        self.file("proc/self/mountinfo", MOUNTS)
        self.file("proc/self/cgroup", "0::/\n")
        self.info("apt-transformer", "0.1.0", OURS)
        if self.real:
            for entry in REAL.iterdir():
                if not entry.name.startswith(("apt_transformer", "_editable", "distutils", "__pycache__")):
                    (self.site / entry.name).symlink_to(entry)
        else:
            self.torch("2.13.0+cpu")
            for name, version in PLAIN.items():
                self.info(name, version)

    def file(self, name, text="", mode=0o644):
        """A file under the root."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def package(self, name, source):
        """A package that is imported as `name`."""
        place = self.site / name
        self.remove(place)
        place.mkdir()
        (place / "__init__.py").write_text(source)

    def info(self, name, version, metadata="", entry_points=""):
        """The metadata of an installed package, in place of what there was of it."""
        spelt = name.replace("-", "_")
        for before in self.site.glob(f"{spelt}-*.dist-info"):
            self.remove(before)
        self.second_info(name, version, metadata, entry_points)

    def second_info(self, name, version, metadata="", entry_points=""):
        """The metadata of a package, beside what there is of it."""
        place = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        place.mkdir()
        (place / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{metadata}\nText.\n")
        if entry_points:
            (place / "entry_points.txt").write_text(entry_points)

    def torch(self, version, cuda=None):
        """A torch of that version that works on the CPU, built for that CUDA."""
        values = {"__version__": version, "cuda": cuda, "hip": None, "xpu": None, "rocm": None, "git_version": ""}
        said = "debug = False\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
        if self.real:
            self.altered("torch", "version.py", said)
        else:
            self.package("torch", TORCH)
            (self.site / "torch" / "version.py").write_text(said)
        self.info("torch", version)

    def altered(self, name, file, more):
        """This environment's own package with more at the end of one of its files."""
        place = self.site / name
        self.remove(place)
        place.mkdir()
        for entry in (REAL / name).iterdir():
            if entry.name != file:
                (place / entry.name).symlink_to(entry)
        (place / file).write_text((REAL / name / file).read_text(encoding="utf-8") + more)

    def gpu(self, driver="580.95.05", cuda=13000, init=0, smi='echo "GPU 0: NVIDIA A (UUID: GPU-1)"'):
        """An NVIDIA GPU with its driver."""
        self.file("proc/driver/nvidia/version", NVRM.format(driver))
        for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
            self.file(f"dev/{name}", mode=0o666)
        self.bus()
        tool = self.folder / "bin" / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{smi}\n")
        tool.chmod(0o755)
        self.environ |= {"FAKE_INIT": str(init), "FAKE_CUDA": str(cuda), "LD_LIBRARY_PATH": str(self.folder)}
        shutil.copy(driver_library(), self.folder / "libcuda.so.1")

    def bus(self):
        """A GPU on the bus."""
        self.file("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
        self.file("sys/bus/pci/devices/0000:01:00.0/class", "0x030200\n")

    @staticmethod
    def remove(path):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)

    def room(self, path):
        return self.free.get(Path(path).name, (500 * GIB, 200 * GIB))

    def system(self):
        given = {
            "variables": self.environ, "paths": (*self.first, str(self.site), *STDLIB), "root": self.root,
            "python": (sys.executable, "-S"), "home": self.folder / "home", "private": (), "uid": 1000,
            "gids": frozenset([1000]), "room": self.room,
        }  # fmt: skip
        return System(**{**given, **self.changes})


def _ours():
    """What an installation of this checkout would say of itself."""
    import re

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needs = re.search(r"^dependencies = \[(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)[1]
    hf = re.search(r"^hf = \[(.*?)\]", text, flags=re.MULTILINE)[1]
    lines = [f"Requires-Python: {re.search(r'requires-python = .(.*).$', text, flags=re.MULTILINE)[1]}"]
    lines += [f"Requires-Dist: {need}" for need in re.findall(r'"(.*?)"', needs)]
    lines += [f"Requires-Dist: {need}; extra == 'hf'" for need in re.findall(r'"(.*?)"', hf)]
    return "\n".join(lines) + "\n"


OURS = _ours()
PLAIN = {
    "numpy": "2.4.6", "safetensors": "0.8.0", "tokenizers": "0.23.3", "tyro": "1.0.17", "rich": "15.0.0",
    "typing-extensions": "4.16.0",
}  # fmt: skip


def has_compiler():
    return shutil.which("cc") is not None


@functools.cache
def driver_library():
    """A library that answers as NVIDIA's driver, as the environment tells it to."""
    import atexit
    import tempfile

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "driver.c").write_text(DRIVER)
    made = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", made, folder / "driver.c"], check=True)  # noqa: S607
    return made
