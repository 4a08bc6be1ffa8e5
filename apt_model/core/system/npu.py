"""Huawei Ascend, by Huawei's package torch_npu, which needs CANN."""

from typing import ClassVar, final

import torch

from apt_model.core.system.accelerator import Accelerator

_TORCH = str(torch.__version__).partition("+")[0]


@final
class NpuDevice(Accelerator):
    """An Ascend NPU behind `torch.npu`."""

    kind = "npu"
    package = "torch_npu"
    standing = "backend-tested"
    remedies: ClassVar[dict[str, str]] = {
        "installed": "install CANN, and beside a CPU build of torch the torch-npu of its version: "
        f"pip install torch-npu=={_TORCH} (https://github.com/Ascend/pytorch), or take 'cpu'",
        "loads": "put CANN's libraries on the path: source /usr/local/Ascend/ascend-toolkit/set_env.sh (or where CANN "
        "is); a machine without an NPU does without: pip uninstall torch-npu",
        "available": "see that npu-smi info lists a device and that ASCEND_RT_VISIBLE_DEVICES does not hide it, or "
        "take 'cpu'",
        "count": "see that ASCEND_RT_VISIBLE_DEVICES does not hide all devices, or take 'cpu'",
    }
