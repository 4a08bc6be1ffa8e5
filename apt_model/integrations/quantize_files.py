"""From a folder of weights to one of FP4 weights; memory grows with neither the model nor its largest tensor."""

import dataclasses
import json
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from apt_model.core.errors import CheckpointError, ConfigError
from apt_model.core.files import atomic_directory, clear_partials
from apt_model.core.fp4_storage import CONFIG_FILE, QUANTIZATION_CONFIG, quantization_config
from apt_model.core.system import get_device_manager
from apt_model.core.tensor_files import TensorWriter
from apt_model.core.tensor_folders import INDEX_FILE, TensorFolder, index_text, open_folder, read_json
from apt_model.integrations.fp4_files import of_bitsandbytes, open_fp4
from apt_model.integrations.fp4_plan import COMPRESSED_TENSORS, Decision, kept_layers, rename
from apt_model.integrations.fp4_rules import decide, expert_trap, needs_own_layout
from apt_model.integrations.fp4_schemes import compressed_tensors_config, quantization_of
from apt_model.integrations.outline import Outline, hugging_face_outline, no_outline
from apt_model.integrations.quantize_config import REPORT_FILE, FolderReport, QuantizeConfig, TensorReport
from apt_model.integrations.quantize_tensors import OnBytes, TensorWork
from apt_model.ops.fp4.format import Format, get_format

OWN_MODEL = "apt"
# Other forms of weights, and what speaks of the files as they were.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz"}
_STALE = {"manifest.json", REPORT_FILE}


class Plan(NamedTuple):
    """What is to become of a folder; only headers were read."""

    tensors: TensorFolder
    form: Format
    layout: str
    layout_reason: str
    outline: Outline
    decisions: list[Decision]
    notes: tuple[str, ...] = ()

    @property
    def bytes_after(self) -> int:
        """Bytes of the tensors that are to be written."""
        return sum(each.bytes_after(self.form) for each in self.decisions)


