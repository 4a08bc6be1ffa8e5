"""Tensors under keys, in whichever level has room: what is used stays high, and what has to make room moves down."""

import dataclasses
import functools
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from apt_model.core.errors import CapacityError, InputError
from apt_model.vgpu.arena import Region
from apt_model.vgpu.disk import DiskStore
from apt_model.vgpu.level import Level
from apt_model.vgpu.memory import Memory
from apt_model.vgpu.units import padded, shown


@dataclasses.dataclass(eq=False)
class _Entry:
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    held: Any = None
    """What its level holds of it."""

    @property
    def room(self) -> int:
        return padded(max(self.nbytes, 1))


class _OnDevice:
    """Entries as tensors of their own on level 1."""

    def __init__(self, level: Level, memory: Memory) -> None:
        self.level, self._lanes, self._clock = level, memory.lanes, memory.clock

    def keep(self, entry: _Entry, data: Tensor) -> Any:
        with self.level.taken(entry.room, f"tensor {entry.key!r}"):
            held = torch.empty(entry.nbytes, dtype=torch.uint8, device=self._lanes.device)
            stream = self._lanes.compute()
            begin = self._clock.mark(stream)
            held.copy_(data)
            self.level.came.count(entry.nbytes)
            took = functools.partial(self.level.came.took, entry.key, entry.nbytes)
            self._clock.between(begin, self._clock.mark(stream), took)
            return held

    def bytes_of(self, entry: _Entry) -> Tensor:
        held: Tensor = entry.held
        return held

    def drop(self, entry: _Entry, _held: Any) -> None:
        self.level.give(entry.room)


class _OnHost:
    """Entries in the arena."""

    def __init__(self, level: Level, memory: Memory) -> None:
        self.level, self._memory = level, memory

    def keep(self, entry: _Entry, data: Tensor) -> Any:
        region = self._memory.take_host(entry.room, f"tensor {entry.key!r}")
        with self.level.came.start(entry.key, entry.nbytes):
            region.tensor[: entry.nbytes].copy_(data)
        return region

    def bytes_of(self, entry: _Entry) -> Tensor:
        region: Region = entry.held
        return region.tensor[: entry.nbytes]

    def drop(self, _entry: _Entry, held: Any) -> None:
        self._memory.give_host(held)


class _OnDisk:
    """Entries as files."""

    def __init__(self, level: Level, store: DiskStore) -> None:
        self.level, self._store = level, store

    def keep(self, entry: _Entry, data: Tensor) -> Any:
        name = f"key-{id(entry)}-{entry.key}"
        with self.level.taken(entry.room, f"tensor {entry.key!r}"):
            self._store.write(name, data.cpu())
        return name

    def bytes_of(self, entry: _Entry) -> Tensor:
        memory = torch.empty(entry.room, dtype=torch.uint8)
        self._store.read(entry.held, memory)
        return memory[: entry.nbytes]

    def drop(self, entry: _Entry, held: Any) -> None:
        self._store.delete(held)
        self.level.give(entry.room)


