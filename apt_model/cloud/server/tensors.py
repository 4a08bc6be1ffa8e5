"""Torch tensors from a message's bytes without copies, and back."""

import math
from typing import Any

import torch
from torch import Tensor

from apt_model.cloud.wire import WireTensor
from apt_model.core.tensor_io import as_bytes

DTYPES = {
    "BOOL": torch.bool, "UINT8": torch.uint8, "INT8": torch.int8, "INT16": torch.int16, "INT32": torch.int32,
    "INT64": torch.int64, "FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32, "FP64": torch.float64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("FP16", "BF16", "FP32")
_ALIGNMENT = 64


def body_buffer(nbytes: int, json_length: int) -> memoryview:
    """Memory for a body, placed so that what follows its JSON is aligned. Pages come as bytes arrive."""
    lead = -json_length % _ALIGNMENT
    return as_bytes(torch.empty(lead + nbytes, dtype=torch.uint8))[lead:]


def as_tensor(wire: WireTensor) -> Tensor:
    """The tensor: over the message's own memory where that is aligned and may be written, else a copy."""
    dtype = DTYPES[wire.datatype]
    if math.prod(wire.shape) == 0:
        return torch.empty(wire.shape, dtype=dtype)
    data: Any = memoryview(wire.data)
    raw = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)
    if dtype == torch.bool:  # bytes other than 0 and 1 are no booleans
        return (raw != 0).view(wire.shape)
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(wire.shape)


def as_wire(name: str, tensor: Tensor) -> WireTensor:
    """The tensor as it travels; what is not on the CPU or not contiguous is copied."""
    here = tensor.detach().to("cpu").contiguous()
    return WireTensor(name, NAMES[here.dtype], tuple(here.shape), as_bytes(here))
