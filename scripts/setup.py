"""Make `.venv` with this project in it, from nothing but a Python. Standard library only.

    python3 scripts/setup.py [--extras dev]

PyTorch is chosen by what the machine has: the torch that this Python already sees is kept and shared; with an NVIDIA
GPU, pip's own choice is taken; otherwise the CPU build, so that no CUDA package is downloaded.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
TORCH = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SUPPORTED = ((3, 10), (3, 13))


def has_nvidia_gpu() -> bool:
    """Whether the driver has a GPU to show."""
    return Path("/proc/driver/nvidia/gpus").is_dir() or Path("/dev/nvidiactl").exists()


def torch_attempts(*, gpu: bool, linux: bool) -> list[list[str]]:
    """Arguments of pip that give a fitting torch, in the order to try."""
    if gpu or not linux:
        return [["torch>=2.11"]]  # elsewhere than on Linux the plain package has no CUDA in it
    cpu = f"torch=={TORCH}+cpu"
    return [[cpu], [cpu, "--index-url", CPU_INDEX]]


def pip(*arguments: str) -> bool:
    """Run the environment's pip; whether it succeeded."""
    python = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False).returncode == 0


def main() -> int:
    """Set up; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="plot", help="extras of the project to install, separated by commas")
    options = parser.parse_args()
    lowest, highest = SUPPORTED
    if not lowest <= sys.version_info[:2] <= highest:
        needed = f"{lowest[0]}.{lowest[1]} to {highest[0]}.{highest[1]}"
        print(f"setup: Python {needed} is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12")
        return 2
    own_torch = importlib.util.find_spec("torch") is not None
    if not VENV.exists():
        print(f"setup: making {VENV}" + (" over this Python's own torch" if own_torch else ""))
        try:
            venv.create(VENV, with_pip=True, system_site_packages=own_torch)
        except subprocess.CalledProcessError:
            shutil.rmtree(VENV, ignore_errors=True)
            print(
                "setup: this Python cannot make environments with pip; on Debian and Ubuntu: apt install python3-venv"
            )
            return 1
    if not own_torch:
        print("setup: installing torch (about 200 MB for a CPU, more with CUDA)")
        attempts = torch_attempts(gpu=has_nvidia_gpu(), linux=sys.platform == "linux")
        if not any(pip(*attempt) for attempt in attempts):
            print(f"setup: torch could not be installed; install it into {VENV} yourself, then run this again")
            return 1
    print(f"setup: installing apt-transformer[{options.extras}]")
    if not pip("--editable", f"{ROOT}[{options.extras}]"):
        return 1
    (VENV / f".installed-{options.extras}").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
