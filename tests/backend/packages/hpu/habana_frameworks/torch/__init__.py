"""The built device, with a module that has as little as Gaudi's may have.

There is no `empty_cache`, the allocator is one that torch.accelerator cannot ask, and streams and events are torch's.
"""

import apt_test_device_module as shared
import torch

device = shared.start("hpu", full=False)
_functions, _index = shared.questions(device)
shared.register(
    "hpu",
    {
        **_functions,
        "get_device_name": lambda where=None: f"built device {_index(where)}",
        "mem_get_info": lambda where=None: (device.memory() - device.allocated(_index(where)), device.memory()),
        "get_amp_supported_dtype": lambda: [torch.bfloat16],
    },
)
