"""`apt-model eval`: bits per byte of all held-out text, beside gzip and xz, and beside the plain twin."""

import contextlib
import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from apt_model.cli import output
from apt_model.cli.options import GlobalOptions, parse
from apt_model.core.files import write_text
from apt_model.core.fp4_storage import format_of
from apt_model.core.options import require
from apt_model.trainer.runs import EVAL_FILE, SavedModel, find_model

_COMPRESSORS = (("gzip", "gzip -9"), ("xz", "xz -9e"))


@dataclass(frozen=True, kw_only=True)
class Options(GlobalOptions):
    """Score the text that a run held out, in bits per byte: the information that the model needs for each byte.

    The result is also written to eval.json in the run's folder, or in the quantised one.
    """

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """A run, one of its step folders, or what apt-model quantize made of one: then both are scored."""
    max_tokens: int | None = None
    """Held-out tokens to score at most, spread over the whole; None scores them all."""
    compare: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also train and score the twin: the same run without left spin, autopoietic attention and DBC-DAC."""
    batch_size: int | None = None
    """Sequences scored at once; None takes the run's."""
    device: str = "auto"
    """Where to score: auto, cpu, cuda, hpu, npu, xpu, or one with a number, such as cuda:1.

    The twin is trained where the run's own --device says.
    """

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first value that cannot be met."""
        for name in ("max_tokens", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name.replace('_', '-')}", "at least 1", value)


def run(args: Sequence[str]) -> None:
    """Score, write eval.json, and print the figures."""
    options = parse(Options, args, "eval")
    saved = find_model(Path(options.path))
    found = _score(saved, options)
    home = saved.folder if saved.derived else saved.run or saved.folder
    write_text(home / EVAL_FILE, output.as_json(found, indent=2))
    if options.format == "json":
        output.write_json(found)
        return
    output.write_table(("", "bits/byte", "bytes", "training s", "tokens/s"), _rows(found), _title(found))
    if not options.quiet:
        if found["partial"]:
            output.write("  the models were scored on a part of the text that gzip and xz had\n")
        compare = [] if options.compare else [f"apt-model eval {shlex.quote(found['path'])} --compare"]
        output.write_hints(*compare, output.generate_hint(found["path"], found["task"]))


def _score(saved: SavedModel, options: Options) -> dict[str, Any]:
    # After the options, which need no torch.
    from apt_model.trainer.progress import make_progress  # noqa: PLC0415
    from apt_model.trainer.scoring import Scorer, mechanisms_off  # noqa: PLC0415

    with contextlib.closing(make_progress(quiet=options.quiet)) as progress:
        scorer = Scorer(saved, device=options.device, progress=progress)
        limits: dict[str, Any] = {"batch_size": options.batch_size, "max_tokens": options.max_tokens}
        twin = scorer.train_twin() if options.compare else None
        own = scorer.score(saved, **limits)
        before = scorer.score(scorer.origin(), **limits) if saved.derived else None
        plain = scorer.score(twin, **limits) if twin else None
        return {
            "run": str(scorer.run),
            "path": str(saved.folder if saved.derived else scorer.run),
            "weights": format_of(saved.folder),
            "task": scorer.config.data.task,
            "steps": scorer.config.steps,
            "device": scorer.manager.device.type,
            **dataclasses.asdict(own),
            "partial": own.tokens < scorer.data.heldout_tokens,
            "mechanisms_off": mechanisms_off(scorer.config.model),
            "compressors": scorer.compressors(),
            "before": dataclasses.asdict(before) if before else None,
            "plain": dataclasses.asdict(plain) if plain else None,
        }


def _title(found: dict[str, Any]) -> str:
    return (
        f"{found['path']}, step {found['step']} of {found['steps']}: "
        f"{found['tokens']:,} held-out tokens in {found['seconds']:.1f} s on {found['device']}"
    )


def _rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    notes = [*filter(None, [found["weights"]]), *(f"{name} off" for name in found["mechanisms_off"])]
    rows = [_row("this model" + (f" ({', '.join(notes)})" if notes else ""), found)]
    if found["before"]:
        rows.append(_row("before it was quantised", found["before"]))
    if found["plain"]:
        rows.append(_row("plain twin", found["plain"]))
    held = found["compressors"]
    rows += [(label, f"{held[name]:.4f}", f"{held['bytes']:,}", "", "") for name, label in _COMPRESSORS]
    return rows


def _row(name: str, score: dict[str, Any]) -> tuple[str, ...]:
    return (
        name,
        output.figure(score["bits_per_byte"], ".4f"),
        f"{score['bytes']:,}",
        output.figure(score["training_seconds"], ",.1f"),
        output.figure(score["training_tokens_per_s"], ",.0f"),
    )
