"""`LevelStack`: levels of memory with hard capacities, and the models whose weights pass through them."""

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from apt_model.core.errors import CapacityError, InputError, StorageError
from apt_model.core.options import require
from apt_model.vgpu.attached import Attached, check, leave_order, prepare
from apt_model.vgpu.config import VGPUConfig
from apt_model.vgpu.hollow import Hollow
from apt_model.vgpu.keyed import KeyedTensors
from apt_model.vgpu.layout import Layout, Packing, lay_out
from apt_model.vgpu.memory import memory_of
from apt_model.vgpu.modules import buffer_bytes, tree_of
from apt_model.vgpu.planned import planned_report
from apt_model.vgpu.planner import DISK
from apt_model.vgpu.report import Report
from apt_model.vgpu.trace import Trace
from apt_model.vgpu.weights import FolderWeights, Weights

if TYPE_CHECKING:
    from rich.console import Console

LOG = logging.getLogger(__name__)
# Of host memory, the part that threads have to read other people's files through.
_OF_SPARE = 16


class LevelStack:
    """GPU, CPU and SSD as one memory: no level ever holds more than its capacity.

    `attach` moves a model's weights to the levels, fastest first, and has each block's on level 1 while its forward
    runs; the results are bit for bit those of the model as it was. `VGPUStack` adds `load`, which knows saved models.

    Args:
        config: the levels, as `VGPUConfig` or as a dictionary.
    """

    def __init__(self, config: VGPUConfig | Mapping[str, Any]) -> None:
        self.config = VGPUConfig.of(config)
        self._memory = memory_of(self.config)
        self.levels = self._memory.levels
        self.device = self._memory.lanes.device
        self._keyed = KeyedTensors(self._memory)
        self._lock = threading.RLock()
        self._models: dict[int, Attached] = {}
        self._numbers = itertools.count()
        self._closed = False
        self._trace: Trace | None = None
        self._mover: ThreadPoolExecutor | None = None

    @classmethod
    def from_config(cls, config: VGPUConfig | Mapping[str, Any]) -> Self:
        """A stack of a dictionary: {"levels": [{"capacity_mb": ..., "device": ...}, ...]}."""
        return cls(config)

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep a copy of `tensor` on the highest level that has room, from which what was used longest ago moves down.

        Raises:
            CapacityError: no level has room, even after moving; nothing is lost.
        """
        with self._lock:
            self._begin()
            self._keyed.put(key, tensor)

    def get(self, key: str) -> Tensor:
        """A copy of the tensor, byte for byte, on level 1's device; it moves to level 1. `KeyError` for a stranger."""
        with self._lock:
            self._begin()
            return self._keyed.get(key)

    def prefetch(self, keys: Iterable[str]) -> None:
        """Begin to bring tensors to level 1 in this order, and go on; strangers are passed over."""
        keys = [keys] if isinstance(keys, str) else list(keys)
        with self._lock:
            self._check_open()
            if self._mover is None:
                self._mover = ThreadPoolExecutor(1, "apt-vgpu-prefetch")
            for key in keys:
                self._mover.submit(self._promote, key)

    def delete(self, key: str) -> None:
        """Forget a tensor. `KeyError` for a stranger."""
        with self._lock:
            self._check_open()
            self._keyed.delete(key)

    def __contains__(self, key: object) -> bool:
        with self._lock:
            return key in self._keyed

    def __len__(self) -> int:
        with self._lock:
            return len(self._keyed)

    def _promote(self, key: str) -> None:
        with self._lock:
            if not self._closed:
                try:
                    self._keyed.promote(key)
                except StorageError as error:  # which `get` raises
                    LOG.info("prefetch of %r: %s", key, error.message)

    def attach(self, model: nn.Module, *, weights: str | Path | Weights | None = None) -> nn.Module:
        """Move the weights of `model` to the levels, and stream them from there; returns the model.

        The model computes on level 1's device and takes its inputs there.

        Args:
            model: any; with `weights` its parameters may be on meta, and never are all in memory at once.
            weights: a folder of safetensors that holds the values, by their names in the model, or an object that
                gives them (`vgpu/weights.py`). A block that lives on the disk and lies in these files as it is needed
                is read from them, and takes no room of the disk's level.

        Raises:
            CapacityError: a level is too small; says the least that would do. The model stays as it was.
            CheckpointError: the files lack values, or have others; the model stays as it was.
        """
        source = FolderWeights(weights) if isinstance(weights, str | Path) else weights
        with self._lock, torch.inference_mode(mode=False), torch.no_grad():
            self._begin()
            check(model)
            hollow: Hollow | None = None
            try:
                prepare(model, self.device)
                hollow = None if source is None else Hollow(model, source, self.device)
                layout = self._layout(model, hollow)
                prefix = f"model-{next(self._numbers)}-"
                self._models[id(model)] = Attached(model, layout, self._memory, prefix, hollow)
            except BaseException:
                if hollow is not None:
                    hollow.undo()
                leave_order(model, self.device)
                raise
            if self._trace is not None:
                self._trace.add(model, layout.windows)
        return model

    def plan(self, model: nn.Module, tokens: int = 1, *, length: int | None = None) -> Report:
        """What would live where if `model` were attached, and how long a pass of `tokens` tokens would take.

        Moves nothing. Rates are the levels' `speed_gbps`, those that `apt-model plan --measure` has kept of this
        device, or measured here, within what the levels have free.

        Args:
            model: as `attach` takes it.
            tokens: of a pass.
            length: of its sequences; None: it is one sequence.
        """
        for name, value in (("tokens", tokens), ("length", length or tokens)):
            good = isinstance(value, int) and value > 0
            require(good, f"VGPUStack.plan: {name}", "a whole number above 0", value)
        with self._lock, torch.inference_mode(mode=False), torch.no_grad():
            self._begin()
            check(model)
            layout = self._layout(model)
            return planned_report(model, layout, self._memory, tokens=tokens, length=length or tokens)

    def detach(self, model: nn.Module) -> nn.Module:
        """Give `model` its weights back, on the device that they came from, and end the streaming."""
        with self._lock, torch.inference_mode(mode=False), torch.no_grad():
            attached = self._models.get(id(model))
            if attached is None:
                raise InputError("the model is not attached to this stack")
            attached.restore()
            del self._models[id(model)]
            if self._trace is not None:
                self._trace.remove(model)
        return model

    def stats(self) -> dict[str, Any]:
        """Counts of each level, and of all: {"levels": [...], "hit_rate", "stall_ms", "surprises"}.

        Any thread may ask, at any time: nothing that runs is waited for, and what the device has not done yet counts
        to `bytes_in` already, to rates, hits and stalls later.
        """
        self._memory.clock.poll()
        if self._lock.acquire(blocking=False):  # else what nobody sees any more counts until the next look
            try:
                self._memory.sweep()
            finally:
                self._lock.release()
        levels = [level.stats() for level in self.levels]
        streaming = [each.streaming for each in list(self._models.values())]
        return {
            "levels": levels,
            "hit_rate": levels[0]["hit_rate"],
            "stall_ms": self.levels[0].stalled_s * 1e3,
            "surprises": sum(each.surprises() for each in streaming if each is not None),
        }

    @contextlib.contextmanager
    def trace(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Write what happens in the body to `path`, for ui.perfetto.dev: what came to each level, blocks, waits.

        After an exception what was recorded till then is written all the same. While it runs, tracing costs time; it
        waits for the device at its begin and at its end.

        Raises:
            InputError: `path` cannot be written, the stack is closed, or it is being traced.
            MissingExtraError: the package `perfetto` is not installed.
        """
        with self._lock:
            self._check_open()
            if self._trace is not None:
                raise InputError("the stack is being traced already", remedy="end that trace first")
            trace = self._trace = Trace(Path(path), self._memory)
        try:
            with self._lock:
                for attached in self._models.values():
                    trace.add(attached.model, attached.layout.windows)
            yield
        except BaseException as error:
            self._end_trace(error)
            raise
        self._end_trace(None)

    def _end_trace(self, error: BaseException | None) -> None:
        with self._lock:
            assert self._trace is not None
            ended, self._trace = self._trace, None
            ended.end(error)

    @contextlib.contextmanager
    def top(self, *, every: float | None = None, console: "Console | None" = None) -> Iterator[None]:
        """Show `stats` while the body runs: a table on a terminal, else a line a level at a time.

        Args:
            every: seconds between two looks; None: 0.25 on a terminal, else 10.
            console: where to; None: the standard output.

        Raises:
            InputError: the stack is closed, or the console shows something else that moves.
        """
        from apt_model.vgpu.top import Top  # noqa: PLC0415 - rich only where it is asked for

        require(every is None or every > 0, "VGPUStack.top: every", "seconds above 0, or None", every)
        with self._lock:
            self._check_open()
        with Top(self.stats, every, console):
            yield

    def close(self, *, restore: bool = True) -> None:
        """Detach all models and give all memory and files back; a second call does nothing.

        With `restore` False models are given up: their streamed weights are gone, and reading one is an error. It is
        the way out where a damaged file keeps a model from getting its weights back, which is a `StorageError` here.
        """
        with self._lock, torch.inference_mode(mode=False), torch.no_grad():
            if self._closed:
                return
            for number, attached in list(self._models.items()):
                if restore:
                    attached.restore()
                else:
                    attached.leave()
                del self._models[number]
            self._keyed.clear()
            self._closed = True
        if self._mover is not None:
            self._mover.shutdown(cancel_futures=True)
        with self._lock:
            self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _layout(self, model: nn.Module, hollow: Hollow | None = None) -> Layout:
        tree, buffers, capacities = tree_of(model), buffer_bytes(model), self._memory.capacities()
        store, slots, policy = self._memory.store, self.config.slots, self.config.policy
        if hollow is None or store is None:
            return lay_out(tree, buffers, capacities, slots, policy=policy)

        def in_files(blob: Packing) -> bool:
            return hollow.pieces(blob) is not None

        layout = lay_out(tree, buffers, capacities, slots, in_files, policy=policy)
        if any(in_files(layout.blobs[i]) for i, home in enumerate(layout.plan.homes) if home == DISK):
            room = capacities.device if capacities.host is None else capacities.host
            chunk = store.chunk_within(room // _OF_SPARE, max(each.nbytes for each in tree.stored))
            spare = store.spare_for(chunk)
            try:
                layout = lay_out(tree, buffers, capacities.without(spare), slots, in_files, policy=policy)
            except CapacityError:  # no room to read them through: the disk level holds a copy
                return lay_out(tree, buffers, capacities, slots, policy=policy)
            layout.chunk, layout.spare = chunk, spare
        return layout

    def _begin(self) -> None:
        """Of what takes memory: what nobody sees any more is there for it."""
        self._check_open()
        self._memory.sweep()

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("the stack is closed", remedy="make a new one")
