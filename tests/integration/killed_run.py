"""Trains, and kills itself where it is told: `python killed_run.py OUT SOURCE resume|new [PLACE CALL]`.

The run has everything whose state could be forgotten: dropout, accumulation, moments, per-tensor clipping bounds that
bind after step 100, and low-rank compression with its error and basis. Each step is a line on the standard output.
"""

import os
import signal
import sys
from pathlib import Path

from micro import train_config
from safetensors.torch import save

from apt_model.core.errors import AptError
from apt_model.modeling import pretrained
from apt_model.trainer import checkpoint
from apt_model.trainer.progress import Silent
from apt_model.trainer.trainer import Trainer

STEPS, EVERY = 112, 8


def settings(out, source, **changes):
    """The run; `changes` are options."""
    options = {
        "steps": STEPS,
        "checkpoint_every": EVERY,
        "grad_accumulation": 2,
        "log_every": 3,
        "eval_every": 20,
        "model": {"dropout": 0.1, "num_decoder_layers": 1},
        "gradient": {"clipping": "adagc", "rank_ratio": 0.25, "refresh_steps": 5},
    }
    return train_config(out, source, **{**options, **changes})


class Steps(Silent):
    """Says each step at once."""

    def step(self, step, _row):
        """One line."""
        print(step, flush=True)


def _half_written(tensors, path, **_):
    whole = save(tensors)
    Path(path).write_bytes(whole[: len(whole) // 2])


# Where: whose function, its name, and what is done instead of it before the end.
PLACES = {
    "before a step": (Trainer, "train_step", None),
    "in the weights": (pretrained, "save_file", _half_written),
    "in the optimizer's state": (checkpoint, "save_file", _half_written),
    "before the manifest": (checkpoint, "sha256", None),
    "after the rename": (checkpoint, "clear_partials", None),
}


def kill_at(place, call):
    """Let the process end without warning at that call of the function that `place` means, counted from 1."""
    owner, name, instead = PLACES[place]
    real, calls = getattr(owner, name), 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            if instead is not None:
                instead(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def main(out, source, how, place=None, call="1"):
    """Train; an error of ours is its message and its exit code."""
    if place is not None:
        kill_at(place, int(call))
    try:
        Trainer(settings(Path(out), Path(source), resume=how == "resume"), progress=Steps()).run()
    except AptError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
