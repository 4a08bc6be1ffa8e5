"""Tensors of torch to the wire and back, and weights as one safetensors file; nothing is copied that need not be."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from apt_model.cloud.identity import described, digest_of
from apt_model.cloud.int8g64 import GROUP
from apt_model.cloud.wire import Buffer, WireTensor
from apt_model.core.errors import InputError, WireError
from apt_model.core.tensor_io import DTYPES as FILE_DTYPES
from apt_model.core.tensor_io import as_bytes

DTYPES = {
    "BOOL": torch.bool, "UINT8": torch.uint8, "INT8": torch.int8, "INT16": torch.int16, "INT32": torch.int32,
    "INT64": torch.int64, "FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32, "FP64": torch.float64,
}  # fmt: skip
"""By the protocol's names."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_IN_FILES = {dtype: name for name, dtype in FILE_DTYPES.items()}
_SENT = tuple(dtype for dtype in NAMES if dtype != torch.int16)
"""What our layers have."""
ACTIVATIONS = (torch.float16, torch.bfloat16, torch.float32)
"""What a server computes with."""


def data_of(tensor: Tensor) -> Buffer:
    """The bytes of a tensor, rows first, without a copy where it lies so in the CPU's memory."""
    if sys.byteorder != "little":
        raise InputError("the wire is little endian, this machine is not")
    return as_bytes(tensor.cpu().contiguous())


def to_wire(name: str, tensor: Tensor) -> WireTensor:
    """A tensor as it travels."""
    _check(name, tensor)
    return WireTensor(name, NAMES[tensor.dtype], tuple(tensor.shape), data_of(tensor))


def as_tensor(wire: WireTensor) -> Tensor:
    """The tensor: over the message's own memory where that is aligned and may be written, else a copy."""
    dtype = DTYPES[wire.datatype]
    if math.prod(wire.shape) == 0:
        return torch.empty(wire.shape, dtype=dtype)
    data: Any = memoryview(wire.data)
    if data.readonly:
        data = bytearray(data)
    if dtype == torch.bool:  # bytes other than 0 and 1 are no booleans
        return (torch.frombuffer(data, dtype=torch.uint8) != 0).view(wire.shape)
    found = torch.frombuffer(data, dtype=dtype)
    if found.data_ptr() % dtype.itemsize:
        found = torch.frombuffer(data, dtype=torch.uint8).clone().view(dtype)
    return found.view(wire.shape)


def from_wire(tensors: Mapping[str, WireTensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor of that name, on the CPU, a view of the answer's memory; `WireError` where it is another one."""
    found = tensors.get(name)
    expected = (NAMES[dtype], shape)
    whole = (*shape[:-1], -(-shape[-1] // GROUP) * GROUP) if shape else shape
    if found is not None and dtype == torch.int8 and found.shape == whole != shape:
        # int8g64 may come in whole groups.
        return from_wire(tensors, name, dtype, whole)[..., : shape[-1]].contiguous()
    if found is None or (found.datatype, found.shape) != expected:
        got = "none" if found is None else f"{found.datatype} {list(found.shape)}"
        raise WireError(f"expected the tensor {name!r} as {expected[0]} {list(shape)}, got {got}")
    return as_tensor(found)


def _check(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _SENT:
        raise InputError(f"{name}: expected one of {', '.join(map(str, _SENT))}, got {tensor.dtype}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """A block's weights: what a server is given, and what it is called there."""

    kind: str
    """Of the block, such as "linear": one that the server knows."""
    config: Mapping[str, Any]
    """Of JSON's types."""
    tensors: Mapping[str, Tensor] = field(repr=False)

    @cached_property
    def version(self) -> str:
        """The digest of all of it; weights that change are other weights, with another version."""
        return digest_of(described(self.kind, self.config), self._raw)

    @property
    def model(self) -> str:
        """The name it has on a server."""
        return f"apt-{self.kind}"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def file(self) -> list[Buffer]:
        """One safetensors file, in pieces: the header, then each tensor's bytes where they lie."""
        head: dict[str, Any] = {"__metadata__": {"kind": self.kind, "config": json.dumps(self.config, sort_keys=True)}}
        place = 0
        parts: list[Buffer] = []
        for name, (dtype, shape, data) in sorted(self._raw.items()):
            size = memoryview(data).nbytes
            head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
            place += size
            parts.append(data)
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return [len(text).to_bytes(8, "little") + text, *parts]

    @property
    def _raw(self) -> dict[str, tuple[str, tuple[int, ...], Buffer]]:
        for name, tensor in self.tensors.items():
            _check(name, tensor)
        return {
            name: (_IN_FILES[tensor.dtype], tuple(tensor.shape), data_of(tensor))
            for name, tensor in self.tensors.items()
        }
