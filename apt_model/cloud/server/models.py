"""The models that are held: made from a file of weights, tried, and found by name and version."""

import contextlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from apt_model.cloud.identity import described, digest_of
from apt_model.cloud.server.blocks import KINDS, QUANTIZE, Block, make_block
from apt_model.cloud.server.refusal import Refusal
from apt_model.cloud.wire import Layout
from apt_model.core.errors import CheckpointError, ConfigError, InputError
from apt_model.core.tensor_files import Entry, Header, read_bytes, read_header
from apt_model.core.tensor_io import DTYPES, read_tensor

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VERSION = re.compile(r"[0-9a-f]{16}")
BACKWARD = ".bwd"
"""What the name of a model's gradient ends with."""
_PIECE = 1 << 20
_MOST_TENSORS = 1 << 16
_PRODUCTS = 1 << 23


class Placed(NamedTuple):
    """A module where it computes."""

    module: nn.Module
    device: torch.device
    serial: bool = False
    """One forward at a time."""
    close: Callable[[], object] = lambda: None
    """Gives back what it holds."""


Place = Callable[[nn.Module, str | None], Placed]
"""Puts a module where it is to compute; the second is what `quantize` says."""


def on_device(device: torch.device) -> Place:
    """As it is, on one device."""

    def place(module: nn.Module, quantize: str | None) -> Placed:
        if quantize is not None:
            raise ConfigError(f"expected weights as they are, got quantize={quantize!r}, which this server has not")
        return Placed(module.to(device), device)

    return place


@dataclass(frozen=True, kw_only=True)
class Model:
    """A block that is ready to compute."""

    name: str
    version: str
    kind: str
    block: Block
    device: torch.device
    weights: int
    """Elements of all its tensors."""
    at_once: int = 0
    """Products of weights and rows that are computed in about 0.3 ms; 0 where that is not known."""
    lock: contextlib.AbstractContextManager[object] | None = None
    """Held by the forward that runs, where only one may."""
    close: Callable[[], object] = field(default=lambda: None, repr=False)
    again: dict[Layout, Any] = field(default_factory=dict, repr=False)
    """Short forwards that were asked for: `cloud.server.again`."""


