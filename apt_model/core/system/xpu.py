"""Intel GPUs, by torch's own support; intel_extension_for_pytorch is at its end and is never imported."""

from typing import ClassVar, final

import torch

from apt_model.core.system.accelerator import Accelerator
from apt_model.core.system.presence import Presence


@final
class XpuDevice(Accelerator):
    """An Intel GPU behind `torch.xpu`."""

    kind = "xpu"
    standing = "logic-tested"
    patience = 20.0
    remedies: ClassVar[dict[str, str]] = {
        "installed": "pip install torch --index-url https://download.pytorch.org/whl/xpu, or take 'cpu'",
        "available": "see that xpu-smi discovery lists a GPU and that ZE_AFFINITY_MASK does not hide it, or take 'cpu'",
        "count": "see that ZE_AFFINITY_MASK does not hide all GPUs, or take 'cpu'",
    }

    @classmethod
    def _asked(cls) -> Presence:
        """What torch.xpu says, in a torch that was built for it."""
        if not torch.xpu._is_compiled():  # noqa: SLF001 - as torch.xpu itself asks
            return Presence(installed=False, why=f"torch {torch.__version__} is not built for Intel GPUs")
        return super()._asked()

    def supports_bf16(self) -> bool:
        """As torch answers, emulation left out."""
        return bool(torch.xpu.is_bf16_supported(including_emulation=False))
