"""A model in the levels of a stack: how its blocks are moved there, and given back."""

import ctypes
import dataclasses
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apt_model.core.errors import CapacityError, InputError
from apt_model.core.placement import is_placed, mark_placed
from apt_model.vgpu.arena import HostArena, Region
from apt_model.vgpu.blob import Packed, Seen, see, set_values
from apt_model.vgpu.hollow import Hollow
from apt_model.vgpu.layout import Layout
from apt_model.vgpu.level import Level
from apt_model.vgpu.memory import Lent, Memory
from apt_model.vgpu.places import Places, Source
from apt_model.vgpu.planner import DEVICE, DISK
from apt_model.vgpu.streaming import Streaming
from apt_model.vgpu.units import padded

LOG = logging.getLogger(__name__)
# Bytes of host memory that are pinned at once at least: of each piece a part may be lost, and pinning has a price.
_BATCH = 256 << 20


def check(model: nn.Module) -> None:
    """Refuse a model some of whose parameters another has, or this one twice."""
    for name, parameter in model.named_parameters():
        if is_placed(parameter):
            raise InputError(
                f"{name} is attached to a VGPUStack already, with the model or a part of it",
                remedy="detach that one first",
            )


def prepare(model: nn.Module, device: torch.device) -> None:
    """Have layers bring their weights into the order in which they compute on `device`: bytes then stay as they are."""
    for module in model.modules():
        order = getattr(module, "order_for", None)
        if callable(order):
            order(device)


def leave_order(model: nn.Module, device: torch.device) -> None:
    """Undo `prepare` for layers that are elsewhere."""
    for module in model.modules():
        leave = getattr(module, "leave_order", None)
        first = next(module.parameters(recurse=False), None)
        if callable(leave) and first is not None and first.device != device:
            leave()


