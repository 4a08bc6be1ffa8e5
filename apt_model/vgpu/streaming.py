"""A model whose blocks pass through level 1: hooks that have a block's values there while its forward runs."""

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apt_model.core.errors import CapacityError
from apt_model.core.placement import mark_placed
from apt_model.vgpu.blob import Packed, set_values
from apt_model.vgpu.compiling import Holders, between_graphs, leave_away_to_eager
from apt_model.vgpu.parameters import away, back
from apt_model.vgpu.places import Place, Places
from apt_model.vgpu.predictor import Predictor
from apt_model.vgpu.values import Home, Values
from apt_model.vgpu.windows import Window

LOG = logging.getLogger(__name__)

# What autograd's innermost hooks for saved tensors are: torch's own compiler asks so, too.
_top_hooks: Callable[[bool], tuple[Any, Any] | None] = torch._C._autograd._top_saved_tensors_default_hooks  # noqa: SLF001


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
        self._windows, self._needs, self._blobs, self._places = windows, needs, blobs, places
        self._predictor = Predictor(i for i, need in enumerate(needs) if need)
        self._values = Values(blobs, places, home, ahead=self._ahead, learn=self._learn)
        self._lock = self._values.lock
        self._open: dict[int, list[_Open]] = {}  # by thread
        self._active: dict[int, _Active] = {}
        self._shown: dict[int, Place] = {}  # blob -> the place that its parameters' data is in
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        self._warned = False
        self._holders = Holders(model)
        leave_away_to_eager()
        for blob, packed in blobs.items():
            self._shown[blob] = places.all[0]
            for seen in packed.seen:
                mark_placed(seen.parameter, True)
                set_values(seen.parameter, seen.view(places.all[0].memory))
                self._away(seen.parameter)
        places.overwritten = self._overwritten
        self._handles = self._hooks(model)
        with self._lock:
            self._places.bring(self._ahead())

    def close(self) -> None:
        """Take the hooks away; every parameter is its own class again, with values that are not its own yet."""
        with self._lock:
            self._values.take_writes()
            self._values.closed = True
            for thread in list(self._open):
                self._forget_open(thread)
            for handle in self._handles:
                handle.remove()
            self._places.drain()
            for packed in self._blobs.values():
                for seen in packed.seen:
                    self._back(seen.parameter)
                    mark_placed(seen.parameter, False)

    def surprises(self) -> int:
        """How often another block came than was expected."""
        return self._predictor.surprises

    def _hooks(self, model: nn.Module) -> list[Any]:
        """Hooks are functions that know their module: what deepcopy makes of a model has them, and they do nothing."""

        def begin(module: nn.Module, *_: object) -> None:
            if module is model:
                with self._lock:
                    self._values.on_host(False)
                    self._forget_open(threading.get_ident())

        def host_reads(module: nn.Module, now: bool) -> None:
            if module is model:
                self._values.on_host(now)

        handles = [
            model.register_forward_pre_hook(between_graphs(begin), prepend=True),
            model.register_state_dict_pre_hook(lambda module, *_: host_reads(module, True)),
            model.register_state_dict_post_hook(lambda module, *_: host_reads(module, False)),
        ]
        for i, window in enumerate(self._windows):
            if self._needs[i]:
                enter, leave = self._around(i, window.module)
                handles += [
                    window.module.register_forward_pre_hook(between_graphs(enter), prepend=True),
                    window.module.register_forward_hook(between_graphs(leave), always_call=True),
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
            self._values.take_writes()
            expected = self._predictor.saw(window)
            # Also where no gradient is recorded: the block may switch that on within.
            saving = torch.autograd.graph.saved_tensors_hooks(
                functools.partial(self._values.pack, _top_hooks(True)), self._values.unpack
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
            self._places.lanes.refuse_capture()
            copied = _replaced(result, self._values.own)
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
        with contextlib.ExitStack() as each:  # also after one whose values are refused where it lives
            for blob, place in opened.held:
                each.callback(self._deactivate, blob, place)

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
            self._back(seen.parameter)
        if self._shown[blob] is not place:
            for seen, view in zip(packed.seen, self._views_in(blob, place), strict=True):
                seen.parameter.data = view
            self._shown[blob] = place
        versions = [seen.parameter._version for seen in packed.seen]  # noqa: SLF001
        self._active[blob] = _Active(place, 1, versions)
        return place

    def _away(self, parameter: nn.Parameter) -> None:
        away(parameter, self._values.read)
        self._holders.changed(parameter)

    def _back(self, parameter: nn.Parameter) -> None:
        back(parameter)
        self._holders.changed(parameter)

    def _views_in(self, blob: int, place: Place) -> list[Tensor]:
        """A blob's parameters in a place, made once: not as what inference mode makes."""
        key = blob, id(place)
        if key not in self._views:
            with torch.inference_mode(mode=False):
                self._views[key] = [seen.view(place.memory) for seen in self._blobs[blob].seen]
        return self._views[key]

    def _deactivate(self, blob: int, place: Place) -> None:
        active = self._active[blob]
        try:
            if active.times > 1:
                self._active[blob] = active._replace(times=active.times - 1)
            else:
                del self._active[blob]
                self._send_away(blob, active)
        finally:
            self._places.let(place)

    def _send_away(self, blob: int, active: _Active) -> None:
        """A blob's parameters are where it lives again, with what was written to them."""
        written = []
        for seen, version in zip(self._blobs[blob].seen, active.versions, strict=True):
            if seen.parameter._version != version:  # noqa: SLF001
                written.append(seen)
            self._away(seen.parameter)
        if written:
            self._values.keep(blob, active.place, *written)

    def _overwritten(self, place: Place) -> None:
        """A place gets other values: a graph that still has the old ones is to notice."""
        blob = place.blob
        if self._shown.get(blob) is place:
            for seen in self._blobs[blob].seen:
                with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
                    torch.autograd.graph.increment_version(seen.parameter)

    def _warn(self, window: int) -> None:
        if self._places.foresees and not self._warned and len(self._places.where) == len(self._places.all):
            self._warned = True
            LOG.warning(
                "block %s came unexpectedly and is fetched on demand: the order of blocks is learned anew",
                self._windows[window].name,
            )

    def _learn(self, blob: int) -> None:
        """A block reads what is another's: next time it is there in time, unless that takes all places."""
        mine = self._open.get(threading.get_ident())
        if mine:
            need = self._needs[mine[-1].window]
            if blob not in need and len(need) + 1 < len(self._places.all):
                need.append(blob)


def _caller() -> Any:
    """The frame in which torch calls a module that runs hooks now, kept so that its number stays its own."""
    frame: Any = sys._getframe(1)  # noqa: SLF001
    while frame is not None and frame.f_code.co_name != "_call_impl":
        frame = frame.f_back
    return frame


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
