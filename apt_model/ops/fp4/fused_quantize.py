"""The launch of the quantiser's kernel, and the rule that says when it stands in for the definition."""

import torch
from torch import Tensor

from apt_model.core.system import cuda
from apt_model.ops import HAS_TRITON
from apt_model.ops.fp4.format import NVFP4, Format

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Weights of a program, 16 a thread; its widest row.
_TILE, _WIDEST = 2048, 512


def applies(weight: Tensor) -> bool:
    """Whether the kernel quantises this weight: on a GPU, of a type that fp32 holds."""
    return weight.is_cuda and HAS_TRITON and weight.dtype in _TYPES


def quantize_rows(  # noqa: PLR0917 - what the definition takes, and where its two results go
    rows: Tensor,
    form: Format,
    window: tuple[int, int],
    global_scale: Tensor | None,
    cost: Tensor | None,
    packed: Tensor,
    scale: Tensor,
) -> None:
    """Write the bytes [R, P] and the bytes of the scales [R, G] of `rows` [R, K], in any memory order."""
    from apt_model.ops.fp4.kernel_quantize import quantize_kernel  # noqa: PLC0415 - Triton is not everywhere

    count, width = rows.shape
    with cuda.device_index(rows.device.index):
        launch = tile(width)
        grid = -(-count // launch["ROWS"]) * -(-width // launch["COLUMNS"])
        quantize_kernel[(grid,)](
            rows, global_scale, cost, packed, scale, count, width, packed.shape[1], scale.shape[1], *rows.stride(),
            FIRST=window[0], LAST=window[1], NVFP4=form is NVFP4, HAS_COST=cost is not None,
            **launch, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def tile(width: int) -> dict[str, int]:
    """Rows and columns of a program's tile: whole blocks, and no wider than the rows are."""
    columns = min(max(1 << (width - 1).bit_length(), 32), _WIDEST)
    return {"ROWS": _TILE // columns, "COLUMNS": columns}
