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

_NAMES = {
    torch.float16: ("FP16", "F16"), torch.bfloat16: ("BF16", "BF16"), torch.float32: ("FP32", "F32"),
    torch.float64: ("FP64", "F64"), torch.int8: ("INT8", "I8"), torch.uint8: ("UINT8", "U8"),
    torch.int32: ("INT32", "I32"), torch.int64: ("INT64", "I64"), torch.bool: ("BOOL", "BOOL"),
}  # fmt: skip
_BY_WIRE = {wire: dtype for dtype, (wire, _) in _NAMES.items()}
ACTIVATIONS = (torch.float16, torch.bfloat16, torch.float32)
"""What a server computes with."""


def data_of(tensor: Tensor) -> Buffer:
    """The bytes of a tensor, rows first, without a copy where it lies so in the CPU's memory."""
    if sys.byteorder != "little":
        raise InputError("the wire is little endian, this machine is not")
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def to_wire(name: str, tensor: Tensor) -> WireTensor:
    """A tensor as it travels."""
    if tensor.dtype not in _NAMES:
        raise InputError(f"{name}: expected one of {', '.join(map(str, _NAMES))}, got {tensor.dtype}")
    return WireTensor(name, _NAMES[tensor.dtype][0], tuple(tensor.shape), data_of(tensor))


def from_wire(tensors: Mapping[str, WireTensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor of that name, on the CPU, a view of the answer's memory; `WireError` where it is another one."""
    found = tensors.get(name)
    expected = (_NAMES[dtype][0], shape)
    whole = (*shape[:-1], -(-shape[-1] // GROUP) * GROUP) if shape else shape
    if found is not None and dtype == torch.int8 and found.shape == whole != shape:
        # int8g64 may come in whole groups.
        return from_wire(tensors, name, dtype, whole)[..., : shape[-1]].contiguous()
    if found is None or (found.datatype, found.shape) != expected:
        got = "none" if found is None else f"{found.datatype} {list(found.shape)}"
        raise WireError(f"expected the tensor {name!r} as {expected[0]} {list(shape)}, got {got}")
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    data = found.data if not memoryview(found.data).readonly else bytearray(found.data)
    # Behind the JSON a tensor may begin at any byte; torch wants whole elements.
    view = torch.frombuffer(data, dtype=torch.uint8)
    if view.data_ptr() % dtype.itemsize:
        view = view.clone()
    return view.view(_BY_WIRE[found.datatype]).view(shape)


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
            if tensor.dtype not in _NAMES:
                raise InputError(f"{name}: expected one of {', '.join(map(str, _NAMES))}, got {tensor.dtype}")
        return {
            name: (_NAMES[tensor.dtype][1], tuple(tensor.shape), data_of(tensor))
            for name, tensor in self.tensors.items()
        }
