"""Host memory at its peak while a saved model comes to a stack, over the model's bytes; beside loading it as usual.

    python benchmarks/vgpu/building.py [--blocks 16] [--small] [--out FOLDER]

Each arm is a process of its own: it starts the device, notes its resident memory, builds, and tells the peak (VmHWM, set
back before) and the seconds. The files are dropped from the page cache before each. The stack's first level has room for
three blocks, the second for all. The peers load the file whole and move that to the stack, or to pinned memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks import record
from benchmarks.fp4.cells import DEVICE
from benchmarks.vgpu.stack_of_blocks import bytes_of, stack_of
from benchmarks.vgpu.streaming import GPU

ARMS = ("attach(weights=folder)", "load_file, then attach", "load_file, then pinned")


def peak() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def stack_for(nbytes: int, blocks: int):
    from apt_model.optimization import VGPUStack

    each = nbytes / blocks / 1e6
    levels = [{"capacity_mb": 3 * each + 8, "device": GPU}, {"capacity_mb": nbytes / 1e6 + each + 8, "device": "cpu"}]
    return VGPUStack({"levels": levels})


def build(arm: str, folder: Path, blocks: int, *, small: bool) -> None:
    """One arm, in this process."""
    from safetensors.torch import load_file

    torch.ones(1, device=GPU)
    stack = stack_for(bytes_of(stack_of(1, "meta", small=small)), 1)
    stack.attach(torch.nn.Linear(8, 8))  # what is loaded once for all
    model = stack_of(blocks, "meta", small=small)
    nbytes = bytes_of(model)
    stack = stack_for(nbytes, blocks)
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = peak(), time.perf_counter()
    if arm == ARMS[0]:
        stack.attach(model, weights=folder)
    else:
        model = stack_of(blocks, "meta", small=small)
        model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        if arm == ARMS[1]:
            stack.attach(model)
        else:
            for parameter in model.parameters():
                parameter.data = parameter.data.pin_memory() if DEVICE == "cuda" else parameter.data.clone()
    seconds = time.perf_counter() - begin
    print(json.dumps({"arm": arm, "over_bytes": (peak() - before) / nbytes, "seconds": seconds, "bytes": nbytes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, help="default 16; 6 with --small")
    parser.add_argument("--small", action="store_true", help="a tiny model, to check the script without a GPU")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results/<device>")
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    blocks = given.blocks or (6 if given.small else 16)
    if given.arm:
        build(given.arm[0], Path(given.arm[1]), blocks, small=given.small)
        return
    from safetensors.torch import save_file

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(stack_of(blocks, GPU, small=given.small).state_dict(), file)
        for arm in ARMS:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
            command = [sys.executable, __file__, "--arm", arm, folder, "--blocks", str(blocks)]
            command += ["--small"] if given.small else []
            done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - this very script
            if done.returncode:
                print(f"{arm}: {done.stderr[-800:]}")
                continue
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    print(record.write("vgpu_building", rows, folder=given.out))


if __name__ == "__main__":
    main()
