"""`apt-model info`: this version, this machine, and the size of a model."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from apt_model import __version__
from apt_model.cli import output
from apt_model.cli.options import GlobalOptions, parse
from apt_model.core.errors import ConfigError
from apt_model.modeling.configuration import CONFIG_FILE, APTModelConfiguration
from apt_model.trainer.presets import PRESETS, preset
from apt_model.trainer.runs import CONFIG_FILE as RUN_FILE
from apt_model.trainer.runs import find_model, saved_config, steps_saved

_PARTS = {
    "embedding": "embedding",
    "encoder_layers": "encoder",
    "encoder_norm": "encoder",
    "decoder_layers": "decoder",
    "decoder_norm": "decoder",
    "lm_head": "output projection",
}


@dataclass(frozen=True, kw_only=True)
class Options(GlobalOptions):
    """Show this version, this machine, and the size of a model."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[PATH]")] = ""
    """A run, one of its step folders, or what save_pretrained wrote."""
    preset: Annotated[str | None, tyro.conf.arg(metavar="{" + ",".join(PRESETS) + "}")] = None
    """The model of a ready-made run, instead of a path."""


def run(args: Sequence[str]) -> None:
    """Gather the facts and print them."""
    options = parse(Options, args, "info")
    if options.path and options.preset:
        raise ConfigError("apt-model info: expected a path or --preset, got both", remedy="leave one of them out")
    described = _described(options)
    found = {"version": __version__, "python": platform.python_version(), **_machine()}
    found["model"] = None if described is None else {"of": described[0], **_size(described[1])}
    if options.format == "json":
        output.write_json(found)
        return
    output.write_facts(_facts(found))
    if found["model"]:
        output.write_facts(_model_facts(found["model"]), f"model of {found['model']['of']}")


def _described(options: Options) -> tuple[str, APTModelConfiguration] | None:
    """Whose model is asked for, and its configuration; weights are not read, and need not be there."""
    if options.preset:
        return f"the preset {options.preset}", preset(options.preset).model
    if not options.path:
        return None
    path = Path(options.path)
    if (path / RUN_FILE).is_file():
        config, saved = saved_config(path), steps_saved(path)
        return f"{path} (step {saved[-1] if saved else 0} of {config.steps})", config.model
    if not (path / CONFIG_FILE).is_file():
        find_model(path)  # says what is wrong with the path
    return str(path), APTModelConfiguration.load(path)


def _machine() -> dict[str, Any]:
    # After the options, which need no torch.
    import torch  # noqa: PLC0415

    from apt_model.core.system import get_device_manager  # noqa: PLC0415

    manager = get_device_manager()
    return {
        "torch": str(torch.__version__),
        "device": {
            "type": manager.get_accelerator_type(),
            "name": manager.name(),
            "memory_bytes": manager.total_memory(),
            "free_bytes": manager.free_memory(),
            "bf16": manager.supports_bf16(),
        },
    }


def _size(config: APTModelConfiguration) -> dict[str, Any]:
    """Layers, parameters and bytes, without allocating a weight."""
    import torch  # noqa: PLC0415

    from apt_model.modeling.apt_model import APTModel  # noqa: PLC0415

    with torch.device("meta"):
        model = APTModel(config)
    parts = dict.fromkeys(_PARTS.values(), 0)
    for name, parameter in model.named_parameters():
        parts[_PARTS[name.partition(".")[0]]] += parameter.numel()
    total = model.num_parameters()
    return {
        "encoder_layers": 0 if config.decoder_only else config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "parameters": total,
        "parts": parts,
        "bytes_fp32": 4 * total,
        "bytes_bf16": 2 * total,
        "config": config.to_dict(),
    }


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    device = found["device"]
    bf16 = "multiplies bf16 natively" if device["bf16"] else "multiplies bf16 only by way of fp32"
    return [
        ("apt-model", found["version"]),
        ("python", found["python"]),
        ("torch", found["torch"]),
        ("device", f"{device['type']}: {device['name']}, {bf16}"),
        ("memory", f"{output.size(device['memory_bytes'])}, {output.size(device['free_bytes'])} free"),
    ]


def _model_facts(model: dict[str, Any]) -> list[tuple[str, str]]:
    config = model["config"]
    encoder = f"{model['encoder_layers']} encoder + " if model["encoder_layers"] else ""
    total = model["parameters"]
    facts = [
        ("layers", f"{encoder}{model['decoder_layers']} decoder"),
        ("width", f"{config['d_model']}, {config['num_heads']} heads, feed-forward {config['d_ff']}"),
        ("vocabulary", f"{config['vocab_size']:,}, up to {config['max_seq_len']:,} positions"),
        ("parameters", f"{total:,}"),
    ]
    facts += [(f"  {name}", f"{count:,} ({count / total:.0%})") for name, count in model["parts"].items() if count]
    if config["tie_word_embeddings"]:
        facts.append(("  output projection", "tied to the embedding"))
    return [
        *facts,
        ("weights", f"{output.size(model['bytes_fp32'])} in fp32, {output.size(model['bytes_bf16'])} in bf16"),
    ]
