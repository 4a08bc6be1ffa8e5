"""Torch tensors from and into safetensors files, a piece at a time."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt_model.core.tensor_files import Entry, read_piece

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

_NOT_NUMPYS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's own memory; it must be on the CPU and contiguous."""
    flat = tensor.detach()
    if flat.dtype in _NOT_NUMPYS:
        flat = flat.reshape(-1).view(torch.uint8)
    array: Any = flat.numpy()
    return memoryview(array.reshape(-1).view("u1"))  # with numpy's views, which take less time than torch's


def read_tensor(path: Path, entry: Entry) -> Tensor:
    """A whole tensor."""
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    if entry.size:
        read_piece(path, entry, 0, as_bytes(tensor))
    return tensor


def read_rows(path: Path, entry: Entry, first: int, count: int) -> Tensor:
    """Rows first .. first + count - 1 [count, K] of a tensor [..., K], its other dimensions taken as one."""
    rows = torch.empty(count, entry.shape[-1], dtype=DTYPES[entry.dtype])
    read_piece(path, entry, first * rows.shape[1] * rows.itemsize, as_bytes(rows))
    return rows
