"""How the tensors of a block lie in one piece of memory, and how they are seen there."""

import dataclasses

import torch
from torch import Tensor, nn

from apt_model.core.errors import InputError
from apt_model.vgpu.layout import Packing
from apt_model.vgpu.tree import Stored


@dataclasses.dataclass(frozen=True)
class Seen:
    """A parameter in a blob."""

    parameter: nn.Parameter
    offset: int  # of its storage, in bytes
    nbytes: int  # of its storage
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int

    def view(self, memory: Tensor) -> Tensor:
        """In `memory` (uint8) that holds the blob from its start."""
        storage = memory[self.offset : self.offset + self.nbytes].view(self.dtype)
        return storage.as_strided(self.size, self.stride, storage.storage_offset() + self.storage_offset)


@dataclasses.dataclass(eq=False)
class Packed(Packing):
    """Storages of a model in memory that move together."""

    seen: list[Seen]

    def fill(self, memory: Tensor) -> None:
        """Copy the values of all its storages to `memory` (uint8)."""
        for stored, offset in self.stored:
            memory[offset : offset + stored.nbytes].copy_(bytes_of(stored))


def set_values(parameter: Tensor, values: Tensor) -> None:
    """`parameter.data = values`, of a buffer too, also between devices whose tensors torch takes for other kinds.

    It does so for devices that it does not know by itself (Ascend's): there the parameter becomes a new one's content,
    and stays the same object to all that hold it.
    """
    if torch._has_compatible_shallow_copy_type(parameter, values):  # noqa: SLF001 - as nn.Module.to asks
        parameter.data = values
        return
    grad, parameter.grad = parameter.grad, None
    fresh = nn.Parameter(values, parameter.requires_grad) if isinstance(parameter, nn.Parameter) else values.detach()
    vars(fresh).update(vars(parameter))
    fresh.__class__ = type(parameter)
    try:
        torch.utils.swap_tensors(parameter, fresh)
    except RuntimeError as error:
        parameter.grad = grad
        raise InputError(
            f"a parameter of {tuple(parameter.shape)} cannot move from {parameter.device} to {values.device}, as "
            f"something holds on to it: {error}",
            remedy="attach the model before a graph, an optimizer's hooks or weak references are made of it",
        ) from error
    parameter.grad = None if grad is None else grad.to(values.device)


def bytes_of(stored: Stored) -> Tensor:
    """A storage as bytes, where it is."""
    storage = stored.parameters[0].untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),))  # type: ignore[call-overload]


def see(packing: Packing) -> Packed:
    """How the parameters of a model in memory are seen in a blob."""
    seen = []
    for each, at in packing.stored:
        for parameter in each.parameters:
            data = parameter.data
            size = each.nbytes // data.element_size() * data.element_size()
            seen.append(
                Seen(
                    parameter, at, size, data.dtype, tuple(data.shape), tuple(data.stride()), int(data.storage_offset())
                )
            )
    return Packed(packing.name, packing.nbytes, packing.stored, seen)
