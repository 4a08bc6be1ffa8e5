"""Broken installations: what is done to a sound machine, and what the doctor must say of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machines import GIB, LIMITS, MIB, NVRM, Machine

MISSING = "import ctypes\nctypes.CDLL({!r})\n"
NPU_POINTS = "[console_scripts]\nx = y:z\n\n[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
OLD = "2.5.1"


@dataclass(frozen=True)
class Case:
    """`says` stands in the cause or the figure, `remedy` in the remedy."""

    name: str
    code: str
    says: tuple[str, ...]
    remedy: str
    severity: str = "broken"
    beside: frozenset[str] = frozenset()
    """Codes of what is truly wrong too."""
    compiled: bool = False
    """Whether a driver's library is made, by a C compiler."""
    real: bool = False
    """Whether it is of no use without the real torch."""


CASES: dict[str, Case] = {}
BUILDS: dict[str, Any] = {}


def case(code, *says, remedy, **more):
    """The function's docstring is the installation's name in the guide."""

    def keep(build):
        name = build.__name__
        CASES[name] = Case(build.__doc__, code, says, remedy, **more)
        BUILDS[name] = build
        return build

    return keep


# Packages.


@case("APT-D01", "Python >=3.99", remedy="uv venv")
def old_python(machine: Machine):
    """A Python that this version does not support"""
    machine.info("apt-transformer", "0.1.0", "Requires-Python: >=3.99\n")


@case("APT-D02", "torch is not installed", remedy="pip install 'torch>=")
def no_torch(machine: Machine):
    """torch is not installed"""
    machine.remove(machine.site / "torch")
    machine.remove(next(machine.site.glob("torch-*.dist-info")))


@case("APT-D03", "torch>=", f"torch {OLD} is installed", remedy="pip install --upgrade 'torch>=")
def old_torch(machine: Machine):
    """torch older than ours"""
    machine.torch(OLD)


@case("APT-D03", "transformers>=", "[hf]", "4.44.0", remedy="--upgrade 'transformers>=", severity="warning")
def old_transformers(machine: Machine):
    """transformers older than the extra asks for"""
    machine.info("transformers", "4.44.0")


@case("APT-D04", "torchvision 0.25.0", "torch==2.10.0", "torch 2.13.0", remedy="--upgrade torchvision 'torch==2.13.0")
def other_torchvision(machine: Machine):
    """torchvision made for another torch"""
    machine.info("torchvision", "0.25.0", "Requires-Dist: numpy\nRequires-Dist: torch (==2.10.0)\n")


@case("APT-D05", "torch is installed 2 times", "2.13.0", "2.11.0", remedy="uninstall -y torch")
def two_torches(machine: Machine):
    """Two torches in one folder"""
    machine.second_info("torch", "2.11.0")


@case("APT-D06", "experiments/torch.py", "hides the installed package", remedy="mv ")
def shadowed_torch(machine: Machine):
    """A torch.py of the user's on PYTHONPATH"""
    folder = machine.folder / "my experiments"
    folder.mkdir()
    (folder / "torch.py").write_text("print('learning torch')\n")
    machine.first.append(str(folder))


@case("APT-D06", "2 copies of apt_model", "checkout", remedy="uninstall -y apt-transformer", severity="warning")
def two_of_ours(machine: Machine):
    """apt_model installed, and a checkout in front of it"""
    machine.package("apt_model", "")
    folder = machine.folder / "checkout"
    (folder / "apt_model").mkdir(parents=True)
    (folder / "apt_model" / "__init__.py").write_text("")
    machine.first.append(str(folder))


@case("APT-D07", "triton and triton-xpu all own", "3.5.0", remedy="uninstall -y triton triton-xpu && ")
def two_tritons(machine: Machine):
    """triton and triton-xpu, which overwrite each other"""
    machine.info("triton", "3.9.0")
    machine.info("triton-xpu", "3.5.0")


