"""Stands in for Huawei's package of this name: the built device, with a module that has all that theirs has for us."""

import apt_test_device_module as shared
import torch

device = shared.start("npu", full=True)
_functions, _index = shared.questions(device)


def _stream(device=None):
    return torch.Stream(device=device or "npu")


def _event(enable_timing=False):
    return torch.Event(device="npu", enable_timing=enable_timing)


shared.register(
    "npu",
    {
        **_functions,
        "empty_cache": device.empty_cache,
        "get_device_name": lambda where=None: f"built device {_index(where)}",
        "mem_get_info": lambda where=None: (device.memory() - device.allocated(_index(where)), device.memory()),
        "memory_reserved": lambda where=None: device.allocated(_index(where)),
        "is_bf16_supported": lambda: True,
        "Stream": _stream,
        "Event": _event,
        "current_stream": lambda where=None: torch.accelerator.current_stream(_index(where)),
        "stream": lambda stream: stream,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
    },
)
