"""`VGPUStack`: levels of memory with hard capacities, and the models whose weights pass through them."""

import itertools
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from apt_model.core.errors import InputError
from apt_model.core.system.manager import get_device_manager
from apt_model.vgpu.arena import DevicePin, HostArena
from apt_model.vgpu.attached import Attached, Layout, lay_out
from apt_model.vgpu.config import DISK, HOST, VGPUConfig
from apt_model.vgpu.disk import DiskStore
from apt_model.vgpu.lanes import Lanes
from apt_model.vgpu.level import Level
from apt_model.vgpu.planner import Capacities

LOG = logging.getLogger(__name__)


class VGPUStack:
    """GPU, CPU and SSD as one memory: no level ever holds more than its capacity.

    `attach` moves a model's weights to the levels, fastest first, and has each block's on level 1 while its forward
    runs; the results are bit for bit those of the model as it was.

    Args:
        config: the levels, as `VGPUConfig` or as a dictionary.
    """

    def __init__(self, config: VGPUConfig | Mapping[str, Any]) -> None:
        self.config = VGPUConfig.of(config)
        first = self.config.levels[0]
        self._manager = get_device_manager(first.device)
        self.device = torch.device(first.device)
        self._lanes = Lanes(self.device)
        self.levels = [Level(level) for level in self.config.levels]
        self._lock = threading.RLock()
        self._models: dict[int, Attached] = {}
        self._numbers = itertools.count()
        self._closed = False
        below = self.config.levels[1:]
        self._arena = HostArena(below[0].capacity, pin=self._pin()) if below and below[0].device == HOST else None
        self._store: DiskStore | None = None
        if below and below[-1].device == DISK:
            path = below[-1].path
            self._store = DiskStore(None if path is None else Path(path), below[-1].capacity)

    @classmethod
    def from_config(cls, config: VGPUConfig | Mapping[str, Any]) -> Self:
        """A stack of a dictionary: {"levels": [{"capacity_mb": ..., "device": ...}, ...]}."""
        return cls(config)

    def attach(self, model: nn.Module) -> nn.Module:
        """Move the weights of `model` to the levels, and stream them from there; returns the model.

        The model computes on level 1's device and takes its inputs there.

        Raises:
            CapacityError: a level is too small; says the least that would do. The model stays as it was.
        """
        with self._lock:
            self._check_open()
            if id(model) in self._models:
                raise InputError("the model is attached to this stack already")
            layout = self._layout(model)
            prefix = f"model-{next(self._numbers)}-"
            self._models[id(model)] = Attached(
                model, layout, self._lanes, self.levels, self._arena, self._store, prefix
            )
        return model

    def detach(self, model: nn.Module) -> nn.Module:
        """Give `model` its weights back, on the device that they came from, and end the streaming."""
        with self._lock:
            attached = self._models.pop(id(model), None)
            if attached is None:
                raise InputError("the model is not attached to this stack")
            attached.restore()
        return model

    def stats(self) -> dict[str, Any]:
        """Counts of each level, and of all: {"levels": [...], "hit_rate", "stall_ms", "surprises"}."""
        with self._lock:
            streamed = [each for each in self._models.values() if each.streaming is not None]
            stall = sum(each.places.stalls() for each in streamed)
            first = self.levels[0]
            accesses = first.hits + first.misses
            return {
                "levels": [level.stats() for level in self.levels],
                "hit_rate": first.hits / accesses if accesses else None,
                "stall_ms": stall * 1e3,
                "surprises": sum(each.streaming.surprises() for each in streamed if each.streaming is not None),
            }

    def close(self) -> None:
        """Detach all models and give all memory and files back; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            for attached in self._models.values():
                attached.restore()
            self._models.clear()
            self._closed = True
            if self._arena is not None:
                self._arena.close()
            if self._store is not None:
                self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _layout(self, model: nn.Module) -> Layout:
        below = dict(zip([level.config.device for level in self.levels[1:]], self.levels[1:], strict=True))
        capacities = Capacities(
            device=self.levels[0].free,
            host=below[HOST].free if HOST in below else None,
            disk=below[DISK].free if DISK in below else None,
        )
        return lay_out(model, capacities, self.config.slots)

    def _pin(self) -> Any:
        """The driver's registration of host memory; None where level 1 reads host memory as it is."""
        return DevicePin(self._manager) if self._lanes.real else None

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("the stack is closed", remedy="make a new one")