@case("APT-D15", "NumPy", "torch 2.13.0", remedy="install --upgrade torch numpy")
def numpy_of_another_kind(machine: Machine):
    """A NumPy whose C interface is not the one torch was built for"""
    if machine.real:
        # What torch asks for is not there, as in a NumPy of another major version.
        machine.altered(
            "numpy", "__init__.py", "\nfrom numpy._core import _multiarray_umath\ndel _multiarray_umath._ARRAY_API\n"
        )
    else:
        text = (machine.site / "torch" / "__init__.py").read_text()
        refusal = "raise RuntimeError('Numpy is not available')"
        (machine.site / "torch" / "__init__.py").write_text(
            text.replace("def numpy(self):\n        return self.rows", f"def numpy(self):\n        {refusal}")
        )
        machine.package("numpy", "__version__ = '2.4.6'\n")


# Imports that fail.


@case("APT-D11", "torch_npu of torch-npu 2.13.0", "libhccl.so, of Huawei's CANN,", remedy="uninstall -y torch-npu")
def npu_without_cann(machine: Machine):
    """torch-npu without Huawei's CANN: `import torch` fails and hides why"""
    machine.package("torch_npu", MISSING.format("libhccl.so") + "def _autoload():\n    pass\n")
    machine.info("torch-npu", "2.13.0", entry_points=NPU_POINTS)


@case("APT-D11", "broken_backend", "no device of ours", remedy="uninstall -y some-backend")
def backend_that_raises(machine: Machine):
    """A backend whose start fails in its own words"""
    machine.package("some_backend", "def start():\n    raise RuntimeError('no device of ours')\n")
    machine.info("some-backend", "1.0", entry_points="[torch.backends]\nbroken_backend = some_backend:start\n")


@case(
    "APT-D10",
    "libcudart.so.130, of NVIDIA's CUDA libraries, is not found",
    remedy="--force-reinstall 'torch==2.13.0+cpu' --extra",
)
def no_cudart(machine: Machine):
    """torch misses a library of CUDA (libcudart.so.N)"""
    machine.package("torch", MISSING.format("libcudart.so.130"))


@case("APT-D10", "import tokenizers", "libgomp-nowhere.so.1", remedy="libgomp1")
def tokenizers_without_library(machine: Machine):
    """A C extension misses a library of the system's"""
    machine.package("tokenizers", MISSING.format("libgomp-nowhere.so.1"))


@case(
    "APT-D12", "libtorch_python.so was built for another version", "_ZN3c105ErrorC2E", remedy="--force-reinstall 'torch"
)
def mixed_torch(machine: Machine):
    """torch's files are of two versions"""
    machine.package(
        "torch", "raise ImportError('/x/torch/lib/libtorch_python.so: undefined symbol: _ZN3c105ErrorC2E')\n"
    )


@case(
    "APT-D13",
    "SIGILL",
    "lacks an instruction",
    "torch/__init__.py, line 2",
    remedy="--force-reinstall 'torch==2.13.0+cpu' --extra",
)
def illegal_instruction(machine: Machine):
    """torch dies of an illegal instruction"""
    machine.package("torch", "import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")


@case("APT-D14", "'import torch' waits", "torch/__init__.py, line 2", remedy="-X faulthandler")
def hanging_torch(machine: Machine):
    """torch's import waits for ever"""
    machine.package("torch", "import threading\nthreading.Event().wait()\n")


# GPU and driver.


@case("APT-D08", "built without CUDA", "driver 580.95.05, nvidia0", remedy="--torch-backend=auto", compiled=True)
def cpu_build(machine: Machine):
    """torch's CPU build on a machine with an NVIDIA GPU"""
    machine.gpu()


@case(
    "APT-D09", "CUDA 13.0, which needs driver 580", "CUDA 12.4", "550.54.15", remedy="build for CUDA 12", compiled=True
)
def old_driver(machine: Machine):
    """torch's CUDA newer than the driver runs"""
    machine.torch("2.13.0+cu130", cuda="13.0")
    machine.gpu("550.54.15", cuda=12040)


