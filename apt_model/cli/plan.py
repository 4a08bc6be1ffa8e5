"""`apt-model plan`: what of a model would live where, and how long a pass would take; reads no weights."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from apt_model.cli import output, plan_text
from apt_model.cli.capacity import capacity
from apt_model.cli.options import GlobalOptions, parse
from apt_model.core.errors import CapacityError, CheckpointError, ConfigError
from apt_model.core.fp4_storage import CONFIG_FILE
from apt_model.core.options import require
from apt_model.core.tensor_folders import open_folder, read_json
from apt_model.trainer.runs import CONFIG_FILE as RUN_FILE
from apt_model.trainer.runs import find_weights
from apt_model.vgpu import rates as rates_file
from apt_model.vgpu.headers import Outline, outline
from apt_model.vgpu.layout import lay_out
from apt_model.vgpu.least import least_device, least_host
from apt_model.vgpu.planner import Capacities
from apt_model.vgpu.rates import ANY, Rates
from apt_model.vgpu.report import report
from apt_model.vgpu.saved_names import Saved
from apt_model.vgpu.work import facts_of

_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Options(GlobalOptions):
    """Show what of a model would live where in GPU, RAM and SSD, how long a forward would take, and what bounds it.

    Reads config.json and the headers of safetensors, and no weights; loads no torch, except to measure. Activations and
    caches of keys and values are not weights, and need room beside --gpu.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[MODEL]")] = ""
    """A folder with config.json and safetensors, a run, or a model of the Hugging Face Hub as ORG/NAME."""
    gpu: str | None = None
    """Most that weights may take of the GPU: 24GiB, 24GB, 2000MB, 2000 (MB)."""
    ram: str | None = None
    """Most that weights may take of host memory; none: there is no such level."""
    ssd: str | None = None
    """Most that weights may take of a disk; none: there is no such level."""
    tokens: int = 1
    """Tokens of a pass, in all sequences together."""
    batch: int = 1
    """Sequences of a pass."""
    slots: int = 3
    """Places on the GPU that streamed blocks pass through."""
    quantize: Literal["nvfp4", "mxfp4"] | None = None
    """Plan with linear layers in 4 bits, as `quantize` makes them; none: as the files have them."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """The type in which weights are loaded; auto: as the files have them."""
    device: Literal["auto", "gpu", "cpu"] = "auto"
    """What the first level is; auto: what the rates are of, else a GPU."""
    rates: str | None = None
    """A file of rates; else those that --measure has kept on this machine."""
    measure: tyro.conf.FlagCreatePairsOff[bool] = False
    """Measure the rates of this machine first, and keep them (in the file of --rates, if given). Loads torch."""
    link_gbps: float | None = None
    """GB/s from host memory to the GPU, instead of the rates' own."""
    disk_gbps: float | None = None
    """GB/s from the disk to host memory, instead of the rates' own."""
    tflops: float | None = None
    """TFLOP/s of all products, instead of the rates' own."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first value that cannot be met."""
        for name in ("tokens", "batch", "slots"):
            require(getattr(self, name) >= 1, f"--{name}", "a whole number from 1 on", getattr(self, name))
        fits = self.tokens % self.batch == 0
        require(
            fits, "--tokens", f"a multiple of --batch {self.batch}, as all sequences are of one length", self.tokens
        )
        for name in ("link_gbps", "disk_gbps", "tflops"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name.replace('_', '-')}", "a number above 0", value)


def run(args: Sequence[str]) -> None:
    """Look the model up, lay it out and print what comes of it."""
    options = parse(Options, args, "plan")
    if not options.model and not options.measure:
        raise ConfigError("missing: MODEL", remedy="give a folder or ORG/NAME; or --measure, which needs no model")
    if not options.model:
        rates = _measured(options, None)
        path = Path(options.rates) if options.rates else rates_file.kept_file(rates.kind)
        if options.format == "json":
            output.write_json({"rates": dataclasses.asdict(rates), "kept_in": str(path)})
        else:
            plan_text.tell_rates(rates, str(path))
        return
    model, config = _look_up(options)
    _plan(options, model, config, _measured(options, model) if options.measure else None)


def _plan(options: Options, model: Outline, config: Mapping[str, Any], measured: Rates | None) -> None:
    rates, kind = _rates(options, measured)
    levels = _levels(options, kind)
    device, host, disk = (None if level is None else level[1] for level in levels)
    assert device is not None
    least = _least(options, model, device, disk)
    try:
        layout = lay_out(model.root, model.buffers, Capacities(device=device, host=host, disk=disk), options.slots)
    except CapacityError as error:
        raise _as_options(error, least, device) from error
    made = report(
        layout, levels, facts_of(config), rates, tokens=options.tokens, length=options.tokens // options.batch,
        element=_BYTES[model.dtype],
    )  # fmt: skip
    if options.format == "json":
        weights = {"bytes": model.root.nbytes, "dtype": model.dtype, "buffers": model.buffers}
        found = {"model": options.model, "weights": weights, "plan": dataclasses.asdict(made), "least": least}
        output.write_json({**found, "rates": dataclasses.asdict(rates)})
        return
    kind = f"{options.quantize or 'FP4'} and {model.dtype}" if model.fp4 else model.dtype
    title = f"{options.model}: {output.size(model.root.nbytes)} of weights in {kind}"
    plan_text.tell(title, made, rates, least, batch=options.batch)
    if not options.quiet and made.pass_s is None:
        output.write_hints("apt-model plan --measure")


