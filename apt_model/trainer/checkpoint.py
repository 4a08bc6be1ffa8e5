"""Checkpoints of a run: a folder a step, complete or absent, checked before a byte of it is used.

    OUT/checkpoints/step-00000200/
        config.json, model.safetensors     the model; `APTModel.from_pretrained` reads them
        optimizer.safetensors              the optimizer's and the gradient treatment's tensors
        state.json                         step, counters
        manifest.json                      size and SHA-256 of each file, written last

A folder is filled under another name, flushed and renamed, so that a kill leaves either the whole step or none of it.
There is no random state to keep: everything random in step n follows from the seed and n.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from apt_model.core.errors import CheckpointError
from apt_model.core.files import PARTIAL_PREFIX, atomic_directory, sha256
from apt_model.modeling.apt_model import APTModel
from apt_model.modeling.pretrained import read_tensors

FORMAT = 1
MANIFEST, STATE, OPTIMIZER = "manifest.json", "state.json", "optimizer.safetensors"
_STEP_FOLDER = re.compile(r"step-(\d{8})")


class Checkpoint(NamedTuple):
    """What a step folder holds besides the model."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def step_folder(root: Path, step: int) -> Path:
    """Where step `step` of the run in `root` is kept."""
    return root / "checkpoints" / f"step-{step:08d}"


def steps_saved(root: Path) -> list[int]:
    """Steps that the run in `root` has complete folders of, ascending."""
    found = (_STEP_FOLDER.fullmatch(path.name) for path in (root / "checkpoints").glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def save_checkpoint(
    root: Path, step: int, model: APTModel, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write step `step`, then drop all but the newest `keep` and what killed runs left half-written."""
    folder = step_folder(root, step)
    if folder.exists():
        return folder
    with atomic_directory(folder) as partial:
        model.save_pretrained(partial)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial / OPTIMIZER)
        (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=2), encoding="utf-8")
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(partial.iterdir())
        }
        (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=2), encoding="utf-8")
    for old in steps_saved(root)[:-keep]:
        shutil.rmtree(step_folder(root, old))
    for partial in folder.parent.glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(partial)
    return folder


def verify(folder: Path) -> None:
    """Raise `CheckpointError` with the reason unless every file of the checkpoint is there and unaltered."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        version = manifest["format"]
    except FileNotFoundError as error:
        raise _refused(folder, f"it has no {MANIFEST}, so it is no checkpoint of a run") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refused(folder, f"its {MANIFEST} cannot be read ({error!r})") from error
    if version != FORMAT:
        raise _refused(folder, f"it has format {version!r}, and this version reads format {FORMAT}")
    for name, (size, digest) in listed.items():
        path = folder / name
        if not path.is_file():
            raise _refused(folder, f"{name} is missing")
        if path.stat().st_size != size:
            raise _refused(folder, f"{name} has {path.stat().st_size} bytes instead of {size}: it is truncated")
        if sha256(path) != digest:
            raise _refused(folder, f"{name} was altered: its SHA-256 is not the one recorded")


def load_checkpoint(root: Path, step: int) -> Checkpoint:
    """Read what step `step` holds besides the model, after checking every file."""
    folder = step_folder(root, step)
    verify(folder)
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return Checkpoint(state.pop("step"), read_tensors(folder / OPTIMIZER), state)


def _refused(folder: Path, reason: str) -> CheckpointError:
    root = folder.parent.parent
    match = _STEP_FOLDER.fullmatch(folder.name)
    earlier = [step for step in steps_saved(root) if match and step < int(match[1])]
    if not earlier:
        return CheckpointError(f"{folder} is refused: {reason}", state="there is no earlier checkpoint")
    return CheckpointError(
        f"{folder} is refused: {reason}",
        state=f"the checkpoint of step {earlier[-1]} is untouched",
        remedy=f"to go on from it: rm -r {folder} and resume again",
    )