@case("APT-D21", "old kernel module", "module 550.54.15, library 580.95", remedy="sudo reboot", compiled=True)
def two_drivers(machine: Machine):
    """The driver was updated under its loaded module"""
    machine.torch("2.13.0+cu126", cuda="12.6")
    words = "Failed to initialize NVML: Driver/library version mismatch\\nNVML library version: 580.95"
    machine.gpu("550.54.15", init=803, smi=f"printf '{words}\\n'; exit 18")


@case("APT-D20", "no driver of NVIDIA's is loaded", "0000:01:00.0", remedy="sudo modprobe nvidia")
def no_driver(machine: Machine):
    """An NVIDIA GPU without a driver"""
    machine.torch("2.13.0+cu130", cuda="13.0")
    machine.bus()


@case("APT-D22", "container was started without", "580.95.05", remedy="docker run --gpus all")
def container_without_gpu(machine: Machine):
    """A container started without the GPU"""
    machine.torch("2.13.0+cu130", cuda="13.0")
    machine.file("proc/driver/nvidia/version", NVRM.format("580.95.05"))
    machine.file(".dockerenv")


@case("APT-D23", "may not open /dev/nvidia0", "/dev/nvidia0 660", remedy="usermod -aG", compiled=True)
def closed_device(machine: Machine):
    """/dev/nvidia0 without permission"""
    machine.torch("2.13.0+cu130", cuda="13.0")
    machine.gpu()
    machine.changes["uid"] = 54321
    for name in ("nvidia0", "nvidiactl"):
        (machine.root / "dev" / name).chmod(0o660)


@case("APT-D24", "CUDA_VISIBLE_DEVICES hides all GPUs", "'1'", remedy="unset CUDA_VISIBLE_DEVICES", compiled=True)
def hidden_gpu(machine: Machine):
    """CUDA_VISIBLE_DEVICES names a GPU that is not there"""
    machine.torch("2.13.0+cu130", cuda="13.0")
    machine.gpu(init=100)
    machine.environ["CUDA_VISIBLE_DEVICES"] = "1"


@case("APT-D25", "fabric manager", "cuInit returns 802", remedy="restart nvidia-fabricmanager", compiled=True)
def no_fabric_manager(machine: Machine):
    """A machine with NVSwitch whose fabric manager does not run"""
    machine.torch("2.13.0+cu130", cuda="13.0")
    machine.gpu(init=802)


@case("APT-D14", "nvidia-smi does not answer", remedy="sudo reboot", compiled=True)
def hanging_driver(machine: Machine):
    """A driver that does not answer"""
    machine.torch("2.13.0+cu130", cuda="13.0")
    machine.gpu(smi="exec sleep 60")


@case("APT-D22", "this WSL has no GPU", "microsoft", remedy="wsl.exe --update")
def wsl_without_gpu(machine: Machine):
    """WSL without its GPU"""
    machine.torch("2.13.0+cu130", cuda="13.0")
    machine.file("proc/version", "Linux version 6.6.87.2-microsoft-standard-WSL2 (root@439a) #1 SMP")


# Limits, folders, settings.


@case("APT-D30", "control group", "2.0 GiB of 62.5 GiB", remedy="--ram 2048MB", severity="warning")
def limit_of_version_2(machine: Machine):
    """A container's memory limit (cgroup v2) far below the machine's"""
    machine.file("proc/self/cgroup", "0::/\n")
    machine.file("proc/self/mountinfo", "30 1 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n")
    machine.file("sys/fs/cgroup/memory.max", f"{2 * GIB}\n")
    machine.file("sys/fs/cgroup/memory.current", f"{GIB // 4}\n")


@case("APT-D30", "control group", "1.0 GiB of 62.5 GiB", remedy="--ram 1024MB", severity="warning")
def limit_of_version_1(machine: Machine):
    """A job's memory limit (cgroup v1) far below the machine's"""
    machine.file("proc/self/cgroup", "4:memory:/job\n")
    machine.file("proc/self/mountinfo", "31 1 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n")
    machine.file("sys/fs/cgroup/memory/job/memory.limit_in_bytes", f"{GIB}\n")
    machine.file("sys/fs/cgroup/memory/job/memory.usage_in_bytes", f"{GIB // 8}\n")


