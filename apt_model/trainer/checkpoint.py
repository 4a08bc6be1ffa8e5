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
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from apt_model.core.errors import CheckpointError
from apt_model.core.files import PARTIAL_PREFIX, atomic_directory, clear_partials, sha256
from apt_model.modeling.apt_model import APTModel
from apt_model.modeling.configuration import CONFIG_FILE
from apt_model.modeling.pretrained import WEIGHTS_FILE, read_tensors
from apt_model.trainer.runs import SavedModel, resume_command, step_folder, step_of, steps_saved

FORMAT = 1
MANIFEST, STATE, OPTIMIZER = "manifest.json", "state.json", "optimizer.safetensors"
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, STATE)
FILES = (CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER, STATE)


class Checkpoint(NamedTuple):
    """What a step folder holds besides the model."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    root: Path, step: int, model: APTModel, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write step `step`, then drop all but the newest `keep` and what killed runs left half-written.

    Raises:
        CheckpointError: it cannot be written (a full disk, say); those written before are untouched.
    """
    folder = step_folder(root, step)
    if folder.exists():
        return folder
    try:
        _write(folder, step, model, tensors, state)
    except (OSError, SafetensorError) as error:
        saved = steps_saved(root)
        raise CheckpointError(
            f"{folder} could not be written: {error}",
            state=f"the checkpoint of step {saved[-1]} is untouched" if saved else "there is no earlier checkpoint",
            remedy=f"make room on the disk, then: {resume_command(root)}",
        ) from error
    clear_partials(folder.parent)
    for old in steps_saved(root)[:-keep]:
        outdated = step_folder(root, old)
        outdated.rename(outdated.with_name(f"{PARTIAL_PREFIX}{outdated.name}"))  # half removed, it is no checkpoint
    clear_partials(folder.parent)
    return folder


def _write(folder: Path, step: int, model: APTModel, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    with atomic_directory(folder) as partial:
        model.save_pretrained(partial)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial / OPTIMIZER)
        (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=2), encoding="utf-8")
        write_manifest(partial)


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of the files in `folder`; the last to be written."""
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=2), encoding="utf-8")


def verify_model(saved: SavedModel) -> None:
    """Check the files of a run's model, or of one made from it; those of others have no manifest."""
    if saved.run is not None:
        verify(saved.folder, MODEL_FILES if saved.derived else FILES)


def verify(folder: Path, files: Sequence[str] = FILES) -> None:
    """Raise `CheckpointError` with the reason unless every file is there and unaltered, `files` among them."""
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
    if unlisted := [name for name in files if name not in listed]:
        raise _refused(folder, f"its {MANIFEST} does not list {', '.join(unlisted)}")
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
    if (found := state.pop("step")) != step:
        raise _refused(folder, f"it holds step {found}, whatever its name says")
    return Checkpoint(step, read_tensors(folder / OPTIMIZER), state)


def _refused(folder: Path, reason: str) -> CheckpointError:
    root = folder.parent.parent
    refused = step_of(folder)
    if refused is None:
        return CheckpointError(f"{folder} is refused: {reason}", remedy="make it again from the step that it came from")
    earlier = [step for step in steps_saved(root) if step < refused]
    if not earlier:
        return CheckpointError(f"{folder} is refused: {reason}", state="there is no earlier checkpoint")
    return CheckpointError(
        f"{folder} is refused: {reason}",
        state=f"the checkpoint of step {earlier[-1]} is untouched",
        remedy=f"to go on from it: rm -r {shlex.quote(str(folder))} && {resume_command(root)}",
    )