class Models:
    """Models by name and version; a name alone means the version that came last."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._held: dict[str, dict[str, Model]] = {}
        self.loading: set[str] = set()
        """Names of models that are not there yet."""

    @property
    def ready(self) -> bool:
        """Whether all that was asked for is there."""
        return not self.loading

    def find(self, name: str, version: str | None) -> Model:
        """The model; `Refusal` where there is none: 404, or 503 while it is loading."""
        with self._lock:
            versions = self._held.get(name, {})
            found = versions.get(version) if version is not None else next(reversed(versions.values()), None)
        if found is not None:
            return found
        if name in self.loading:
            raise Refusal(503, f"model {name} is loading", retry_after=1)
        raise Refusal(404, "there is no such version of this model" if versions else "there is no such model")

    def versions(self, name: str) -> list[str]:
        """Those held of a model, the last one last."""
        with self._lock:
            return list(self._held.get(name, {}))

    def all(self) -> list[Model]:
        """Every one."""
        with self._lock:
            return [model for versions in self._held.values() for model in versions.values()]

    def load(self, name: str, path: Path, given: Mapping[str, Any] | None = None, prefix: str = "") -> Model:
        """Read a file, make its block, try it, and hold it; takes as long as that takes.

        Args:
            name: of the model.
            path: a safetensors file.
            given: {"kind", "config"}; None: what the file says of itself.
            prefix: only tensors whose names begin so, which they lose.

        Raises:
            CheckpointError: the file is damaged.
            InputError, ConfigError: its tensors are not such a block's.
        """
        about, entries = read_about(path, given, prefix)
        version = digest_of(about, pieces(path, entries))
        with self._lock:
            held = self._held.get(name, {}).get(version)
        if held is not None:
            return held
        tensors = {each: read_tensor(path, entry) for each, entry in entries.items()}
        block = make_block(about["kind"], about["config"], tensors)
        placed = self._place(block.module, about["config"].get(QUANTIZE))
        block.module = placed.module
        model = Model(
            name=name, version=version, kind=about["kind"], block=block, device=placed.device, close=placed.close,
            weights=sum(math.prod(entry.shape) for entry in entries.values()),
            lock=threading.Lock() if placed.serial else None, at_once=_at_once(placed, about["config"], block.dtype),
        )  # fmt: skip
        _try(model)
        with self._lock:
            self._held.setdefault(name, {})[version] = model
        return model

    def drop(self, name: str, version: str) -> bool:
        """Hold it no longer; what computes with it comes to its end. Whether it was there."""
        with self._lock:
            versions = self._held.get(name, {})
            model = versions.pop(version, None)
            if not versions:
                self._held.pop(name, None)
        if model is not None:
            model.close()
        return model is not None


def read_about(
    path: Path, given: Mapping[str, Any] | None = None, prefix: str = ""
) -> tuple[dict[str, Any], dict[str, Entry]]:
    """A file's kind and configuration, and its tensors' places."""
    header = read_header(path)
    about = described(given["kind"], given["config"]) if given is not None else _of_metadata(header)
    entries = {name[len(prefix) :]: entry for name, entry in header.entries.items() if name.startswith(prefix)}
    if prefix and about["kind"] in KINDS:
        keeps = KINDS[about["kind"]].keeps
        entries = {name: entry for name, entry in entries.items() if keeps(about["config"], name)}
    if not entries or len(entries) > _MOST_TENSORS:
        raise InputError(f"expected 1 to {_MOST_TENSORS} tensors, got {len(entries)}")
    strange = next((entry.dtype for entry in entries.values() if entry.dtype not in DTYPES), None)
    if strange is not None:
        raise InputError(f"expected tensors of {', '.join(DTYPES)}, got {strange}")
    return about, entries


def pieces(path: Path, entries: Mapping[str, Entry]) -> dict[str, tuple[str, tuple[int, ...], Iterator[memoryview]]]:
    """What `digest_of` takes, read a piece at a time."""
    return {name: (entry.dtype, entry.shape, _read(path, entry)) for name, entry in entries.items()}


def _read(path: Path, entry: Entry) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_PIECE, entry.size)))
    for start in range(0, entry.size, _PIECE):
        piece = buffer[: min(_PIECE, entry.size - start)]
        read_bytes(path, entry.start + start, piece)
        yield piece


def _of_metadata(header: Header) -> dict[str, Any]:
    metadata = header.metadata if isinstance(header.metadata, dict) else {}
    kind, text = metadata.get("kind"), metadata.get("config", "{}")
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        config = None
    if not isinstance(kind, str) or not isinstance(config, dict):
        raise CheckpointError(
            'expected a safetensors file whose __metadata__ holds "kind" and "config", an object as JSON',
            remedy="name the kind of block yourself: --block linear",
        )
    return described(kind, config)


def _at_once(placed: Placed, config: Mapping[str, Any], dtype: torch.dtype) -> int:
    """Products of fp32 in 0.3 ms of a core; a CPU may have no units for 16 bits, and needs up to 30 times as long."""
    if placed.serial or placed.device.type != "cpu" or config.get(QUANTIZE) is not None:
        return 0
    return _PRODUCTS if dtype == torch.float32 else _PRODUCTS // 32


def _try(model: Model) -> None:
    """A real product on the device: a model that cannot compute is not ready."""
    x = {name: tensor.to(model.device) for name, tensor in model.block.sample().items()}
    y = model.block.forward(x).cpu()
    if y.shape[-1] != model.block.y.shape[-1]:
        raise InputError(f"{model.kind}: expected an answer of width {model.block.y.shape[-1]}, got {list(y.shape)}")
