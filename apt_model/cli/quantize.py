"""`apt-model quantize`: a folder of weights becomes one of 4-bit weights, in bounded memory."""

import dataclasses
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from apt_model.cli import output
from apt_model.cli.bytes_progress import bytes_progress
from apt_model.cli.options import FLAT, GlobalOptions, parse
from apt_model.core.errors import ConfigError
from apt_model.core.fp4_storage import BLOCKS, CONFIG_FILE
from apt_model.core.tensor_folders import open_folder, read_json
from apt_model.integrations.quantize_config import FolderReport, QuantizeConfig, TensorReport
from apt_model.modeling.configuration import MODEL_TYPE, APTModelConfiguration
from apt_model.trainer.runs import CONFIG_FILE as RUN_FILE
from apt_model.trainer.runs import TOKENIZER_FILE, find_weights, write_origin

if TYPE_CHECKING:
    from apt_model.integrations.outline import Outline

_OUTPUTS = ("human", "json")


@dataclass(frozen=True, kw_only=True)
class Options(GlobalOptions):
    """Turn the linear layers of a saved model into 4-bit floating point; every tensor is accounted for.

    The model is one of transformers' or of ours, as safetensors in one file or several. It is read and written a slab
    at a time, so memory grows with neither the model nor its largest tensor, and OUT appears whole or not at all.
    """

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """A folder with config.json and safetensors, a run, or one of its step folders."""
    out: str | None = None
    """The new folder; it must not exist. Only --dry-run does without."""
    format: Literal["human", "json"] = "human"
    """Tables and text, or one JSON object. nvfp4 and mxfp4 are taken here too, and mean --weights; it may be given
    twice: --format nvfp4 --format json."""
    config: Annotated[QuantizeConfig, FLAT] = field(default_factory=QuantizeConfig)


def run(args: Sequence[str]) -> None:
    """Quantise, and say what became of the tensors."""
    options = parse(Options, _with_weights(args), "quantize")
    if options.out is None and not options.config.dry_run:
        raise ConfigError("missing: --out DIR2", remedy="name the new folder; or --dry-run, which writes nothing")
    report, folder = _quantize(options)
    if options.format == "json":
        output.write_json(dataclasses.asdict(report))
        return
    _tell(report)
    if not options.quiet:
        output.write_hints(*_hints(report, folder, Path(options.path)))


def _with_weights(args: Sequence[str]) -> list[str]:
    """The arguments with `--format nvfp4` spelled `--weights nvfp4`."""
    found, rest = [], list(args)
    while rest:
        word = rest.pop(0)
        name, _, value = word.partition("=")
        if name != "--format" or not (value or rest):
            found.append(word)
            continue
        value = value or rest.pop(0)
        if value not in (*BLOCKS, *_OUTPUTS):
            raise ConfigError(
                f"--format: expected {' or '.join(BLOCKS)} (the weights), {' or '.join(_OUTPUTS)} (what is printed), "
                f"got {value!r}"
            )
        found += ["--weights" if value in BLOCKS else "--format", value]
    return found


def _quantize(options: Options) -> tuple[FolderReport, Path]:
    # After the options, which need no torch.
    from apt_model.integrations.quantize_files import quantize_folder  # noqa: PLC0415

    path = Path(options.path)
    folder, run_, step = find_weights(path) if (path / RUN_FILE).is_file() or _is_ours(path) else (path, None, None)
    tensors = open_folder(folder)
    out = Path(options.out) if options.out is not None else folder.with_name(f"{folder.name}-{options.config.weights}")
    if not options.quiet:
        output.write(f"{len(tensors.entries):,} tensors; asking the model for its layers\n", sys.stderr)
    outline = _outline(folder, tensors.entries) if _is_ours(folder) else None

    def finish(partial: Path) -> None:
        from apt_model.trainer.checkpoint import write_manifest  # noqa: PLC0415 - torch again

        if run_ is not None and step is not None:
            shutil.copyfile(run_ / TOKENIZER_FILE, partial / TOKENIZER_FILE)
            write_origin(partial, out, run_, step)
            write_manifest(partial)

    total = sum(entry.size for entry in tensors.entries.values())
    with bytes_progress(total, quiet=options.quiet or options.config.dry_run) as progress:
        report = quantize_folder(folder, out, options.config, outline=outline, on_bytes=progress, finish=finish)
    return report, folder