# What was asked for.


def _look_up(options: Options) -> tuple[Outline, dict[str, Any]]:
    config, tensors = _read(options.model)
    dtype = None if options.dtype == "auto" else _DTYPES[options.dtype]
    return outline(tensors, config, quantize=options.quantize, dtype=dtype), config


def _read(model: str) -> tuple[dict[str, Any], dict[str, Saved]]:
    """Configuration and headers, of a folder or of the Hub."""
    path = Path(model).expanduser()
    if not path.exists() and _HUB_ID.fullmatch(model):
        from apt_model.integrations.hub import look_up  # noqa: PLC0415 - only for the Hub

        remote = look_up(model)
        return remote.config, {name: Saved(*each) for name, each in remote.tensors.items()}
    if not path.is_dir():
        raise CheckpointError(
            f"{model}: expected a model's folder, or a model of the Hugging Face Hub as ORG/NAME",
            remedy="see that the path is right",
        )
    folder = find_weights(path)[0] if (path / RUN_FILE).is_file() else path
    entries = open_folder(folder).entries
    return read_json(folder / CONFIG_FILE), {name: Saved(each.dtype, each.shape) for name, each in entries.items()}


def _levels(options: Options, kind: str) -> list[tuple[str, int] | None]:
    if options.gpu is None:
        raise ConfigError("missing: --gpu", remedy="say what weights may take of the GPU: --gpu 24GiB")
    if options.ssd is not None and options.ram is None and kind == "gpu":
        raise ConfigError(
            "--ssd: expected --ram too, through which a GPU reaches the disk", remedy="add --ram 16GiB, or so"
        )
    given = (("cuda" if kind == "gpu" else "cpu", "gpu"), ("cpu", "ram"), ("ssd", "ssd"))
    found: list[tuple[str, int] | None] = []
    for device, name in given:
        text = getattr(options, name)
        found.append(None if text is None else (device, capacity(text, f"--{name}")))
    return found


def _measured(options: Options, model: Outline | None) -> Rates:
    # These load torch, which takes a second.
    from apt_model.core.system import get_device_manager  # noqa: PLC0415
    from apt_model.vgpu.machine import measure  # noqa: PLC0415

    dtypes = [model.dtype] if model is not None else ["BF16", "F32"]
    rates = measure(get_device_manager("cpu" if options.device == "cpu" else "auto"), dtypes)
    before = rates_file.kept(rates.kind) if options.rates is None else None
    if before is not None and (before.device, before.numels) == (rates.device, rates.numels):
        rates = dataclasses.replace(
            rates, products={**before.products, **rates.products},
            narrow_products={**before.narrow_products, **rates.narrow_products},
        )  # fmt: skip
    rates_file.keep(rates, None if options.rates is None else Path(options.rates))
    return rates


def _rates(options: Options, measured: Rates | None) -> tuple[Rates, str]:
    """What is known, and whether the first level is a GPU or a CPU."""
    found = measured or (rates_file.read(Path(options.rates)) if options.rates else None)
    if found is None:
        kinds = ("gpu", "cpu") if options.device == "auto" else (options.device,)
        found = next((each for kind in kinds if (each := rates_file.kept(kind)) is not None), None)
    kind = options.device if options.device != "auto" else "gpu" if found is None else found.kind
    if found is None or found.kind != kind:
        found = Rates(kind=kind)
    given: dict[str, Any] = {
        name: value for name in ("link_gbps", "disk_gbps") if (value := getattr(options, name)) is not None
    }
    if options.tflops is not None:
        curve = ((1, options.tflops),)
        given |= {"products": {ANY: curve}, "fp4_products": curve, "narrow_products": {}}
    return dataclasses.replace(found, **given), kind


def _least(options: Options, model: Outline, device: int, disk: int | None) -> dict[str, int]:
    """The smallest capacities that work, in bytes: of the GPU, and of host memory with that, or with what is given."""
    gpu = least_device(model.root, model.buffers, options.slots)

    def ram(room: int) -> int:
        return least_host(model.root, model.buffers, options.slots, device=room, disk=disk)

    return {"gpu": gpu, "ram": ram(gpu), "ram_with_gpu": ram(max(device, gpu))}


def _as_options(error: CapacityError, least: Mapping[str, int], device: int) -> CapacityError:
    """The same error, with this command's options for a remedy."""
    if device < least["gpu"]:
        remedy = f"the least that works: --gpu {plan_text.enough(least['gpu'])} --ram {plan_text.enough(least['ram'])}"
    else:
        remedy = f"with this --gpu the least that works: --ram {plan_text.enough(least['ram_with_gpu'])}"
    return CapacityError(error.message, state="nothing was moved", remedy=f"{remedy}; or more of --ssd")
