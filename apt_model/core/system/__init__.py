"""The machine: which device there is, how much memory it has, what it computes in. Importing this loads no torch."""

from apt_model.core.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Accelerator": "apt_model.core.system.accelerator",
        "Device": "apt_model.core.system.device",
        "Presence": "apt_model.core.system.presence",
        "get_device": "apt_model.core.system.manager",
        "get_device_manager": "apt_model.core.system.manager",
        "triton_works": "apt_model.core.system.triton_probe",
    },
)
