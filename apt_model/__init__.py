"""APT-Transformer: train and run transformers that do not fit your accelerator, in plain PyTorch.

Importing this package loads neither torch nor triton and touches no device; each name below loads its module on use.
"""

from apt_model.core.lazy import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "APTModel": "apt_model.modeling.apt_model",
        "APTModelConfiguration": "apt_model.modeling.configuration",
        "get_device": "apt_model.core.system",
        "get_device_manager": "apt_model.core.system",
    },
)