def _is_ours(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() and read_json(path / CONFIG_FILE).get("model_type") == MODEL_TYPE


def _outline(folder: Path, names: Iterable[str]) -> "Outline":
    """What our own model makes of its tensors."""
    import torch  # noqa: PLC0415 - not for --help

    from apt_model.integrations.outline import outline  # noqa: PLC0415
    from apt_model.modeling.apt_model import APTModel  # noqa: PLC0415

    with torch.device("meta"):
        return outline(APTModel(APTModelConfiguration.load(folder)), names)


def _tell(report: FolderReport) -> None:
    output.write_facts(_facts(report), f"{report.source} -> {'nothing (dry run)' if report.dry_run else report.out}")
    rows = [
        (
            name,
            f"{len(group):,}",
            output.size(sum(each.bytes_before for each in group)),
            output.size(sum(each.bytes_after for each in group)),
            output.figure(_worst(group), ".5f"),
        )
        for name, group in _patterns(report.converted)
    ]
    if rows:
        output.write_table(("converted", "tensors", "before", "after", "worst error"), rows)
    if report.kept:
        output.write_facts([(name, _why(group)) for name, group in _patterns(report.kept)], "not converted")


def _facts(report: FolderReport) -> list[tuple[str, str]]:
    verb = "would become" if report.dry_run else "became"
    packed = sum(each.reason.endswith("already") for each in report.tensors)
    saved = f"{output.size(report.bytes_before)} -> {output.size(report.bytes_after)}"
    facts = [
        ("converted", f"{len(report.converted):,} of {len(report.tensors):,} tensors {verb} {report.weights}")
        if report.converted
        else ("renamed", f"{packed:,} tensors that hold {report.weights} already; no value was changed"),
        ("bytes", f"{saved}, {report.bytes_after / report.bytes_before:.1%}"),
        ("layers", f"told apart by {report.decided_by}"),
        ("layout", f"{report.layout} ({report.layout_reason})"),
    ]
    if (worst := _worst(report.converted)) is not None:
        name = next(each.name for each in report.converted if each.error == worst)
        facts.append(("squared error", f"{worst:.5f} of the squared weights at worst, in {name}"))
    facts += [("note", note) for note in report.notes]
    if report.left_out:
        facts.append(("not copied", ", ".join(report.left_out)))
    return facts


def _patterns(tensors: Iterable[TensorReport]) -> list[tuple[str, list[TensorReport]]]:
    """Tensors whose names differ in numbers alone and whose reasons are the same, under one name."""
    groups: dict[tuple[str, str], list[TensorReport]] = {}
    for each in tensors:
        groups.setdefault((re.sub(r"\d+", "*", each.name), each.reason), []).append(each)
    return [(group[0].name if len(group) == 1 else name, group) for (name, _), group in groups.items()]


def _worst(group: Iterable[TensorReport]) -> float | None:
    return max((each.error for each in group if each.error is not None), default=None)


def _why(group: Sequence[TensorReport]) -> str:
    count = f"{len(group):,} tensors, " if len(group) > 1 else ""
    return f"{count}{output.size(sum(each.bytes_before for each in group))}: {group[0].reason}"


def _hints(report: FolderReport, folder: Path, path: Path) -> list[str]:
    if report.dry_run:
        return [f"apt-model quantize {shlex.quote(str(path))} --format {report.weights} --out DIR2"]
    out = shlex.quote(report.out)
    if (Path(report.out) / TOKENIZER_FILE).is_file() and _is_ours(folder):
        return [f"apt-model eval {out}", output.generate_hint(report.out, "causal")]
    return []
