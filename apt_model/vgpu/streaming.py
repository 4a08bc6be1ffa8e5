"""A model whose blocks pass through level 1: hooks that have a block's values there while its forward runs."""

import dataclasses
import functools
import logging
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from apt_model.core.errors import CapacityError, InputError
from apt_model.core.placement import mark_placed
from apt_model.vgpu.blob import Packed, Seen
from apt_model.vgpu.parameters import StreamedParameter, away, back
from apt_model.vgpu.places import Place, Places
from apt_model.vgpu.predictor import Predictor
from apt_model.vgpu.windows import Window

LOG = logging.getLogger(__name__)

# What autograd's innermost hooks for saved tensors are: torch's own compiler asks so, too.
_top_hooks: Callable[[bool], tuple[Any, Any] | None] = torch._C._autograd._top_saved_tensors_default_hooks  # noqa: SLF001


class Home:
    """Where blobs live: reads and writes there."""

    def view(self, blob: int, seen: Seen) -> Tensor:
        """A parameter's values on the host, without a copy where that can be."""
        raise NotImplementedError

    def keep(self, blob: int, memory: Tensor) -> None:
        """Take a blob's bytes, which have changed."""
        raise NotImplementedError


class _Open:
    """A block whose forward runs."""

    __slots__ = ("frame", "held", "saving", "window")

    def __init__(self, window: int, saving: Any) -> None:
        self.window, self.saving, self.frame = window, saving, _caller()
        self.held: list[tuple[int, Place]] = []


