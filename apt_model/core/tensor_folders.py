"""A model's folder of safetensors: one file, or several with an index, as Hugging Face names them. Imports no torch."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apt_model.core.errors import CheckpointError
from apt_model.core.tensor_files import Entry, Header, read_header

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_NAMES_SHOWN = 4


class TensorFolder(NamedTuple):
    """The tensors of a folder by name, whatever files they lie in; headers were read, data was not."""

    folder: Path
    headers: list[Header]
    entries: dict[str, Entry]
    homes: dict[str, Path]
    index_metadata: dict[str, Any] | None
    """What the index says besides the map; None where there is one file and no index."""


def open_folder(folder: Path) -> TensorFolder:
    """Read and check all headers.

    Raises `CheckpointError` when a file or a tensor that the index names is missing, or a header cannot be trusted.
    """
    if not (folder / INDEX_FILE).is_file():
        return _gather(folder, [_the_only_file(folder)], None)
    index = read_json(folder / INDEX_FILE)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(value, str) for value in places.values()):
        raise CheckpointError(
            f"{folder / INDEX_FILE}: expected a 'weight_map' of tensors and files, got {places!r:.80}"
        )
    names = sorted(set(places.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{folder / INDEX_FILE} names a file outside its folder: {outside[0]}")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of {len(names)} files of weights: {_some(absent)}",
            remedy="download the missing files into it",
        )
    found = _gather(folder, [folder / name for name in names], index.get("metadata") or {})
    if wrong := [name for name, file in places.items() if found.homes.get(name) != folder / file]:
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors are not where {INDEX_FILE} says: {_some(wrong)}",
            remedy="the files are of different downloads or saves: get them all again",
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `CheckpointError` when it is missing or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist", remedy="give a folder that holds a saved model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(values).__name__}")
    return values


def index_text(homes: Mapping[str, str], total_size: int, metadata: Mapping[str, Any]) -> str:
    """The index of tensors and the files that they lie in."""
    index = {"metadata": {**metadata, "total_size": total_size}, "weight_map": dict(sorted(homes.items()))}
    return json.dumps(index, indent=2) + "\n"


def _the_only_file(folder: Path) -> Path:
    if (folder / WEIGHTS_FILE).is_file():
        return folder / WEIGHTS_FILE
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder", remedy="give a folder that holds a saved model")
    if pickled := [name for name in _PICKLED if (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} holds its weights as {pickled[0]}, which can run code when it is read, and is not read here",
            remedy="save it as safetensors: model.save_pretrained(folder) of a transformers of today",
        )
    others = [path.name for path in sorted(folder.glob("*.safetensors"))]
    raise CheckpointError(
        f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}" + (f", only {_some(others)}" if others else ""),
        remedy=f"ls {shlex.quote(str(folder))} shows what is there; a model's own folder is wanted",
    )


def _gather(folder: Path, paths: list[Path], metadata: dict[str, Any] | None) -> TensorFolder:
    headers = [read_header(path) for path in paths]
    entries: dict[str, Entry] = {}
    homes: dict[str, Path] = {}
    for header in headers:
        if twice := sorted(entries.keys() & header.entries.keys()):
            raise CheckpointError(f"{twice[0]} stands in two files: {homes[twice[0]].name} and {header.path.name}")
        entries |= header.entries
        homes |= dict.fromkeys(header.entries, header.path)
    return TensorFolder(folder, headers, entries, homes, metadata)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
