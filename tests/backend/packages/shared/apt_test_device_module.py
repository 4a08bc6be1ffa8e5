"""What both vendors' packages do here: load the built device, give it their name, and tell torch of a module for it."""

import importlib.machinery
import importlib.util
import os
import types

import torch

NAME = "apt_test_device"


def start(kind, *, full):
    """The built device's own functions, after torch knows its type as `kind`.

    Only one vendor's package can be a process's: torch has one name for what it does not know.
    """
    path = os.environ["APT_TEST_DEVICE_LIBRARY"]
    loader = importlib.machinery.ExtensionFileLoader(NAME, path)
    device = importlib.util.module_from_spec(importlib.util.spec_from_loader(NAME, loader))
    loader.exec_module(device)
    device.start(full)
    torch.utils.rename_privateuse1_backend(kind)
    return device


def register(kind, functions):
    """Make `torch.<kind>` of functions, and what torch adds to tensors and modules."""
    module = types.ModuleType(f"torch.{kind}")
    vars(module).update(functions)
    torch._register_device_module(kind, module)
    torch.utils.generate_methods_for_privateuse1_backend()


def questions(device):
    """The functions that every vendor's module has, written as they write them: devices by number, name or as such."""

    def index(where=None):
        if where is None:
            return device.current()
        found = torch.device(where).index if isinstance(where, str | torch.device) else where
        return device.current() if found is None else found

    def manual_seed_all(seed):
        for number in range(device.count()):
            device.seed(number, seed)

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": device.init,
        "init": device.init,
        "device_count": device.count,
        "current_device": device.current,
        "set_device": lambda where: device.set_current(index(where)),
        "manual_seed": lambda seed: device.seed(device.current(), seed),
        "manual_seed_all": manual_seed_all,
        "get_rng_state": lambda where=None: device.random_state(index(where)),
        "set_rng_state": lambda state, where=None: device.set_random_state(index(where), state),
        "synchronize": lambda where=None: device.synchronize(),  # noqa: ARG005 - torch passes it
        "memory_allocated": lambda where=None: device.allocated(index(where)),
        "max_memory_allocated": lambda where=None: device.peak(index(where)),
        "reset_peak_memory_stats": lambda where=None: device.reset_peak(index(where)),
    }, index
