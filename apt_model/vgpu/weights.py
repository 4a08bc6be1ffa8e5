"""Where a model's values come from when it is attached without them: files, of which a piece at a time is read."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from apt_model.core.tensor_folders import TensorFolder, open_folder
from apt_model.core.tensor_io import DTYPES, read_tensor


class InFile(NamedTuple):
    """Bytes of a file."""

    path: Path
    start: int
    size: int


class Weights(Protocol):
    """Values of a model's parameters and buffers, by their names in the model."""

    def __contains__(self, name: object) -> bool:
        """Whether there are such."""

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]] | None:
        """Type and shape, where they are known before they are read."""

    def read(self, name: str) -> Tensor:
        """The values, on the CPU."""

    def place(self, name: str) -> InFile | None:
        """Where exactly these values lie, as bytes in rows; None where they are made from others."""


class FolderWeights:
    """Those in a folder of safetensors, under the names that they have there.

    Args:
        folder: with model.safetensors, or several files and their index.

    Raises:
        CheckpointError: a file is missing or damaged, as far as the headers tell.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder: TensorFolder = open_folder(Path(folder))

    def __contains__(self, name: object) -> bool:
        return name in self.folder.entries

    def names(self) -> Iterable[str]:
        """Of all tensors in the folder."""
        return self.folder.entries

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]] | None:
        """As the headers say."""
        entry = self.folder.entries[name]
        return DTYPES[entry.dtype], entry.shape

    def read(self, name: str) -> Tensor:
        """From the file."""
        return read_tensor(self.folder.homes[name], self.folder.entries[name])

    def place(self, name: str) -> InFile | None:
        """In the file."""
        entry = self.folder.entries[name]
        return InFile(self.folder.homes[name], entry.start, entry.size)
