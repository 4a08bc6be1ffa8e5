"""`apt-model train`: one run of the trainer, its options made from `TrainConfig`."""

import contextlib
import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from apt_model.cli import output
from apt_model.cli.options import FLAT, GlobalOptions, parse, parse_some
from apt_model.core.errors import ConfigError
from apt_model.trainer.config import TrainConfig
from apt_model.trainer.presets import PRESETS, preset
from apt_model.trainer.runs import saved_config

if TYPE_CHECKING:
    from apt_model.trainer.trainer import RunResult


@dataclass(frozen=True, kw_only=True)
class Options(GlobalOptions):
    """Train a model on text, or go on with a run.

    Options left out come from --preset; with --resume and no preset, from the run in --out.
    """

    preset: Annotated[str | None, tyro.conf.arg(metavar="{" + ",".join(PRESETS) + "}")] = None
    """A ready-made run to start from; the defaults shown here become its own."""
    config: Annotated[TrainConfig, FLAT] = field(default_factory=TrainConfig)


@dataclass(frozen=True, kw_only=True)
class _Beginning:
    """What decides the defaults of the rest."""

    preset: str | None = None
    out: str = TrainConfig.out
    resume: bool = False


def run(args: Sequence[str]) -> None:
    """Train, and say what the run came to."""
    default = Options(config=_defaults(parse_some(_Beginning, args, "train")))
    options = parse(Options, args, "train", default=default)
    _check_ids(options.config, default.config)
    # After the options, which need no torch.
    from apt_model.trainer.progress import make_progress  # noqa: PLC0415
    from apt_model.trainer.trainer import Trainer  # noqa: PLC0415

    with contextlib.closing(make_progress(quiet=options.quiet)) as progress:
        result = Trainer(options.config, progress=progress).run()
    if options.format == "json":
        output.write_json(dataclasses.asdict(result))
        return
    output.write_facts(_facts(result))
    if not options.quiet:
        hint = output.generate_hint(result.out, options.config.data.task)
        output.write_hints(f"apt-model eval {shlex.quote(result.out)}", hint)


def _defaults(beginning: _Beginning) -> TrainConfig:
    if beginning.preset is not None:
        return preset(beginning.preset)
    return saved_config(Path(beginning.out)) if beginning.resume else TrainConfig()


def _check_ids(config: TrainConfig, default: TrainConfig) -> None:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config.model, name) != getattr(default.model, name):
            raise ConfigError(
                f"--model.{name.replace('_', '-')} has no effect here: the tokenizer gives the id",
                remedy="leave it out; --data.tokenizer takes another tokenizer",
            )


def _facts(result: "RunResult") -> list[tuple[str, str]]:
    trained = result.tokens_per_s > 0  # a finished run that is resumed has no step left
    facts = [
        ("parameters", f"{result.parameters:,}"),
        ("loss", f"{output.figure(result.loss, '.4f')} nats/token" if trained else "no step was left to train"),
        ("held-out text", f"{output.figure(result.bits_per_byte, '.4f')} bits/byte"),
        ("speed", f"{result.tokens_per_s:,.0f} tokens/s" if trained else "-"),
        ("peak memory", output.size(result.peak_memory_bytes)),
        ("time", f"{result.seconds:,.1f} s"),
        ("checkpoint", result.checkpoint),
        ("curve", result.curve or "not drawn (--plot off, or no matplotlib)"),
    ]
    if result.skipped_steps:
        facts.insert(2, ("skipped steps", f"{result.skipped_steps} (gradients that were not finite)"))
    return facts
