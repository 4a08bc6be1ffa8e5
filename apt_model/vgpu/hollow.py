"""Models whose values are still in files: memory for them that is not touched, and its filling a block at a time."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apt_model.core.errors import CheckpointError
from apt_model.core.tensor_files import read_bytes
from apt_model.core.tensor_io import as_bytes
from apt_model.vgpu.blob import bytes_of
from apt_model.vgpu.disk_foreign import Piece
from apt_model.vgpu.layout import Packing
from apt_model.vgpu.tree import Stored
from apt_model.vgpu.weights import InFile, Weights

_SHOWN = 3
_PIECE = 64 << 20


class _Spot(NamedTuple):
    """Where a model holds a tensor."""

    module: nn.Module
    key: str
    name: str
    before: nn.Parameter


class _Due(NamedTuple):
    """A parameter whose values are to come."""

    module: nn.Module
    key: str
    name: str
    """By which the weights know it."""


class Hollow:
    """Gives a model's parameters memory in which nothing is yet, and then their values as blocks ask for them.

    The memory is that of the CPU, of which the system gives a page when it is written to: never more than a block's.

    Args:
        model: its parameters may be on meta; all that are must be in `weights`.
        weights: values by name. Those that the model does not have are left alone.
        device: the one that layers with an order of their own (`order_for`) are ordered for.

    Raises:
        CheckpointError: a value is missing or of another shape; the model is as it was.
    """

    def __init__(self, model: nn.Module, weights: Weights, device: torch.device) -> None:
        self._weights, self._device = weights, device
        self._spots = _spots(model)
        self._due: dict[int, _Due] = {}
        self._ordered: dict[int, dict[str, Tensor]] = {}  # by module: tensors that nobody has asked for yet
        named = [(spots, self._name_of(spots)) for spots in self._spots]
        self._check(named)
        self._buffers(model)
        for spots, name in named:
            self._empty(spots, name)

    def undo(self) -> None:
        """Give the model its parameters back as they were."""
        for spots in self._spots:
            for spot in spots:
                spot.module._parameters[spot.key] = spot.before  # noqa: SLF001

    def fill(self, blob: Packing, memory: Tensor) -> None:
        """Put the values of a blob into `memory` (uint8 of any device)."""
        for stored, offset in blob.stored:
            target, due = memory[offset : offset + stored.nbytes], self._due.get(id(stored.parameters[0]))
            place = self._place(stored)
            if due is None:
                target.copy_(bytes_of(stored))
            elif place is not None:
                _read(place, target)
            else:
                parameter, values = stored.parameters[0], self._values(due)
                if values.shape != parameter.shape:
                    raise _wrong(due.name, parameter, tuple(values.shape))
                target.view(parameter.dtype).view(parameter.shape).copy_(values)

    def pieces(self, blob: Packing) -> list[Piece] | None:
        """Where a blob lies in files, byte for byte; None where it does not."""
        found = []
        for stored, offset in blob.stored:
            place = self._place(stored)
            if place is None:
                return None
            found.append(Piece(offset, place.path, place.start, place.size))
        return found

    def _name_of(self, spots: list[_Spot]) -> str | None:
        """The name by which the weights know a parameter."""
        return next((spot.name for spot in spots if spot.name in self._weights), None)

    def _check(self, named: Iterable[tuple[list[_Spot], str | None]]) -> None:
        missing = [spots[0].name for spots, name in named if name is None and spots[0].before.is_meta]
        if missing:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise CheckpointError(
                f"{len(missing)} parameters have no values in the files: {', '.join(missing[:_SHOWN])}{more}",
                state="the model is as it was",
                remedy="the files are of another model, or not all there",
            )
        for spots, name in named:
            kind = None if name is None or _has_order(spots[0].module) else self._weights.kind(name)
            if kind is not None and kind[1] != tuple(spots[0].before.shape):
                raise _wrong(str(name), spots[0].before, kind[1])

    def _buffers(self, model: nn.Module) -> None:
        for prefix, module in model.named_modules():
            for key, buffer in list(module._buffers.items()):  # noqa: SLF001
                name = f"{prefix}.{key}" if prefix else key
                if buffer is not None and name in self._weights:
                    module._buffers[key] = self._weights.read(name).to(buffer.dtype)  # noqa: SLF001
                elif buffer is not None and buffer.is_meta:
                    raise CheckpointError(
                        f"the buffer {name} is on the meta device, and the files have no values for it",
                        state="the model is as it was but for buffers",
                        remedy="make the model's buffers with values; only its parameters may be on meta",
                    )

    def _empty(self, spots: list[_Spot], name: str | None) -> None:
        if name is None:
            return
        before = spots[0].before
        made = nn.Parameter(torch.empty(before.shape, dtype=before.dtype, device="cpu"), before.requires_grad)
        vars(made).update(vars(before))
        self._due[id(made)] = _Due(spots[0].module, spots[0].key, name)
        for spot in spots:
            spot.module._parameters[spot.key] = made  # noqa: SLF001

    def _values(self, due: _Due) -> Tensor:
        order: Callable[..., dict[str, Tensor]] | None = getattr(due.module, "ordered", None)
        if order is None:
            return self._weights.read(due.name)
        waiting = self._ordered.get(id(due.module), {})
        if due.key not in waiting:
            prefix = due.name.removesuffix(due.key)
            waiting = order(lambda key: self._weights.read(prefix + key), self._device)
        value = waiting.pop(due.key)
        self._ordered[id(due.module)] = waiting
        return value

    def _place(self, stored: Stored) -> InFile | None:
        due, parameter = self._due.get(id(stored.parameters[0])), stored.parameters[0]
        if due is None or _has_order(due.module):
            return None
        kind = self._weights.kind(due.name)
        same = kind == (parameter.dtype, tuple(parameter.shape))
        return self._weights.place(due.name) if same else None


def _spots(model: nn.Module) -> list[list[_Spot]]:
    """Of each parameter, all places in which the model holds it."""
    found: dict[int, list[_Spot]] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():  # noqa: SLF001
            if parameter is not None:
                name = f"{prefix}.{key}" if prefix else key
                found.setdefault(id(parameter), []).append(_Spot(module, key, name, parameter))
    return list(found.values())


def _read(place: InFile, target: Tensor) -> None:
    """Bytes of a file into memory, on another device a piece at a time."""
    step = len(target) if target.device.type == "cpu" else _PIECE
    for at in range(0, place.size, step):
        part = target[at : at + step]
        memory = part if target.device.type == "cpu" else torch.empty_like(part, device="cpu")
        read_bytes(place.path, place.start + at, as_bytes(memory))
        if memory is not part:
            part.copy_(memory)


def _has_order(module: nn.Module) -> bool:
    return bool(getattr(module, "orders", None))


def _wrong(name: str, parameter: Any, found: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{name}: expected {list(parameter.shape)}, and the files have {list(found)}",
        state="the model is as it was",
        remedy="the files are of another model, or of another size of it",
    )