class KeyedTensors:
    """What `VGPUStack.put` and `get` keep; the caller holds a lock."""

    def __init__(self, memory: Memory) -> None:
        self._device = memory.lanes.device
        self._tiers: list[Any] = [_OnDevice(memory.first, memory)]
        if memory.host is not None:
            self._tiers.append(_OnHost(memory.host, memory))
        if memory.disk is not None and memory.store is not None:
            self._tiers.append(_OnDisk(memory.disk, memory.store))
        # By level, what was used longest ago first.
        self._held: list[OrderedDict[str, _Entry]] = [OrderedDict() for _ in self._tiers]

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep a copy of `tensor`; what the key had before goes when the new one is kept."""
        if not isinstance(key, str):
            raise InputError(f"VGPUStack.put: expected a key of type str, got {type(key).__name__}")
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise InputError(f"VGPUStack.put({key!r}): expected a dense torch.Tensor, got {type(tensor).__name__}")
        plain = tensor.detach().contiguous()
        # One element counts as contiguous whatever its stride is, with which it has no view as bytes.
        data = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)
        before = self._find(key)
        entry = _Entry(key, tensor.dtype, tuple(tensor.shape), data.numel())
        at, entry.held = self._keep(entry, data, 0, spared=key)
        if before is not None:
            self._remove(key, before)
        self._held[at][key] = entry

    def get(self, key: str) -> Tensor:
        """A copy of what the key has, on level 1's device."""
        at = self._find(key)
        if at is None:
            raise KeyError(key)
        for above in range(at):
            self._tiers[above].level.found(False)
        self._tiers[at].level.found(True)
        entry = self._held[at][key]
        data = self._tiers[at].bytes_of(entry)
        if at > 0:
            data = self._promote(entry, at, data)
            if key not in self._held[0]:
                self._went(entry, at)
        else:
            self._held[0].move_to_end(key)
        copied = data.to(self._device, copy=True)
        return copied.view(entry.dtype).reshape(entry.shape)

    def promote(self, key: str) -> None:
        """Bring a key to level 1 where it fits; one that is not there is left alone."""
        at = self._find(key)
        if at:
            entry = self._held[at][key]
            self._promote(entry, at, self._tiers[at].bytes_of(entry))

    def delete(self, key: str) -> None:
        """Forget what the key has."""
        at = self._find(key)
        if at is None:
            raise KeyError(key)
        self._remove(key, at)

    def clear(self) -> None:
        """Forget everything."""
        for at, held in enumerate(self._held):
            for key in list(held):
                self._remove(key, at)

    def __contains__(self, key: object) -> bool:
        return any(key in held for held in self._held)

    def __len__(self) -> int:
        return sum(map(len, self._held))

    def _find(self, key: object) -> int | None:
        return next((at for at, held in enumerate(self._held) if key in held), None)

    def _remove(self, key: str, at: int) -> None:
        entry = self._held[at].pop(key)
        self._tiers[at].drop(entry, entry.held)

    def _promote(self, entry: _Entry, at: int, data: Tensor) -> Tensor:
        """Move an entry to level 1, and give its bytes there; where it cannot go up they are given as they are."""
        level = self._tiers[0].level
        if entry.room > level.capacity:
            self._held[at].move_to_end(entry.key)
            return data
        # It keeps its place below until it is above: others that make room may need the level below for themselves.
        try:
            held = self._make(entry, data, 0, spared=entry.key)
        except CapacityError:
            return data
        self._went(entry, at)
        self._remove(entry.key, at)
        entry.held = held
        self._held[0][entry.key] = entry
        return self._tiers[0].bytes_of(entry)

    def _keep(self, entry: _Entry, data: Tensor, first: int, spared: str) -> tuple[int, Any]:
        """Put an entry into the highest level from `first` on that takes it; which one, and what it holds of it."""
        fault: CapacityError | None = None
        for at in range(first, len(self._tiers)):
            try:
                return at, self._make(entry, data, at, spared)
            except CapacityError as error:  # noqa: PERF203 - of three levels at most
                fault = error
        levels = ", ".join(
            f"{shown(tier.level.free)} free on {tier.level.config.device}" for tier in self._tiers[first:]
        )
        raise CapacityError(
            f"tensor {entry.key!r} takes {shown(entry.room)}, and no level has room: {levels or 'no level is below'}",
            state="nothing was moved or lost that was there",
            remedy="delete keys, or give a level more",
        ) from fault

    def _make(self, entry: _Entry, data: Tensor, at: int, spared: str) -> Any:
        """Keep an entry on a level, whose others move down until there is room."""
        tier = self._tiers[at]
        while True:
            if entry.room <= tier.level.free:
                try:
                    return tier.keep(entry, data)
                except CapacityError:  # the arena has no piece so large
                    if not self._move_down(at, spared):
                        raise
                    continue
            movable = sum(each.room for key, each in self._held[at].items() if key != spared)
            if entry.room > tier.level.free + movable or not self._move_down(at, spared):
                raise CapacityError(f"{tier.level.config.device} cannot hold {shown(entry.room)} more")

    def _move_down(self, at: int, spared: str) -> bool:
        """Move what was used longest ago on a level to one below; False where there is nothing, or nowhere to."""
        key = next((key for key in self._held[at] if key != spared), None)
        if key is None or at + 1 >= len(self._tiers):
            return False
        entry, tier = self._held[at][key], self._tiers[at]
        try:
            below, held = self._keep(entry, tier.bytes_of(entry), at + 1, spared)
        except CapacityError:
            return False
        self._remove(key, at)
        entry.held = held
        self._held[below][key] = entry
        tier.level.evicted()
        self._went(entry, at)
        return True

    def _went(self, entry: _Entry, at: int) -> None:
        """Count a copy from a level; from the disk it is a read, which the store counted."""
        if not isinstance(self._tiers[at], _OnDisk):
            self._tiers[at].level.went.count(entry.nbytes)
