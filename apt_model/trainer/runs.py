"""What lies where in a run's folder, and which model a path means. Imports no torch.

OUT holds train.json (the effective configuration), tokenizer.json, what was measured (metrics.jsonl, curve.png,
eval.json), and checkpoints/step-00000200 and so on, each with the model and the state after that step (checkpoint.py).
A model that was made from a step (quantised, say) lies in a folder of its own, whose origin.json names run and step.
"""

import dataclasses
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_model.core.errors import CheckpointError
from apt_model.core.options import from_dict
from apt_model.modeling.configuration import CONFIG_FILE as MODEL_FILE
from apt_model.trainer.config import TrainConfig

CONFIG_FILE, TOKENIZER_FILE, EVAL_FILE = "train.json", "tokenizer.json", "eval.json"
ORIGIN_FILE = "origin.json"
_CHECKPOINTS = "checkpoints"
_STEP_FOLDER = re.compile(r"step-(\d{8})")
_WHAT_IS_TAKEN = "give a run (the --out of apt-model train), one of its step folders, or what save_pretrained wrote"
# What may differ between a run and its resumption: none of it enters the arithmetic (a layer that is recomputed gives
# the same gradients bit for bit).
_FREE_TO_CHANGE = frozenset(
    {
        "out", "resume", "device", "log_every", "eval_every", "eval_tokens", "checkpoint_every", "keep_checkpoints",
        "tensorboard", "plot", "activation_checkpointing", "max_skipped", "divergence_margin",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A model's files and where they come from."""

    folder: Path
    """Holds config.json and model.safetensors."""
    tokenizer: Path
    """A tokenizer.json."""
    run: Path | None = None
    """The run that the model belongs to; None for a folder of `save_pretrained`."""
    step: int | None = None
    """The run's steps that it was trained for."""

    @property
    def derived(self) -> bool:
        """Whether it was made from a step of the run, and is none itself."""
        return self.run is not None and step_of(self.folder.resolve()) is None


def step_folder(root: Path, step: int) -> Path:
    """Where step `step` of the run in `root` is kept."""
    return root / _CHECKPOINTS / f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that a folder's name speaks of; None when it is not named like a step folder."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def steps_saved(root: Path) -> list[int]:
    """Steps that the run in `root` has complete folders of, ascending."""
    found = (step_of(path) for path in (root / _CHECKPOINTS).glob("step-*"))
    return sorted(step for step in found if step is not None)


def resume_command(root: Path) -> str:
    """What goes on with the run in `root`."""
    return f"apt-model train --out {shlex.quote(str(root))} --resume"


def saved_config(root: Path) -> TrainConfig:
    """The configuration of the run in `root`; `CheckpointError` when there is none."""
    try:
        return from_dict(TrainConfig, json.loads((root / CONFIG_FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{root} holds no run: there is no {CONFIG_FILE} in it",
            remedy=f"start one: apt-model train --out {shlex.quote(str(root))}",
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{root / CONFIG_FILE} cannot be used: {error}") from error


def changed_options(before: TrainConfig, now: TrainConfig) -> list[str]:
    """Options that differ and enter the arithmetic, by name; the special ids do not count: the tokenizer gives them."""
    names = _differences(dataclasses.asdict(before), dataclasses.asdict(now))
    return [name for name in names if name not in _FREE_TO_CHANGE and not name.endswith("_token_id")]


def find_model(path: Path) -> SavedModel:
    """The model and the tokenizer that `path` means: a run's newest step, a step folder, or a saved model.

    Raises `CheckpointError` that says what is missing. The files themselves are not read.
    """
    folder, run, step = find_weights(path)
    home = folder if run is None or (folder / ORIGIN_FILE).is_file() else run
    if not (home / TOKENIZER_FILE).is_file():
        raise CheckpointError(
            f"there is no {TOKENIZER_FILE} in {home}, so the model's ids have no text",
            remedy=f"put the {TOKENIZER_FILE} that the model was trained with into {home}",
        )
    return SavedModel(folder=folder, tokenizer=home / TOKENIZER_FILE, run=run, step=step)


def find_weights(path: Path) -> tuple[Path, Path | None, int | None]:
    """The folder of the model that `path` means, and the run and step that it comes from; raises as `find_model`."""
    if (path / CONFIG_FILE).is_file():
        steps = steps_saved(path)
        if not steps:
            raise CheckpointError(f"the run in {path} has no checkpoint yet", remedy=resume_command(path))
        return step_folder(path, steps[-1]), path, steps[-1]
    if not (path / MODEL_FILE).is_file():
        raise _nothing_at(path)
    whole = path.resolve()
    step, root = step_of(whole), whole.parent.parent
    if step is not None and (root / CONFIG_FILE).is_file():
        return whole, root, step
    origin = _origin(path)
    return (path, None, None) if origin is None or not (origin[0] / CONFIG_FILE).is_file() else (path, *origin)


def write_origin(folder: Path, home: Path, run: Path, step: int) -> None:
    """Say in `folder`, which will be `home`, that its model was made from step `step` of `run`."""
    origin = {"run": os.path.relpath(run.resolve(), home.resolve()), "step": step}
    (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def check_origin(folder: Path) -> None:
    """Raise `CheckpointError` where the run that the model in `folder` was made from is gone."""
    origin = _origin(folder)
    if origin is not None and not (origin[0] / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder}: the run that it was made from is not at {origin[0]}",
            remedy=f"put the run there, or its new place into {folder / ORIGIN_FILE}",
        )


def _origin(folder: Path) -> tuple[Path, int] | None:
    """The run and the step that the model in `folder` was made from; None where it does not say."""
    try:
        origin = json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
        return Path(os.path.normpath(folder / origin["run"])), int(origin["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / ORIGIN_FILE} cannot be used: {error!r}") from error


def _nothing_at(path: Path) -> CheckpointError:
    if not path.exists():
        return CheckpointError(f"{path}: no such folder", remedy=_WHAT_IS_TAKEN)
    if not path.is_dir():
        return CheckpointError(f"{path} is a file, and a model is a folder", remedy=_WHAT_IS_TAKEN)
    return CheckpointError(f"{path} holds neither {CONFIG_FILE} nor {MODEL_FILE}: no model", remedy=_WHAT_IS_TAKEN)


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for name, value in now.items():
        if isinstance(value, dict):
            changed += _differences(before[name], value, f"{prefix}{name}.")
        elif value != before[name]:
            changed.append(prefix + name)
    return changed
