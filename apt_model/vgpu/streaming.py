"""A model whose blocks pass through level 1: hooks that have a block's values there while its forward runs."""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from apt_model.core.placement import mark_placed
from apt_model.vgpu.blob import Packed, Seen
from apt_model.vgpu.parameters import away, back
from apt_model.vgpu.places import Place, Places
from apt_model.vgpu.predictor import Predictor
from apt_model.vgpu.windows import Window

LOG = logging.getLogger(__name__)


class _Open:
    """A block whose forward runs."""

    __slots__ = ("held", "saving", "window")

    def __init__(self, window: int, saving: Any) -> None:
        self.window, self.saving = window, saving
        self.held: list[tuple[int, Place]] = []


class Streaming:
    """Hooks on a model's blocks, and what they do.

    Args:
        model: whose forward forgets what an interrupted one left open.
        windows: the blocks.
        needs: the blobs of each that are streamed.
        blobs: of those, by number.
        places: where they pass through level 1.
        home: gives a blob's bytes where it lives, as a tensor on the host, and takes them back.
    """

    def __init__(
        self, model: nn.Module, windows: list[Window], needs: list[list[int]], blobs: dict[int, Packed], *,
        places: Places, home: "Home",
    ) -> None:  # fmt: skip
        self._windows, self._needs, self._blobs, self._places, self._home = windows, needs, blobs, places, home
        self._predictor = Predictor(i for i, need in enumerate(needs) if need)
        self._lock = threading.RLock()
        self._open: list[_Open] = []
        self._at: dict[int, tuple[Place, int]] = {}  # blob -> where its parameters are, and how often it is open
        self._of: dict[int, tuple[int, Seen]] = {}
        self._shown: dict[int, Place] = {}  # blob -> the place that its parameters' data is in
        self._on_host = threading.local()
        self._warned = False
        self._lent: Place | None = None  # to the last saved tensor that came back
        low, high = _span(places)
        self._low, self._high = low, high
        for blob, packed in blobs.items():
            for seen in packed.seen:
                self._of[id(seen.parameter)] = blob, seen
                mark_placed(seen.parameter, True)
                seen.parameter.data = seen.view(places.all[0].memory)
                away(seen.parameter, self._read)
        self._handles = [model.register_forward_pre_hook(self._begin, prepend=True)]
        for i, window in enumerate(windows):
            if needs[i]:
                self._handles += [
                    window.module.register_forward_pre_hook(self._hook(self._entering, i), prepend=True),
                    window.module.register_forward_hook(self._hook(self._leaving, i), always_call=True),
                ]
        with self._lock:
            self._places.bring(self._ahead())

    def close(self) -> None:
        """Take the hooks away; every parameter is its own class again, with values that are not its own yet."""
        with self._lock:
            self._forget_open()
            for handle in self._handles:
                handle.remove()
            self._places.drain()
            for blob, packed in self._blobs.items():
                self._at.pop(blob, None)
                for seen in packed.seen:
                    back(seen.parameter)
                    mark_placed(seen.parameter, False)

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """Within, values that are away are read where they live, and not brought to the device."""
        before = getattr(self._on_host, "now", False)
        self._on_host.now = True
        try:
            yield
        finally:
            self._on_host.now = before

    def host_reads(self, now: bool) -> None:
        """As `on_host`, from here on in this thread."""
        self._on_host.now = now

    def surprises(self) -> int:
        """How often another block came than was expected."""
        return self._predictor.surprises

    def enter(self, window: int) -> None:
        """A block's forward begins."""
        with self._lock:
            self._return_lent()
            expected = self._predictor.saw(window)
            # Also where no gradient is recorded: the block may switch that on within.
            saving = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
            opened = _Open(window, saving)
            try:
                for blob in self._needs[window]:
                    if not expected and blob not in self._places.where:
                        self._warn(window)
                    opened.held.append((blob, self._activate(blob)))
            except BaseException:
                for blob, place in opened.held:
                    self._deactivate(blob, place)
                raise
            self._open.append(opened)
            saving.__enter__()
            self._places.bring(self._ahead())

    def leave(self, window: int, result: Any) -> Any:
        """It ended with this result, or raised; gives a result in place of one that lies in a block's memory."""
        with self._lock:
            if not self._open or self._open[-1].window != window:  # it did not begin
                return None
            copied = _replaced(result, self._own)
            self._shut(self._open.pop())
            self._places.bring(self._ahead())
            return None if copied is result else copied

    @staticmethod
    def _hook(call: Callable[..., Any], window: int) -> Callable[..., Any]:
        """A forward hook, into which torch.compile does not look."""
        return torch.compiler.disable(functools.partial(call, window))

    def _entering(self, window: int, *_: object) -> None:
        self.enter(window)

    def _leaving(self, window: int, _module: object, _args: object, result: Any) -> Any:
        return self.leave(window, result)

    def _begin(self, *_: object) -> None:
        """The model's forward begins: what is open now was left by one that a signal ended."""
        with self._lock:
            self._forget_open()

    def _forget_open(self) -> None:
        self._return_lent()
        while self._open:
            self._shut(self._open.pop())

    def _shut(self, opened: _Open) -> None:
        opened.saving.__exit__(None, None, None)
        for blob, place in opened.held:
            self._deactivate(blob, place)

    def _ahead(self) -> Iterator[int]:
        """Blobs in the order in which they are expected, each once."""
        seen: set[int] = set()
        misses = 0
        for window in self._predictor.ahead():
            fresh = [blob for blob in self._needs[window] if blob not in seen]
            misses = 0 if fresh else misses + 1
            yield from fresh
            seen.update(fresh)
            if misses > len(self._windows) or len(seen) == len(self._blobs):
                return

    def _activate(self, blob: int) -> Place:
        place = self._places.hold(blob, self._ahead())
        if blob in self._at:
            self._at[blob] = place, self._at[blob][1] + 1
            return place
        self._at[blob] = place, 1
        moved = self._shown.get(blob) is not place
        for seen in self._blobs[blob].seen:
            back(seen.parameter)
            if moved:
                seen.parameter.data = seen.view(place.memory)
        self._shown[blob] = place
        return place

    def _deactivate(self, blob: int, place: Place) -> None:
        _, times = self._at[blob]
        if times > 1:
            self._at[blob] = place, times - 1
        else:
            del self._at[blob]
            for seen in self._blobs[blob].seen:
                away(seen.parameter, self._read)
        self._places.let(place)

    def _warn(self, window: int) -> None:
        if not self._warned and len(self._places.where) == len(self._places.all):
            self._warned = True
            LOG.warning(
                "block %s came unexpectedly and is fetched on demand: the order of blocks is learned anew",
                self._windows[window].name,
            )

    def _read(self, parameter: nn.Parameter, call: Callable[[Tensor], Any]) -> Any:
        """Call with the values of a parameter that is away; what is written to them is kept."""
        with self._lock:
            blob, seen = self._of[id(parameter)]
            if getattr(self._on_host, "now", False):
                return call(self._home.view(blob, seen))
            if self._open and blob not in self._needs[self._open[-1].window]:
                self._needs[self._open[-1].window].append(blob)  # next time it is there in time
            place = self._places.hold(blob, self._ahead())
            try:
                values = seen.view(place.memory)
                if torch.is_grad_enabled():  # which may keep them for longer than they are there
                    values = _VALUES(parameter, values) if parameter.requires_grad else values.clone()
                version = values._version  # noqa: SLF001
                result = call(values)
                if values._version != version:  # noqa: SLF001
                    if values.data_ptr() != seen.view(place.memory).data_ptr():
                        seen.view(place.memory).copy_(values)
                    self._home.keep(blob, place.memory)
                return pytree.tree_map_only(Tensor, self._own, result)
            finally:
                self._places.let(place)

    def _own(self, tensor: Tensor) -> Tensor:
        """A tensor that does not lie in a place."""
        return tensor.clone() if self._in_places(tensor) else tensor

    def _in_places(self, tensor: Tensor) -> bool:
        if tensor.device != self._places.lanes.device or tensor.layout != torch.strided:
            return False
        address = tensor.untyped_storage().data_ptr()
        return self._low <= address < self._high

    def _pack(self, tensor: Tensor) -> Any:
        """A tensor that backward needs: of one in a place, only where it is from."""
        if type(tensor) not in (Tensor, nn.Parameter) or not self._in_places(tensor):
            return tensor
        with self._lock:
            at = tensor.data_ptr()
            for blob, (place, _) in self._at.items():
                first = place.memory.data_ptr()
                if first <= at < first + place.memory.numel():
                    offset = at - first
                    return _Saved(blob, offset, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
        raise AssertionError("a saved tensor lies in a place that no open block holds")

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Saved):
            return packed
        with self._lock:
            self._return_lent()
            place = self._places.hold(packed.blob, self._ahead())
            self._lent = place
            size = max(0, 1 + sum((n - 1) * s for n, s in zip(packed.size, packed.stride, strict=True)))
            memory = place.memory[packed.offset : packed.offset + size * packed.dtype.itemsize].view(packed.dtype)
            return memory.as_strided(packed.size, packed.stride, memory.storage_offset())

    def _return_lent(self) -> None:
        """The node that a saved tensor came back for has begun its work: the next one asks, or a forward begins."""
        if self._lent is not None:
            place, self._lent = self._lent, None
            self._places.let(place)