@case("APT-D31", "RLIMIT_MEMLOCK", "64 KiB", remedy="ulimit -l unlimited", severity="warning")
def little_locked(machine: Machine):
    """A limit of locked memory of 64 KiB"""
    machine.file("proc/self/limits", LIMITS.format(65536, 65536))


@case("APT-D32", "shared memory (", "64 MiB free of 64 MiB", remedy="--shm-size", severity="warning")
def little_shared(machine: Machine):
    """A container with Docker's 64 MiB of /dev/shm"""
    machine.file(".dockerenv")
    machine.free["shm"] = (64 * MIB, 64 * MIB)


@case("APT-D40", "mounted read-only", "ext4", remedy="findmnt")
def read_only(machine: Machine):
    """The folder for temporary files is mounted read-only"""
    machine.file("proc/self/mountinfo", "25 1 0:22 / / ro,relatime - ext4 /dev/sda1 ro\n")


@case("APT-D40", "cannot be written", remedy="ls -ld")
def refused_folder(machine: Machine):
    """A folder in which the system makes no file"""
    machine.given = "/proc"


@case("APT-D41", "full", "0 bytes free", remedy="du -xsh")
def full_disk(machine: Machine):
    """A full disk"""
    machine.free["tmp"] = (500 * GIB, 0)


@case("APT-D42", "lies in memory (tmpfs)", remedy="--folder DIR", severity="warning")
def disk_in_memory(machine: Machine):
    """A tmpfs meant as the disk level"""
    place = machine.folder / "level"
    place.mkdir()
    machine.given = str(place)
    machine.file(
        "proc/self/mountinfo", f"25 1 0:22 / / rw - ext4 /dev/sda1 rw\n26 25 0:30 / {place} rw - tmpfs tmpfs rw\n"
    )


@case("APT-D50", "RUNPOD_ENDPOINT_ID is not set", remedy="export RUNPOD_ENDPOINT_ID=", severity="warning")
def half_a_cloud(machine: Machine):
    """A cloud's key without its endpoint"""
    machine.environ["RUNPOD_API_KEY"] = "canary-of-a-key"


@case("APT-D50", "APT_CLOUD_ENDPOINT is not set", remedy="export APT_CLOUD_ENDPOINT=", severity="warning")
def own_server_without_an_address(machine: Machine):
    """A key of one's own server without its address"""
    machine.environ["APT_CLOUD_API_KEY"] = "canary-of-a-key"


@case("APT-D51", "HUAWEI_CLOUD_ENDPOINT does not begin with https", remedy="https://HOST", severity="warning")
def open_cloud(machine: Machine):
    """A cloud's endpoint over plain HTTP"""
    names = ("HUAWEI_CLOUD_API_KEY", "HUAWEI_CLOUD_MODEL")
    machine.environ |= dict.fromkeys(names, "canary-of-a-key")
    machine.environ["HUAWEI_CLOUD_ENDPOINT"] = "http://canary.example/v1"


@case("APT-D60", "APT_DEVCIE", "did you mean APT_DEVICE?", remedy='export APT_DEVICE="$APT_DEVCIE"', severity="warning")
def misspelt_variable(machine: Machine):
    """A misspelt variable of ours"""
    machine.environ["APT_DEVCIE"] = "cpu"


@case("APT-D61", "not there", "cuda:3", remedy="unset APT_DEVICE", severity="warning")
def absent_device(machine: Machine):
    """APT_DEVICE names a device that is not there"""
    machine.environ["APT_DEVICE"] = "cuda:3"


def build(name: str, folder: Path, *, real: bool = False) -> Machine:
    machine = Machine(folder, real=real)
    BUILDS[name](machine)
    return machine
