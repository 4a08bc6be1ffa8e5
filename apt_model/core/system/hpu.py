"""Intel Gaudi, by Intel's package habana_frameworks."""

from typing import ClassVar, final

from apt_model.core.system.accelerator import Accelerator


@final
class HpuDevice(Accelerator):
    """A Gaudi accelerator behind `torch.hpu`.

    `torch.hpu.init()` reserves the device, so that it is never called here: `is_available` and `device_count` tell what
    there is. Gaudi's module has no `empty_cache`.
    """

    kind = "hpu"
    package = "habana_frameworks.torch"
    standing = "backend-tested"
    remedies: ClassVar[dict[str, str]] = {
        "installed": "work in Intel's container for Gaudi, whose torch comes with habana_frameworks "
        "(https://docs.habana.ai/en/latest/Installation_Guide), or take 'cpu'",
        "loads": "take the container whose release fits the driver: hl-smi shows the driver's; or take 'cpu'",
        "available": "see that hl-smi lists a device, that no other process holds it, and that "
        "HABANA_VISIBLE_MODULES does not hide it, or take 'cpu'",
        "count": "see that HABANA_VISIBLE_MODULES does not hide all devices, or take 'cpu'",
    }

    def supports_bf16(self) -> bool:
        """All Gaudis multiply bf16."""
        return True
