"""What makes models fit and run fast: a table of names, each loaded on first use. Imports neither torch nor triton."""

from apt_model.core.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "get_device": "apt_model.core.system",
        "get_device_manager": "apt_model.core.system",
        "vb_global": "apt_model.optimization.vb_global",
    },
)
