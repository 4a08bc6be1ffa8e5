"""Other people's files and libraries: compressed-tensors, ModelOpt, Hugging Face. Each module loads what it needs.

The names below load transformers on first use, register `apt_fp4` with it, and teach PEFT's LoRA the packed layers.
"""

from apt_model.core.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "AptFP4Config": "apt_model.integrations.transformers_fp4",
        "prepare_for_training": "apt_model.integrations.transformers_fp4",
    },
)