class _Saved:
    __slots__ = ("blob", "dtype", "offset", "size", "stride")

    def __init__(
        self, blob: int, offset: int, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        self.blob, self.offset, self.dtype, self.size, self.stride = blob, offset, dtype, size, stride


class Home:
    """Where blobs live: reads and writes there."""

    def view(self, blob: int, seen: Seen) -> Tensor:
        """A parameter's values on the host, without a copy where that can be."""
        raise NotImplementedError

    def keep(self, blob: int, memory: Tensor) -> None:
        """Take a blob's bytes, which have changed."""
        raise NotImplementedError


class _Values(torch.autograd.Function):
    """Values of a parameter that is away, so that their gradient is the parameter's."""

    @staticmethod
    def forward(_ctx: Any, _parameter: Tensor, values: Tensor) -> Tensor:
        """A copy that may be kept."""
        return values.clone()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The parameter's."""
        return grad, None


_VALUES: Any = _Values.apply


def _replaced(result: Any, own: Callable[[Tensor], Tensor]) -> Any:
    """`result` with tensors by `own`: the same object where none is another one."""
    if isinstance(result, Tensor):
        return own(result)
    if isinstance(result, tuple | list):
        each = [_replaced(one, own) for one in result]
        if all(new is old for new, old in zip(each, result, strict=True)):
            return result
        return type(result)(*each) if hasattr(result, "_fields") else type(result)(each)
    if isinstance(result, dict):
        changed = {key: new for key, old in result.items() if (new := _replaced(old, own)) is not old}
        if changed:
            result.update(changed)
    return result


def _span(places: Places) -> tuple[int, int]:
    starts = [place.memory.untyped_storage().data_ptr() for place in places.all]
    ends = [place.memory.data_ptr() + place.memory.numel() for place in places.all]
    return min(starts), max(ends)