class Attached:
    """What a stack holds of one model."""

    def __init__(
        self, model: nn.Module, layout: Layout, memory: Memory, prefix: str, hollow: Hollow | None = None
    ) -> None:
        self.model, self.layout, self._memory, self._prefix = model, layout, memory, prefix
        self._hollow = hollow
        self._lanes, self._store = memory.lanes, memory.store
        self.blobs = [see(each) for each in layout.blobs]
        self._residents: dict[int, Tensor] = {}  # by a blob's id
        self._regions: list[Region] = []
        self._host: dict[int, Tensor] = {}
        self._stages: list[Tensor] = []
        self._moved: list[tuple[Packed, int | None]] = []
        self._came_from = {
            id(stored): stored.parameters[0].device for stored in (*layout.found.stored, *layout.found.loose)
        }  # fmt: skip
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._held = 0
        self._spared: tuple[Level, int] | None = None
        self.streaming: Streaming | None = None
        self._mappings: weakref.WeakValueDictionary[Path, Any] = weakref.WeakValueDictionary()
        self._seen_outside: list[weakref.ref[Any]] = []
        try:
            self._build()
        except BaseException:
            if hollow is None:
                self.restore()
            else:  # whose parameters never had values
                self.leave()
            raise
        self._hollow = None

    def _build(self) -> None:
        chosen = self.layout.plan
        self._memory.first.take(chosen.device_bytes, f"the model's share of {chosen.device_bytes} bytes")
        self._held = chosen.device_bytes
        memory = self._on_device(chosen.device_bytes - self.layout.buffers)
        places = [memory[i * chosen.slot_bytes : (i + 1) * chosen.slot_bytes] for i in range(chosen.slots)]
        at = chosen.slots * chosen.slot_bytes
        self._move_buffers()
        self._reserve()
        self._stages = list(self._pieces([chosen.staging_bytes] * chosen.staging))
        self._scratch = self._stages[0] if self._stages else places[0] if places else None
        resident: list[tuple[int | None, Packed]] = [(None, see(self.layout.loose))] if self.layout.found.loose else []
        resident += [(i, blob) for i, blob in enumerate(self.blobs) if chosen.homes[i] == DEVICE]
        for i, blob in resident:
            own = memory[at : at + blob.nbytes]
            at += padded(blob.nbytes)
            self._fill(blob, own)
            self._memory.first.came.count(blob.nbytes)
            self._settle(blob, i, own)
        sources = {}
        for batch in self._batches():
            homes = self._rooms(batch)
            for i in batch:
                blob = self.blobs[i]
                sources[i] = self._place(i, blob, homes.get(i))
                self._settle(blob, i, places[0])
        if not sources:
            return
        streamed = {i: self.blobs[i] for i in sources}
        self.places = Places(places, self._stages, sources, self._memory, self.layout.policy)
        needs = [[blob for blob in need if blob in sources] for need in self.layout.needs]
        self.streaming = Streaming(self.model, self.layout.windows, needs, streamed, places=self.places, home=self)

    @property
    def _disk_level(self) -> Level:
        assert self._memory.disk is not None
        return self._memory.disk

    @property
    def _host_level(self) -> Level:
        assert self._memory.host is not None
        return self._memory.host

    def _on_device(self, count: int) -> Tensor:
        """Memory on level 1, from a page's start."""
        if self._lanes.real:
            return torch.empty(count, dtype=torch.uint8, device=self._lanes.device)
        self._slab = HostArena(padded(count, 2 << 20))
        return self._slab.take(count).tensor

    def _reserve(self) -> None:
        """Host memory that reads of files of others take."""
        count = self.layout.spare
        level = self._memory.host or self._memory.first
        if count:
            level.take(count, "memory to read files through")
            self._spared = (level, count)

    def _move_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                self._buffers.append((module, name, buffer))
                if buffer.device != self._lanes.device:
                    module._buffers[name] = buffer.to(self._lanes.device)  # noqa: SLF001

    def _take(self, count: int) -> Tensor:
        """Host memory, for as long as the model is here."""
        region = self._memory.take_host(count, "a block")
        self._regions.append(region)
        return region.tensor

    def _batches(self) -> Iterator[list[int]]:
        """Blobs that are streamed, in pieces of host memory that are worth pinning by themselves."""
        batch: list[int] = []
        size = 0
        for i, blob in enumerate(self.blobs):
            if self.layout.plan.homes[i] != DEVICE:
                batch.append(i)
                size += padded(blob.nbytes) if self.layout.plan.homes[i] != DISK else 0
                if size >= _BATCH:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _rooms(self, batch: list[int]) -> dict[int, Tensor]:
        """Host memory for those of a batch that live there."""
        sizes = {i: padded(self.blobs[i].nbytes) for i in batch if self.layout.plan.homes[i] != DISK}
        if not sizes:
            return {}
        return dict(zip(sizes, self._pieces(list(sizes.values())), strict=True))

    def _pieces(self, sizes: list[int]) -> Iterator[Tensor]:
        """Host memory in one piece, of which nothing is lost, or where the arena has no such in several."""
        try:
            memory = self._take(sum(sizes)) if sizes else None
        except CapacityError:
            if len(sizes) == 1:
                raise
            for size in sizes:
                yield self._take(size)
            return
        at = 0
        for size in sizes:
            assert memory is not None
            yield memory[at : at + size]
            at += size

    def _place(self, number: int, blob: Packed, room: Tensor | None) -> Source:
        """Copy a blob to where it lives: this room, or without one the disk."""
        if room is None:
            assert self._store is not None
            assert self._scratch is not None
            key = self._key(number)
            pieces = self._hollow.pieces(blob) if self._hollow is not None and self.layout.chunk else None
            if pieces is not None:
                self._store.adopt(key, pieces, self.layout.chunk)
            else:
                memory = self._scratch[: blob.nbytes]
                self._fill(blob, memory)
                with self._disk_level.taken(padded(blob.nbytes), f"block {blob.name}"):
                    self._store.write(key, memory)
            return Source(blob.name, blob.nbytes, None, key)
        self._fill(blob, room)
        self._host_level.came.count(blob.nbytes)
        self._host[number] = room
        return Source(blob.name, blob.nbytes, room, None)

    def _fill(self, blob: Packed, memory: Tensor) -> None:
        if self._hollow is None:
            blob.fill(memory)
        else:
            self._hollow.fill(blob, memory)

    def _settle(self, blob: Packed, number: int | None, memory: Tensor) -> None:
        """Let a blob's parameters see `memory`; what they had before goes."""
        self._moved.append((blob, number))
        for seen in blob.seen:
            mark_placed(seen.parameter, True)
            set_values(seen.parameter, seen.view(memory))
        if number is None or self.layout.plan.homes[number] == DEVICE:
            self._residents[id(blob)] = memory

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number}"

    def view(self, blob: int, seen: Seen) -> Tensor:
        """A parameter's values where they live: the arena's memory, or the file's, mapped."""
        if blob in self._host:
            tensor, holder = _separate(self._host[blob], seen)
            self._seen_outside.append(weakref.ref(holder))
            return tensor
        assert self._store is not None
        path, start = self._store.place_of(self._key(blob), seen.offset)
        mapped = self._mappings.get(path)  # one for all that see it: tied weights are at one address
        if mapped is None:
            mapped = self._mappings[path] = np.memmap(path, dtype=np.uint8, mode="c")
        return _in_buffer(mapped, seen, start)

    def keep(self, blob: int, memory: Tensor) -> None:
        """Take a blob's changed bytes to where it lives."""
        packed = self.blobs[blob]
        if self._lanes.real:
            self._lanes.compute().synchronize()
        self._memory.first.went.count(packed.nbytes)
        if blob in self._host:
            if self._memory.host is not None:  # else it is kept on the host as the disk has no room
                self._memory.host.came.count(packed.nbytes)
            self._host[blob][: packed.nbytes].copy_(memory[: packed.nbytes])
            return
        assert self._store is not None
        key, data = self._key(blob), memory[: packed.nbytes].cpu()
        if self._store.is_foreign(key):  # those files stay as they are
            room, what = padded(packed.nbytes), f"block {packed.name}, which was written to"
            with self._disk_level.taken(room, what):
                self._store.write(key, data)
            return
        try:
            self._store.write(key, data)
        except CapacityError:  # for both at once
            self._replace(blob, data)

    def _replace(self, blob: int, data: Tensor) -> None:
        """Write a blob in place of the one before; where that fails, the one before is kept on the host."""
        assert self._store is not None
        key, before = self._key(blob), self._read(blob)
        self._store.delete(key)
        try:
            self._store.write(key, data)
        except BaseException:
            LOG.warning("block %s stays on the host, past its capacity: the disk took no other", self.blobs[blob].name)
            self._host[blob] = before
            self.places.moved(blob, before)
            self._disk_level.give(len(before))
            raise

    def restore(self) -> None:
        """Give the model its weights back, on the device that they came from; what the stack held of it goes.

        What lies on disk is read before anything is changed: after a `StorageError` all is as it was.
        """
        read = {number: self._read(number) for _, number in self._moved if number is not None and self._on_disk(number)}
        if self.streaming is not None:
            self.streaming.close()
        for blob, number in self._moved:
            memory = read.pop(number) if number in read else self._memory_of(blob, number)
            self._give(blob, memory, resident=id(blob) in self._residents)
        self.leave()
        for module, name, buffer in self._buffers:
            now = module._buffers.get(name)  # noqa: SLF001
            if now is not None and now.device != buffer.device:
                module._buffers[name] = now.to(buffer.device)  # noqa: SLF001
        self._buffers.clear()
        leave_order(self.model, self._lanes.device)

    def _give(self, blob: Packed, memory: Tensor, *, resident: bool) -> None:
        """Memory of their own for a blob's parameters, with these bytes."""
        for stored, offset in blob.stored:
            fresh = torch.empty(stored.nbytes, dtype=torch.uint8, device=self._came_from[id(stored)])
            fresh.copy_(memory[offset : offset + stored.nbytes])
            for seen in blob.seen:
                if any(seen.parameter is each for each in stored.parameters):
                    mark_placed(seen.parameter, False)
                    if resident and seen.parameter.data_ptr() != seen.view(memory).data_ptr():
                        # Somebody gave it other memory, which it keeps.
                        set_values(seen.parameter, seen.parameter.data.to(fresh.device))
                    else:
                        set_values(seen.parameter, dataclasses.replace(seen, offset=0).view(fresh))

    def leave(self) -> None:
        """Give up what the stack holds of the model, whose parameters have no values then unless they were given."""
        if self.streaming is not None:
            self.streaming.close()
        for blob, number in self._moved:
            if number is not None and self._on_disk(number):
                assert self._store is not None
                if not self._store.is_foreign(self._key(number)):
                    self._disk_level.give(padded(blob.nbytes))
                self._store.delete(self._key(number))
        self._moved.clear()
        self._host.clear()
        self._stages = []
        self._residents.clear()
        self._memory.lent.append(Lent(self._regions, self._seen_outside))
        self._regions, self._seen_outside = [], []
        self._memory.sweep()
        self._memory.first.give(self._held)
        self._held = 0
        if self._spared is not None:
            level, count = self._spared
            level.give(count)
            self._spared = None

    def _on_disk(self, number: int) -> bool:
        return self._store is not None and self._key(number) in self._store

    def _read(self, number: int) -> Tensor:
        assert self._store is not None
        memory = torch.empty(padded(self.blobs[number].nbytes), dtype=torch.uint8)
        self._store.read(self._key(number), memory)
        return memory

    def _memory_of(self, blob: Packed, number: int | None) -> Tensor:
        if id(blob) in self._residents:
            self._memory.first.went.count(blob.nbytes)
            return self._residents[id(blob)]
        assert number is not None
        if self._memory.host is not None:
            self._memory.host.went.count(blob.nbytes)
        return self._host[number]


def _separate(memory: Tensor, seen: Seen) -> tuple[Tensor, Any]:
    """A view with a storage of its own, as savers tell tensors apart by their storages; and what lives as long."""
    held = (ctypes.c_char * seen.nbytes).from_address(memory.data_ptr() + seen.offset)
    held._memory = memory  # type: ignore[attr-defined]  # noqa: SLF001
    return _in_buffer(held, seen, 0), held


def _in_buffer(buffer: Any, seen: Seen, offset: int) -> Tensor:
    """A parameter whose storage begins at `offset` of a buffer; what is written there stays in this process."""
    if not seen.nbytes:
        return torch.empty(seen.size, dtype=seen.dtype)
    count = seen.nbytes // seen.dtype.itemsize
    tensor = torch.frombuffer(buffer, dtype=seen.dtype, count=count, offset=offset)
    return tensor.as_strided(seen.size, seen.stride, seen.storage_offset)
