"""The memory that a request's body is read into, and the types that forwards take."""

from typing import Any

import numpy as np

FLOATS = ("FP16", "BF16", "FP32")
_ALIGNMENT = 64
_SHORT = 1 << 16


def body_buffer(nbytes: int, json_length: int) -> memoryview:
    """Memory for a body, placed so that what follows its JSON is aligned. Pages come as bytes arrive."""
    lead = -json_length % _ALIGNMENT
    if nbytes <= _SHORT:
        return memoryview(bytearray(lead + nbytes))[lead:]  # aligned enough, and made sooner
    buffer: Any = np.empty(lead + nbytes, dtype=np.uint8)  # made with less code than a tensor of torch
    return memoryview(buffer)[lead:]
