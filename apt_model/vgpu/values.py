"""What parameters of streamed blocks stand for: read while they are away, written, and saved for backward.

A block's parameters lie in a place of level 1 for a while, and other values lie there afterwards. So nobody outside the
block gets that memory: who reads gets the values where the parameter lives or a copy, what is written to either is
brought to where the parameter lives, and what autograd saves is where it came from.
"""

import dataclasses
import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from apt_model.core.errors import CapacityError, InputError
from apt_model.vgpu.blob import Packed, Seen
from apt_model.vgpu.parameters import StreamedParameter
from apt_model.vgpu.places import Place, Places


class Home(Protocol):
    """Where blobs live: reads and writes there."""

    def view(self, blob: int, seen: Seen) -> Tensor:
        """A parameter's values on the host, without a copy where that can be."""

    def keep(self, blob: int, memory: Tensor) -> None:
        """Take a blob's bytes, which have changed."""


class _Saved(NamedTuple):
    """What backward needs of a blob."""

    blob: int
    version: tuple[int, int]  # of the storage that begins there: what it was
    offset: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(eq=False)
class _Outside:
    """A copy of a parameter's values of which somebody has a view."""

    blob: int
    seen: Seen
    base: Tensor
    version: int


class _Others(NamedTuple):
    """What hooks around ours made of a tensor."""

    unpack: Any
    packed: Any


