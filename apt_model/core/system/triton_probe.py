"""Whether Triton works on a device, found out by one kernel: the vendors' packages of it overwrite one another."""

import functools
import importlib
from typing import NamedTuple

import torch

_BLOCK = 16


class Verdict(NamedTuple):
    """Whether it works, and why not."""

    works: bool
    why: str = ""


@functools.cache
def triton_works(device: torch.device) -> Verdict:
    """Compile a tiny kernel and run it on `device`, once a process; what it raises is the reason.

    This starts the device, and takes as long as a compilation does: for diagnosis, not for a hot path.
    """
    try:
        kernel = importlib.import_module("apt_model.core.system.triton_kernel").add_one
        source = torch.arange(_BLOCK, dtype=torch.float32).to(device)
        target = torch.zeros_like(source)
        kernel[(1,)](source, target, BLOCK=_BLOCK)
        right = torch.equal(target.cpu(), source.cpu() + 1)
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise anything
        return Verdict(works=False, why=f"{type(error).__name__}: {error}")
    return Verdict(works=right, why="" if right else "the kernel ran, and its numbers are wrong")
