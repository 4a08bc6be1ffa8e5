"""A model's files: `config.json` and `model.safetensors`."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from apt_model.core.errors import CheckpointError
from apt_model.core.files import atomic_file
from apt_model.core.fp4_storage import QUANTIZATION_CONFIG
from apt_model.core.tensor_files import read_header
from apt_model.core.tensor_io import DTYPES
from apt_model.modeling.configuration import APTModelConfiguration
from apt_model.modeling.packed_layers import describe_layers, is_packed, swap_layers

if TYPE_CHECKING:
    from apt_model.modeling.apt_model import APTModel

WEIGHTS_FILE = "model.safetensors"
_NAMES_SHOWN = 4


def save_model(model: "APTModel", directory: Path) -> None:
    """Write both files, each whole or not at all, the weights last."""
    directory.mkdir(parents=True, exist_ok=True)
    packed = describe_layers(model)
    model.config.save(directory, **({QUANTIZATION_CONFIG: packed} if packed else {}))
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_file(directory / WEIGHTS_FILE) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


def load_model(
    cls: type["APTModel"], directory: Path, *, device: torch.device, dtype: torch.dtype | None
) -> "APTModel":
    """Build the model that `directory` describes and give it the weights there."""
    config = APTModelConfiguration.load(directory)
    tensors = read_tensors(directory / WEIGHTS_FILE)
    model = _on_meta(cls, config, directory, {name: tensor.dtype for name, tensor in tensors.items()})
    check_tensors(model.state_dict(), tensors, directory / WEIGHTS_FILE)
    model.load_state_dict(tensors, assign=True)
    model.rotary.fill(model.embedding.weight.device)
    _freeze_packed(model)
    return model.to(device=device, dtype=dtype).eval()


def model_without_values(cls: type["APTModel"], directory: Path) -> "APTModel":
    """Build the model that `directory` describes, with its parameters on meta, in the types of the file."""
    config = APTModelConfiguration.load(directory)
    kinds = {name: DTYPES[entry.dtype] for name, entry in read_header(directory / WEIGHTS_FILE).entries.items()}
    model = _on_meta(cls, config, directory, kinds)
    for name, parameter in model.named_parameters():
        if parameter.dtype != kinds.get(name, parameter.dtype):
            parameter.data = parameter.data.to(kinds[name])
    model.rotary.fill(torch.device("cpu"))
    _freeze_packed(model)
    return model.eval()


def _on_meta(
    cls: type["APTModel"], config: APTModelConfiguration, directory: Path, kinds: dict[str, torch.dtype]
) -> "APTModel":
    """The model with the layers that tensors of these names and types are for."""
    with torch.device("meta"):
        model = cls(config)
    swap_layers(model, kinds, directory, kinds.get("embedding.weight", torch.get_default_dtype()))
    return model


def _freeze_packed(model: "APTModel") -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and not is_packed(name))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; `CheckpointError` when it is missing, truncated or not one."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: the folder holds no weights") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error})") from error


def check_tensors(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], path: Path) -> None:
    """Raise `CheckpointError` that names what is missing, unexpected, of another shape or, packed, of another type."""
    problems = []
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        problems.append(f"{len(missing)} missing ({', '.join(missing[:_NAMES_SHOWN])})")
    if extra:
        problems.append(f"{len(extra)} unexpected ({', '.join(extra[:_NAMES_SHOWN])})")
    problems += [
        f"{name} is {_spell(found[name], name)}, not {_spell(expected[name], name)}"
        for name in sorted(expected.keys() & found.keys())
        if _spell(found[name], name) != _spell(expected[name], name)
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit its config.json: {'; '.join(problems[:_NAMES_SHOWN])}",
            remedy="the two files come from different models, or one was altered: save the model again",
        )


def _spell(tensor: torch.Tensor, name: str) -> str:
    """Shape, and of packed tensors, which are never cast, the type too."""
    return f"{tensor.dtype} {list(tensor.shape)}" if is_packed(name) else f"{list(tensor.shape)}"