class _Active(NamedTuple):
    """A blob whose parameters are there."""

    place: Place
    times: int  # that it is open
    versions: list[int]  # of its parameters


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
        places: Places, home: Home,
    ) -> None:  # fmt: skip
        self._windows, self._needs, self._blobs, self._places, self._home = windows, needs, blobs, places, home
        self._predictor = Predictor(i for i, need in enumerate(needs) if need)
        self._lock = threading.RLock()
        self._open: dict[int, list[_Open]] = {}  # by thread
        self._active: dict[int, _Active] = {}
        self._of: dict[int, tuple[int, Seen]] = {}
        self._shown: dict[int, Place] = {}  # blob -> the place that its parameters' data is in
        self._versions = {(blob, seen.offset): 0 for blob, packed in blobs.items() for seen in packed.seen}
        self._outside: dict[int, _Outside] = {}
        self._written: deque[_Outside] = deque()
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        self._here = threading.local()
        self._warned = self._closed = False
        self._low = places.all[0].memory.data_ptr()
        self._high = self._low + sum(place.memory.numel() for place in places.all)
        for blob, packed in blobs.items():
            self._shown[blob] = places.all[0]
            for seen in packed.seen:
                self._of[id(seen.parameter)] = blob, seen
                mark_placed(seen.parameter, True)
                seen.parameter.data = seen.view(places.all[0].memory)
                away(seen.parameter, self._read)
        places.overwritten = self._overwritten
        self._handles = self._hooks(model)
        with self._lock:
            self._places.bring(self._ahead())

    def close(self) -> None:
        """Take the hooks away; every parameter is its own class again, with values that are not its own yet."""
        with self._lock:
            self._take_writes()
            self._closed = True
            for thread in list(self._open):
                self._forget_open(thread)
            for handle in self._handles:
                handle.remove()
            self._places.drain()
            for packed in self._blobs.values():
                for seen in packed.seen:
                    back(seen.parameter)
                    mark_placed(seen.parameter, False)

    def surprises(self) -> int:
        """How often another block came than was expected."""
        return self._predictor.surprises

    def _hooks(self, model: nn.Module) -> list[Any]:
        """Hooks are functions that know their module: what deepcopy makes of a model has them, and they do nothing."""

        def begin(module: nn.Module, *_: object) -> None:
            if module is model:
                with self._lock:
                    self._here.on_host = False
                    self._forget_open(threading.get_ident())

        def host_reads(module: nn.Module, now: bool) -> None:
            if module is model:
                self._here.on_host = now

        handles = [
            model.register_forward_pre_hook(torch.compiler.disable(begin), prepend=True),
            model.register_state_dict_pre_hook(lambda module, *_: host_reads(module, True)),
            model.register_state_dict_post_hook(lambda module, *_: host_reads(module, False)),
        ]
        for i, window in enumerate(self._windows):
            if self._needs[i]:
                enter, leave = self._around(i, window.module)
                handles += [
                    window.module.register_forward_pre_hook(torch.compiler.disable(enter), prepend=True),
                    window.module.register_forward_hook(torch.compiler.disable(leave), always_call=True),
                ]
        return handles

    def _around(self, window: int, own: nn.Module) -> tuple[Callable[..., None], Callable[..., Any]]:
        def enter(module: nn.Module, *_: object) -> None:
            if module is own:
                self._enter(window)

        def leave(module: nn.Module, _: object, result: Any) -> Any:
            return self._leave(window, result) if module is own else None

        return enter, leave

    def _enter(self, window: int) -> None:
        """A block's forward begins."""
        with self._lock:
            self._take_writes()
            expected = self._predictor.saw(window)
            # Also where no gradient is recorded: the block may switch that on within.
            saving = torch.autograd.graph.saved_tensors_hooks(
                functools.partial(self._pack, _top_hooks(True)), self._unpack
            )
            opened = _Open(window, saving)
            try:
                for blob in self._needs[window]:
                    if not expected and blob not in self._places.where:
                        self._warn(window)
                    opened.held.append((blob, self._activate_now(blob)))
                saving.__enter__()
            except BaseException:
                for blob, place in opened.held:
                    self._deactivate(blob, place)
                raise
            self._open.setdefault(threading.get_ident(), []).append(opened)
            self._places.bring(self._ahead())

    def _leave(self, window: int, result: Any) -> Any:
        """It ended with this result, or raised; gives a result in place of one that lies in a block's memory."""
        with self._lock:
            mine = self._open.get(threading.get_ident())
            if not mine or mine[-1].window != window:  # it did not begin
                return None
            copied = _replaced(result, self._own)
            self._shut(mine.pop())
            self._places.bring(self._ahead())
            return None if copied is result else copied

    def _forget_open(self, thread: int) -> None:
        """End what a forward that a signal ended has left open."""
        mine = self._open.pop(thread, [])
        while mine:
            self._shut(mine.pop())

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

    def _activate_now(self, blob: int) -> Place:
        """`_activate`, and again without what an interrupted forward has left open, where there is no room."""
        try:
            return self._activate(blob)
        except CapacityError:
            if not self._forget_stale():
                raise
            return self._activate(blob)

    def _forget_stale(self) -> bool:
        """End blocks of this thread whose forward does not run any more; whether there were any."""
        mine = self._open.get(threading.get_ident(), [])
        running: set[int] = set()
        frame: Any = sys._getframe()  # noqa: SLF001
        while frame is not None:
            running.add(id(frame))
            frame = frame.f_back
        stale = [opened for opened in mine if id(opened.frame) not in running]
        for opened in reversed(stale):
            mine.remove(opened)
            self._shut(opened)
        return bool(stale)

    def _activate(self, blob: int) -> Place:
        place = self._places.hold(blob, self._ahead())
        active = self._active.get(blob)
        if active is not None:
            self._active[blob] = active._replace(times=active.times + 1)
            return place
        packed = self._blobs[blob]
        for seen in packed.seen:
            back(seen.parameter)
        if self._shown[blob] is not place:
            for seen, view in zip(packed.seen, self._views_in(blob, place), strict=True):
                seen.parameter.data = view
            self._shown[blob] = place
        versions = [seen.parameter._version for seen in packed.seen]  # noqa: SLF001
        self._active[blob] = _Active(place, 1, versions)
        return place

    def _views_in(self, blob: int, place: Place) -> list[Tensor]:
        """A blob's parameters in a place, made once: not as what inference mode makes."""
        key = blob, id(place)
        if key not in self._views:
            with torch.inference_mode(mode=False):
                self._views[key] = [seen.view(place.memory) for seen in self._blobs[blob].seen]
        return self._views[key]

    def _deactivate(self, blob: int, place: Place) -> None:
        active = self._active[blob]
        if active.times > 1:
            self._active[blob] = active._replace(times=active.times - 1)
        else:
            del self._active[blob]
            written = []
            for seen, version in zip(self._blobs[blob].seen, active.versions, strict=True):
                if seen.parameter._version != version:  # noqa: SLF001
                    written.append(seen)
                away(seen.parameter, self._read)
            if written:
                self._keep(blob, place, *written)
        self._places.let(place)

    def _keep(self, blob: int, place: Place, *written: Seen) -> None:
        """What is in a place has changed: it is so where it lives, too."""
        for seen in written:
            self._versions[blob, seen.offset] += 1
        self._home.keep(blob, place.memory)
        self._places.changed(blob)

    def _overwritten(self, place: Place) -> None:
        """A place gets other values: a graph that still has the old ones is to notice."""
        blob = place.blob
        if self._shown.get(blob) is place:
            for seen in self._blobs[blob].seen:
                with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
                    torch.autograd.graph.increment_version(seen.parameter)

    def _warn(self, window: int) -> None:
        if not self._warned and len(self._places.where) == len(self._places.all):
            self._warned = True
            LOG.warning(
                "block %s came unexpectedly and is fetched on demand: the order of blocks is learned anew",
                self._windows[window].name,
            )

    def _read(self, parameter: nn.Parameter, call: Callable[[Tensor], Any], *, copied: bool, host: bool) -> Any:
        """Call with the values of a parameter that is away; what is written to them is kept.

        With `copied` they may be kept by whoever is called; with `host` they are where the parameter lives.
        """
        blob, seen = self._of[id(parameter)]
        if self._closed:
            raise InputError("a parameter of a model that a VGPUStack gave up has no values any more")
        if host or getattr(self._here, "on_host", False):
            return call(self._home.view(blob, seen))
        with self._lock:
            self._take_writes()
            self._learn(blob)
            place: Place | None = self._places.hold(blob, self._ahead())
            assert place is not None
            values = seen.view(place.memory)
            if copied or torch.is_grad_enabled():  # which may keep them for longer than they are there
                with_gradient = torch.is_grad_enabled() and parameter.requires_grad
                values = _VALUES(parameter, values) if with_gradient else values.clone()
                self._places.let(place)
                place = None
            version = _version(values)
            try:
                result = call(values)
                if version is not None and _version(values) != version:
                    if place is None:
                        place = self._places.hold(blob, self._ahead())
                        seen.view(place.memory).copy_(values.detach())
                    self._keep(blob, place, seen)
                return pytree.tree_map_only(Tensor, functools.partial(self._handed_out, blob, seen, values), result)
            finally:
                if place is not None:
                    self._places.let(place)

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

    def _take_writes(self) -> None:
        """Keep what has been written to views of values that were handed out; called with the lock."""
        gone = [self._written.popleft() for _ in range(len(self._written))]
        for record in list(self._outside.values()):
            version = _version(record.base)
            if version != record.version and version is not None:
                record.version = version
                place = self._places.hold(record.blob, self._ahead())
                record.seen.view(place.memory).copy_(record.base)
                self._keep(record.blob, place, record.seen)
                self._places.let(place)
        for record in gone:
            self._outside.pop(id(record), None)

    def _learn(self, blob: int) -> None:
        """A block reads what is another's: next time it is there in time, unless that takes all places."""
        mine = self._open.get(threading.get_ident())
        if mine:
            need = self._needs[mine[-1].window]
            if blob not in need and len(need) + 1 < len(self._places.all):
                need.append(blob)

    def _own(self, tensor: Tensor) -> Tensor:
        """A tensor that does not lie in a place."""
        return tensor.clone() if self._in_places(tensor) else tensor

    def _in_places(self, tensor: Tensor) -> bool:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return False
        return tensor.device.type == self._places.lanes.device.type and self._low <= tensor.data_ptr() < self._high

    def _pack(self, around: tuple[Any, Any] | None, tensor: Tensor) -> Any:
        """A tensor that backward needs: of one in a place, only where it is from."""
        if isinstance(tensor, StreamedParameter) and id(tensor) in self._of:
            blob, seen = self._of[id(tensor)]
            start = seen.storage_offset * seen.dtype.itemsize
            version = self._versions[blob, seen.offset]
            return _Saved(blob, (seen.offset, version), seen.offset + start, seen.dtype, seen.size, seen.stride)
        if not self._in_places(tensor):
            return tensor if around is None else _Others(around[1], around[0](tensor))
        with self._lock:
            at = tensor.data_ptr()
            place = next(each for each in self._places.all if 0 <= at - each.memory.data_ptr() < each.memory.numel())
            offset = at - place.memory.data_ptr()
            of = max(seen.offset for seen in self._blobs[place.blob].seen if seen.offset <= offset)
            version = self._versions[place.blob, of]
            size, stride = tuple(tensor.shape), tuple(tensor.stride())
            return _Saved(place.blob, (of, version), offset, tensor.dtype, size, stride)

    def _unpack(self, packed: Any) -> Tensor:
        """The tensor again: a copy, as nobody says when it is needed no more."""
        if isinstance(packed, _Others):
            return packed.unpack(packed.packed)
        if not isinstance(packed, _Saved):
            return packed
        with self._lock:
            if self._closed:
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


def _caller() -> Any:
    """The frame in which torch calls a module that runs hooks now, kept so that its number stays its own."""
    frame: Any = sys._getframe(1)  # noqa: SLF001
    while frame is not None and frame.f_code.co_name != "_call_impl":
        frame = frame.f_back
    return frame


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


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether one is a view of the other's memory."""
    if type(one) is not Tensor or one.layout != torch.strided:
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _replaced(result: Any, own: Callable[[Tensor], Tensor]) -> Any:
    """`result` with tensors by `own`: the same object where none is another one, or where it can be changed."""
    if isinstance(result, Tensor):
        return own(result)
    if isinstance(result, tuple | list):
        each = [_replaced(one, own) for one in result]
        if all(new is old for new, old in zip(each, result, strict=True)):
            return result
        return type(result)(*each) if hasattr(result, "_fields") else type(result)(each)
    if isinstance(result, dict):
        for key, old in list(result.items()):
            new = _replaced(old, own)
            if new is not old:
                result[key] = new
    return result
