"""`VGPUStack` with `load`: models that are larger than memory come from their files to the levels."""

import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from apt_model.core.errors import CheckpointError, ConfigError, MissingExtraError
from apt_model.core.fp4_storage import CONFIG_FILE, QUANT_METHOD, QUANTIZATION_CONFIG
from apt_model.core.tensor_folders import read_json
from apt_model.optimization.convert import quantize as convert
from apt_model.optimization.fp4_config import FP4Config
from apt_model.optimization.saved_weights import QuantizedWeights, TransformersWeights, turned_layers
from apt_model.vgpu.config import VGPUConfig
from apt_model.vgpu.stack import LevelStack
from apt_model.vgpu.weights import FolderWeights, Weights

LOG = logging.getLogger(__name__)
_SHOWN = 5


class VGPUStack(LevelStack):
    """GPU, CPU and SSD as one memory: no level ever holds more than its capacity.

    `attach` moves a model's weights to the levels, fastest first, and has each block's on level 1 while its forward
    runs; the results are bit for bit those of the model as it was. `load` does so with a saved model.

    Args:
        config: the levels, as `VGPUConfig` or as a dictionary.
    """

    model: nn.Module | None = None
    """What `load` made."""

    @classmethod
    def load(
        cls, folder: str | Path, *, config: VGPUConfig | Mapping[str, Any],
        model: Callable[[], nn.Module] | None = None, quantize: FP4Config | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:  # fmt: skip
        """A stack that holds a saved model, which never is in memory as a whole; it is the stack's `model`.

        Blocks that live on the disk are read from the model's own files where these hold them as they are needed.

        Args:
            folder: with config.json and safetensors, or a name on the Hugging Face hub, which is downloaded.
            config: the levels.
            model: makes the model for these files, whose `torch.empty` gives memory on meta meanwhile. None: the one of
                transformers that config.json names.
            quantize: "nvfp4", "mxfp4" or an `FP4Config`: linear layers are put into 4 bits as they are read.
            dtype: of the model; None: what config.json says, else the files.

        Raises:
            CapacityError: a level is too small; says the least that would do.
            CheckpointError: files are missing or damaged, or of another model.
        """
        made = cls(config)
        try:
            found, weights = _open(_folder(folder), model, quantize, dtype)
            made.attach(found, weights=weights)
        except BaseException:
            made.close(restore=False)
            raise
        made.model = found
        return made


class _ValuesLater(TorchFunctionMode):
    """What would be memory without values is on meta: parameters before they are drawn. The rest is as it is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") in (None, "cpu", torch.device("cpu")):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _folder(folder: str | Path) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    if not isinstance(folder, str) or folder.count("/") != 1 or folder.startswith((".", "/", "~")):
        raise CheckpointError(f"{folder}: no such folder", remedy="give a folder that holds a saved model")
    hub = _of_hugging_face("huggingface_hub")
    return Path(hub.snapshot_download(folder, allow_patterns=["*.json", "*.safetensors"]))


def _open(
    folder: Path, make: Callable[[], nn.Module] | None, quantize: FP4Config | str | None, dtype: torch.dtype | None
) -> tuple[nn.Module, Weights]:
    """The model without values, and those."""
    chosen = FP4Config(format=quantize) if isinstance(quantize, str) else quantize  # type: ignore[arg-type]
    weights: Weights
    if make is None:
        model, weights = _transformers(folder, dtype, packing=chosen is not None)
    else:
        with _ValuesLater():
            model = make()
        model = model if dtype is None else model.to(dtype)
        weights = FolderWeights(folder)
    if chosen is not None:
        turned = turned_layers(model)
        model = convert(model, chosen)
        weights = QuantizedWeights(weights, model, turned)
    return model, weights


def _transformers(folder: Path, dtype: torch.dtype | None, *, packing: bool) -> tuple[nn.Module, TransformersWeights]:
    """The model that config.json names."""
    raw = read_json(folder / CONFIG_FILE)
    name = (raw.get("architectures") or [None])[0]
    transformers = _of_hugging_face("transformers")
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise ConfigError(
            f"{folder / CONFIG_FILE} names the architecture {name!r}, which transformers does not have",
            remedy="give a function that makes the model: VGPUStack.load(..., model=lambda: MyModel(...))",
        )
    configuration = kind.config_class.from_pretrained(folder)
    quantizer = _quantizer(raw.get(QUANTIZATION_CONFIG), folder, packing=packing)
    with _ValuesLater():
        model = kind._from_config(configuration, dtype=dtype or configuration.dtype or _most(folder))  # noqa: SLF001
    if quantizer is not None:
        files = [str(path) for path in sorted(folder.glob("*.safetensors"))]
        quantizer.preprocess_model(model=model, dtype=model.dtype, checkpoint_files=files)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    weights = TransformersWeights(folder, model, quantizer)
    if weights.left:
        LOG.warning(
            "%s: %d tensors have no place in %s: %s", folder, len(weights.left), name, ", ".join(weights.left[:_SHOWN])
        )
    return model.eval(), weights


def _of_hugging_face(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError("VGPUStack.load of a Hugging Face model", name.partition(".")[0], "hf") from error


def _quantizer(found: Any, folder: Path, *, packing: bool) -> Any:
    """What transformers opens a quantised folder with; None where it is none."""
    if not found:
        return None
    method = found.get("quant_method")
    if method != QUANT_METHOD:
        raise ConfigError(
            f"{folder} is quantised by {method!r}, whose tensors are not streamed",
            remedy=f"apt-model quantize opens nvfp4 and mxfp4 of others; one of ours is {QUANT_METHOD!r}",
        )
    if packing:
        raise ConfigError(f"{folder} is quantised already", remedy="leave `quantize` out")
    auto = _of_hugging_face("transformers.quantizers.auto")
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ConfigError(
            f"{folder} is quantised by {QUANT_METHOD!r}, which transformers has not been told of",
            remedy="from apt_model.integrations import AptFP4Config  # registers it",
        )
    return auto.AutoHfQuantizer.from_config(found, pre_quantized=True)


def _most(folder: Path) -> torch.dtype:
    """The type of most bytes in the files."""
    weights, sizes = FolderWeights(folder), {}  # type: FolderWeights, dict[torch.dtype, int]
    for name in weights.names():
        kind = weights.kind(name)
        if kind is not None and kind[0].is_floating_point:
            sizes[kind[0]] = sizes.get(kind[0], 0) + weights.folder.entries[name].size
    return max(sizes, key=lambda each: sizes[each], default=torch.get_default_dtype())