def quantize_folder(
    folder: Path,
    out: Path,
    config: QuantizeConfig | None = None,
    *,
    outline: Outline | None = None,
    on_bytes: OnBytes | None = None,
    finish: Callable[[Path], None] | None = None,
) -> FolderReport:
    """Quantise the linear layers of the model in `folder` into `out`, which appears whole or not at all.

    Weights that are FP4 already are brought into another layout: their tensors get other names, and the same values.

    Args:
        folder: config.json and safetensors, one file or several; its other files are copied.
        out: must not exist.
        config: how.
        outline: what the model makes of its tensors; None asks transformers.
        on_bytes: hears of progress.
        finish: adds to the finished folder before it takes its name.

    Raises:
        CheckpointError: the folder cannot be trusted, is quantised in a way that is not read, or holds no linear layer.
        ConfigError: `out` exists, there is no room for it, or an option cannot be met.
    """
    config = config or QuantizeConfig()
    begin = time.monotonic()
    device = get_device_manager(config.device).device
    plan = make_plan(folder, config, outline)
    _check_room(out, plan.bytes_after)
    copied, left_out = _other_files(plan.tensors)

    def report(errors: dict[str, float]) -> FolderReport:
        return _report(plan, out, config, errors, left_out=left_out, seconds=time.monotonic() - begin)

    if config.dry_run:
        return report({})
    try:
        clear_partials(out.parent, out.name)
        with atomic_directory(out) as partial:
            errors = _write(plan, partial, device, on_bytes)
            for path in copied:
                shutil.copyfile(path, partial / path.name)
            found = report(errors)
            text = json.dumps(dataclasses.asdict(found), indent=1)
            (partial / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
            if finish is not None:
                finish(partial)
    except OSError as error:
        raise CheckpointError(
            f"{out} could not be written: {error}", state=f"{folder} is as it was, and there is no {out}"
        ) from error
    return found


def make_plan(folder: Path, config: QuantizeConfig, outline: Outline | None = None) -> Plan:
    """Decide what becomes of every tensor, from headers alone; raises as `quantize_folder` does."""
    tensors, form = open_folder(folder), get_format(config.weights)
    own = read_json(folder / CONFIG_FILE).get("model_type") == OWN_MODEL
    if quantization_of(folder) is not None or of_bitsandbytes(tensors.entries):
        return _renamed(folder, config)
    if outline is None:
        outline = no_outline("names") if own else hugging_face_outline(folder, tensors.entries)
    if own and config.layout == COMPRESSED_TENSORS:
        raise ConfigError(
            "--layout compressed-tensors: an APT model is opened by this package alone", remedy="leave it out"
        )
    layout: str = config.layout
    reason = "asked for"
    if layout == "auto":
        special = "a model of ours" if own else needs_own_layout(tensors.entries, outline, form)
        layout, reason = ("apt", special) if special else (COMPRESSED_TENSORS, "what others read")
    decisions = decide(tensors.entries, outline, form, layout=layout, skip=config.skip)
    if not any(each.converted for each in decisions):
        raise CheckpointError(f"{folder} holds no weight of a linear layer that could become {form.name}")
    trap = expert_trap(decisions, form) if layout == COMPRESSED_TENSORS else None
    return Plan(tensors, form, layout, reason, outline, decisions, (trap,) if trap else ())


def _renamed(folder: Path, config: QuantizeConfig) -> Plan:
    """The plan for weights that are FP4 already."""
    fp4 = open_fp4(folder)
    if fp4.scheme.format != config.weights:
        raise ConfigError(
            f"--weights {config.weights}: {folder} holds {fp4.scheme.format} already, and rounding rounded weights "
            "would lose more",
            remedy="give the model in 16 or 32 bits that it was made from",
        )
    if config.skip:
        raise ConfigError(f"--skip: {folder} is quantised already, and all of it is kept", remedy="leave it out")
    layout = "apt" if config.layout == "auto" else config.layout
    decisions = rename(fp4, layout)
    reason = f"from {fp4.scheme.method}, value for value"
    return Plan(
        fp4.tensors, get_format(config.weights), layout, reason, no_outline("the files"), decisions, fp4.scheme.notes
    )


def _check_room(out: Path, need: int) -> None:
    if out.exists():
        raise ConfigError(
            f"--out: {out} exists", remedy=f"give another folder, or remove it: rm -r {shlex.quote(str(out))}"
        )
    home = next(path for path in out.absolute().parents if path.is_dir())
    if (free := shutil.disk_usage(home).free) < need:
        raise ConfigError(f"--out: expected room for {need:,} bytes, and {home} has {free:,}")


def _other_files(tensors: TensorFolder) -> tuple[list[Path], tuple[str, ...]]:
    """Files to copy, and names of what is left out."""
    ours = {CONFIG_FILE, INDEX_FILE, *(header.path.name for header in tensors.headers)}
    copied: list[Path] = []
    left_out: list[Path] = []
    for path in sorted(tensors.folder.iterdir()):
        if path.name in ours or path.name.startswith("."):
            continue
        index = path.name.endswith(".index.json")
        kept = path.is_file() and not index and path.suffix not in _WEIGHTS and path.name not in _STALE
        (copied if kept else left_out).append(path)
    return copied, tuple(path.name for path in left_out)


def _write(plan: Plan, partial: Path, device: torch.device, on_bytes: OnBytes | None) -> dict[str, float]:
    """Fill the folder with weights and config.json; the error of each weight that was converted, by name."""
    decisions = {each.name: each for each in plan.decisions}
    work = TensorWork(plan.tensors, plan.decisions, plan.form, device, on_bytes)
    homes: dict[str, str] = {}
    for header in plan.tensors.headers:
        mine = [decisions[name] for name in sorted(header.entries, key=lambda name: header.entries[name].start)]
        outputs = {name: part for each in mine for name, part in each.outputs(plan.form).items()}
        with TensorWriter(partial / header.path.name, outputs, header.metadata) as writer:
            for each in mine:
                (work.convert if each.converted else work.copy)(each, writer)
        homes |= dict.fromkeys(outputs, header.path.name)
    if plan.tensors.index_metadata is not None:
        text = index_text(homes, plan.bytes_after, plan.tensors.index_metadata)
        (partial / INDEX_FILE).write_text(text, encoding="utf-8")
    describe = quantization_config if plan.layout == "apt" else compressed_tensors_config
    values = read_json(plan.tensors.folder / CONFIG_FILE)
    values[QUANTIZATION_CONFIG] = describe(plan.form.name, kept_layers(plan.decisions, plan.outline))
    (partial / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return work.errors


def _report(
    plan: Plan,
    out: Path,
    config: QuantizeConfig,
    errors: dict[str, float],
    *,
    left_out: tuple[str, ...],
    seconds: float,
) -> FolderReport:
    tensors = tuple(
        TensorReport(
            name=each.name,
            shape=each.entry.shape,
            dtype=each.entry.dtype,
            converted=each.converted,
            reason=each.reason,
            bytes_before=each.entry.size,
            bytes_after=each.bytes_after(plan.form),
            error=errors.get(each.name),
        )
        for each in plan.decisions
    )
    return FolderReport(
        source=str(plan.tensors.folder),
        out=str(out),
        weights=plan.form.name,
        layout=plan.layout,
        layout_reason=plan.layout_reason,
        decided_by=plan.outline.source,
        dry_run=config.dry_run,
        bytes_before=sum(each.bytes_before for each in tensors),
        bytes_after=plan.bytes_after,
        seconds=seconds,
        tensors=tensors,
        left_out=left_out,
        notes=plan.notes,
    )