class Values:
    """Reads, writes and saves for backward what lies in `places` at times, and always at `home`.

    Args:
        blobs: by number.
        places: where they pass through level 1.
        home: where they live.
        ahead: the blobs that are expected next.
        learn: told of a blob that somebody read by another way than its block.
    """

    def __init__(
        self, blobs: dict[int, Packed], places: Places, home: Home, *, ahead: Callable[[], Iterator[int]],
        learn: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._blobs, self._places, self._home, self._ahead, self._learn = blobs, places, home, ahead, learn
        self.lock = threading.RLock()
        self.closed = False
        self._of = {id(seen.parameter): (blob, seen) for blob, packed in blobs.items() for seen in packed.seen}
        self._versions = {(blob, seen.offset): 0 for blob, packed in blobs.items() for seen in packed.seen}
        self._outside: dict[int, _Outside] = {}
        self._written: deque[_Outside] = deque()
        self._here = threading.local()
        self._low = places.all[0].memory.data_ptr()
        self._high = self._low + sum(place.memory.numel() for place in places.all)

    def on_host(self, now: bool) -> None:
        """Whether this thread reads where parameters live, from here on."""
        self._here.on_host = now

    def read(self, parameter: nn.Parameter, call: Callable[[Tensor], Any], *, copied: bool, host: bool) -> Any:
        """Call with the values of a parameter that is away; what is written to them is kept.

        With `copied` they may be kept by whoever is called; with `host` they are where the parameter lives.
        """
        blob, seen = self._of[id(parameter)]
        if self.closed:
            raise InputError("a parameter of a model that a VGPUStack gave up has no values any more")
        if host or getattr(self._here, "on_host", False):
            return call(self._home.view(blob, seen))
        with self.lock:
            self.take_writes()
            self._learn(blob)
            place = self._held(blob)
            device = self._places.lanes.device
            values = self._home.view(blob, seen).to(device) if place is None else seen.view(place.memory)
            # Who may keep them for longer than they are there gets a copy.
            if place is None or copied or torch.is_grad_enabled():
                with_gradient = torch.is_grad_enabled() and parameter.requires_grad
                values = _fetched(parameter, values) if with_gradient else values.clone()
                if place is not None:
                    self._places.let(place)
                place = None
            version = _version(values)
            try:
                result = call(values)
                if version is not None and _version(values) != version:
                    if place is None:
                        place = self._places.hold(blob, self._ahead())
                        seen.view(place.memory).copy_(values.detach())
                    self.keep(blob, place, seen)
                return pytree.tree_map_only(Tensor, functools.partial(self._handed_out, blob, seen, values), result)
            finally:
                if place is not None:
                    self._places.let(place)

    def _held(self, blob: int) -> Place | None:
        """A blob's place, or None where all are in use by blocks that run now."""
        try:
            return self._places.hold(blob, self._ahead())
        except CapacityError:
            return None

    def _handed_out(self, blob: int, seen: Seen, values: Tensor, result: Tensor) -> Tensor:
        """A result that does not lie in a place; where it is a view of the values, what is written to it is kept."""
        base = values.detach()
        if self._in_places(result):
            place = self._places.where[blob]
            memory = place.memory[seen.offset : seen.offset + seen.nbytes].clone()
            start = (result.data_ptr() - place.memory.data_ptr() - seen.offset) // result.element_size()
            base = dataclasses.replace(seen, offset=0).view(memory)
            result = memory.view(result.dtype).as_strided(result.size(), result.stride(), start)
        elif torch.is_grad_enabled() or not _share(result, values):
            return result
        version = _version(base)
        if version is not None:
            record = _Outside(blob, seen, base, version)
            self._outside[id(record)] = record
            weakref.finalize(result, self._written.append, record)
        return result

    def take_writes(self) -> None:
        """Keep what has been written to views of values that were handed out; called with the lock."""
        gone = [self._written.popleft() for _ in range(len(self._written))]
        for record in list(self._outside.values()):
            version = _version(record.base)
            if version != record.version and version is not None:
                place = self._places.hold(record.blob, self._ahead())
                try:
                    record.seen.view(place.memory).copy_(record.base)
                    self.keep(record.blob, place, record.seen)
                finally:
                    self._places.let(place)
                record.version = version
        for record in gone:
            self._outside.pop(id(record), None)

    def keep(self, blob: int, place: Place, *written: Seen) -> None:
        """What is in a place has changed: it is so where it lives, too."""
        try:
            self._home.keep(blob, place.memory)
        except BaseException:
            self._places.void(place)  # it is not so
            raise
        for seen in written:
            self._versions[blob, seen.offset] += 1
        self._places.changed(blob)

    def own(self, tensor: Tensor) -> Tensor:
        """A tensor that does not lie in a place."""
        return tensor.clone() if self._in_places(tensor) else tensor

    def _in_places(self, tensor: Tensor) -> bool:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return False
        return tensor.device.type == self._places.lanes.device.type and self._low <= tensor.data_ptr() < self._high

    def pack(self, around: tuple[Any, Any] | None, tensor: Tensor) -> Any:
        """A tensor that backward needs: of one in a place, only where it is from."""
        if isinstance(tensor, StreamedParameter) and id(tensor) in self._of:
            blob, seen = self._of[id(tensor)]
            start = seen.storage_offset * seen.dtype.itemsize
            version = self._versions[blob, seen.offset]
            return _Saved(blob, (seen.offset, version), seen.offset + start, seen.dtype, seen.size, seen.stride)
        if not self._in_places(tensor):
            return tensor if around is None else _Others(around[1], around[0](tensor))
        with self.lock:
            at = tensor.data_ptr()
            place = next(each for each in self._places.all if 0 <= at - each.memory.data_ptr() < each.memory.numel())
            offset = at - place.memory.data_ptr()
            of = max(seen.offset for seen in self._blobs[place.blob].seen if seen.offset <= offset)
            version = self._versions[place.blob, of]
            size, stride = tuple(tensor.shape), tuple(tensor.stride())
            return _Saved(place.blob, (of, version), offset, tensor.dtype, size, stride)

    def unpack(self, packed: Any) -> Tensor:
        """The tensor again: a copy, as nobody says when it is needed no more."""
        if isinstance(packed, _Others):
            return packed.unpack(packed.packed)
        if not isinstance(packed, _Saved):
            return packed
        with self.lock:
            if self.closed:
                raise InputError(
                    "backward needs weights of a model that has been detached from its VGPUStack since its forward",
                    remedy="keep the model attached until backward has run",
                )
            of, version = packed.version
            if version != self._versions[packed.blob, of]:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"a weight of block {self._blobs[packed.blob].name} was changed between forward and backward"
                )
            place = self._places.hold(packed.blob, self._ahead())
            size = max(0, 1 + sum((n - 1) * s for n, s in zip(packed.size, packed.stride, strict=True)))
            memory = place.memory[packed.offset : packed.offset + size * packed.dtype.itemsize].clone()
            self._places.let(place)
            return memory.view(packed.dtype).as_strided(packed.size, packed.stride)


class _Fetched(torch.autograd.Function):
    """Values of a parameter that is away, so that their gradient is the parameter's."""

    @staticmethod
    def forward(_ctx: Any, _parameter: Tensor, values: Tensor) -> Tensor:
        """A copy that may be kept."""
        return values.clone()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The parameter's."""
        return grad, None


_fetched: Any = _Fetched.apply


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether one is a view of the other's memory."""
    if type(one) is not Tensor or one.layout != torch.strided:
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
