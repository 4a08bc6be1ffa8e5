"""A trace of a stack: who is told of what while it runs, and the file that Perfetto's viewer opens."""

import itertools
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apt_model.core.errors import InputError, StorageError
from apt_model.core.files import atomic_file
from apt_model.vgpu.clock import DEVICE_WAITS, HOST_WAITS
from apt_model.vgpu.memory import Memory
from apt_model.vgpu.perfetto_file import builder, packed
from apt_model.vgpu.recorder import Recorder
from apt_model.vgpu.windows import Window

LOG = logging.getLogger(__name__)
BLOCKS = "blocks run"


class Trace:
    """Everybody who has something to tell tells it from here on, until `end`; the caller holds a lock."""

    def __init__(self, path: Path, memory: Memory) -> None:
        self._path, self._memory = path, memory
        _check(path)
        self._builder = builder()
        self._hooks: dict[int, list[Any]] = {}
        memory.clock.refer()
        self._recorder = Recorder(time.perf_counter_ns())
        for lane in (BLOCKS, DEVICE_WAITS):
            self._recorder.threads(lane)
        for number, level in enumerate(memory.levels, 1):
            name = f"level {number} ({level.config.device})"
            level.came.watch = self._recorder.arrivals(f"to {name}")
            level.watch = self._recorder.counter(f"{name}: bytes held", time.perf_counter_ns)
            level.watch(level.used)
        self._recorder.threads(HOST_WAITS)
        memory.clock.waits = self._recorder.show

    def add(self, model: nn.Module, windows: Iterable[Window]) -> None:
        """Show when the blocks of a model run."""
        blocks = _Blocks(self._memory, self._recorder)
        self._hooks[id(model)] = [hook for window in windows for hook in blocks.watch(window)]

    def remove(self, model: nn.Module) -> None:
        """Undo `add`."""
        for hook in self._hooks.pop(id(model), []):
            hook.remove()

    def end(self, error: BaseException | None) -> None:
        """Nobody tells any more, and the file is written; after `error` a fault of that is only logged."""
        try:
            self._stop()
        finally:
            try:
                self._write()
            except StorageError as fault:
                if error is None:
                    raise
                LOG.warning("after %r: %s", error, fault)

    def _stop(self) -> None:
        for hook in itertools.chain(*self._hooks.values()):
            hook.remove()
        try:
            self._memory.clock.settle()
        finally:
            for level in self._memory.levels:
                level.came.watch = level.watch = None
            self._memory.clock.waits = None
            self._memory.clock.forget()

    def _write(self) -> None:
        data = packed(self._recorder, self._builder)
        try:
            with atomic_file(self._path) as partial_path:
                partial_path.write_bytes(data)
        except OSError as error:
            raise StorageError(
                f"the trace of {len(data)} bytes was not written to {self._path}: {error}",
                state="no file is left of it",
            ) from error


class _Blocks:
    """Hooks that take the time of blocks, inside of those that stream them: a wait for a block is no part of it."""

    def __init__(self, memory: Memory, recorder: Recorder) -> None:
        self._lanes, self._clock, self._recorder = memory.lanes, memory.clock, recorder
        self._open: defaultdict[int, list[tuple[nn.Module, Any]]] = defaultdict(list)  # by thread

    def watch(self, window: Window) -> list[Any]:
        own, name = window.module, window.name or type(window.module).__name__

        def enter(module: nn.Module, *_: object) -> None:
            if module is own:  # and no copy of it
                self._open[threading.get_ident()].append((own, self._clock.mark(self._lanes.compute())))

        def leave(module: nn.Module, *_: object) -> None:
            if module is own:
                self._left(own, name)

        return [
            own.register_forward_pre_hook(torch.compiler.disable(enter)),
            own.register_forward_hook(torch.compiler.disable(leave), prepend=True, always_call=True),
        ]

    def _left(self, own: nn.Module, name: str) -> None:
        """A forward ended: those begun within were interrupted; it has no begin where the trace began later."""
        thread, show = threading.get_ident(), self._recorder.show
        mine = self._open[thread]
        at = next((i for i in reversed(range(len(mine))) if mine[i][0] is own), None)
        if at is None:
            return
        begin = mine[at][1]
        del mine[at:]
        end = self._clock.mark(self._lanes.compute())
        self._clock.between(begin, end, lambda span: show(BLOCKS, thread, name, span.begin_ns, span.end_ns))


def _check(path: Path) -> None:
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "is no folder" if not folder.is_dir() else "cannot be written to"
        raise InputError(
            f"VGPUStack.trace: {path} cannot be written: {folder} {what}", remedy="make it first, or choose another"
        )
    if path.is_dir():
        raise InputError(f"VGPUStack.trace: expected the path of a file, and {path} is a folder")
