"""`apt_fp4` in transformers: quantise while loading, open and save folders of ours. Importing this registers it."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from apt_model.core.errors import CheckpointError, ConfigError
from apt_model.core.fp4_storage import FROM_THE_ORIGINAL, QUANT_METHOD
from apt_model.integrations.hf_config import AptFP4Config
from apt_model.integrations.hf_conversions import (
    QuantizeFP4,
    check_names,
    expert_conversions,
    names_in,
    stacks_experts,
)
from apt_model.integrations.hf_selection import (
    Candidate,
    LoadReport,
    candidates,
    is_conv1d,
    pack_module,
    part_names,
    unpack_model,
)
from apt_model.layers.fp4_embedding import check_no_packed_embedding
from apt_model.layers.packed import PackedModule, pack, tensors
from apt_model.ops.fp4 import FORMATS

__all__ = ["AptFP4Config", "AptFP4HfQuantizer", "prepare_for_training"]

LOG = logging.getLogger(__name__)


class AptFP4HfQuantizer(HfQuantizer):  # type: ignore[misc]  # Any to mypy
    """Loads and saves models whose linear layers and experts are packed.

    After loading, `model.hf_quantizer.report` says what is in 4 bits, and of everything else why it is not.
    """

    requires_calibration = False
    quantization_config: AptFP4Config

    def __init__(self, quantization_config: AptFP4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: LoadReport | None = None
        self._waiting: dict[str, Candidate] = {}  # by full name of a weight
        self._names: list[str] | None = None

    # --- before loading

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse to quantise what goes to the disk: transformers maps the disk's files as they are."""
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if not self.pre_quantized and "disk" in places:
            raise ConfigError(
                "AptFP4Config: a model cannot be quantised while some of it is offloaded to the disk (device_map)",
                state="no weight was read",
                remedy="quantise the folder first, then load that: "
                f"apt-model quantize DIR --format {self.quantization_config.format} --layout apt --out DIR2",
            )

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes a weight that is still to be quantised will take; packed tensors on meta have their own size."""
        return None if self.pre_quantized else FORMATS[self.quantization_config.format].bits / 8

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:  # noqa: ARG002 - theirs
        """Whether the parameter is a weight that is waiting for its values."""
        return param_name in self._waiting

    def _process_model_before_weight_loading(self, model: Any, *, checkpoint_files: Any = None, **_: Any) -> None:
        config = self.quantization_config
        found = candidates(model, config.modules_to_not_convert, strict=not self.pre_quantized)
        chosen = [each for each in found if each.kept is None]
        if not chosen:
            left = "".join(f"; {each.name}: {each.kept}" for each in found[:3])
            raise ConfigError(f"AptFP4Config: {type(model).__name__} has no linear layer that can be quantised{left}")
        self.report = LoadReport(config.format, (), {each.name: each.kept for each in found if each.kept})
        self._waiting = {name: each for each in chosen for name in each.full_names}
        if self.pre_quantized:
            for each in chosen:
                self._pack(model, each.name)
            self._waiting = {}
            self._names = names_in(checkpoint_files)

    def _pack(self, model: nn.Module, name: str) -> PackedModule:
        config = self.quantization_config
        return pack_module(model, name, config.format, config.activation_dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Experts that files hold one by one: their packed tensors are stacked as their weights would be."""
        made = [*weight_conversions, *expert_conversions(weight_conversions, model)]
        names, self._names = self._names, None
        if names is not None:
            check_names(names, model, made, _packed_names(model))
        return made

    # --- while loading

    def get_quantize_ops(self) -> QuantizeFP4:
        """What is done with a weight from its file."""
        return QuantizeFP4(self._take)

    def _take(self, model: nn.Module, name: str, weight: Tensor, missing: set[str] | None) -> dict[str, Tensor]:
        """The packed tensors of the weight called `name`, with a module in place that takes them."""
        candidate = self._waiting.pop(name, None)
        if candidate is None:
            return {name: weight}
        plain = model.get_submodule(candidate.name)
        turned, is_new = is_conv1d(plain), not isinstance(plain, PackedModule)
        if is_new:
            for each in candidate.weights:  # on meta, in the type that the values come in
                held = plain.get_parameter(each)
                plain.register_parameter(each, nn.Parameter(torch.empty_like(held, device="meta", dtype=weight.dtype)))
        module = self._pack(model, candidate.name)
        if is_new and missing is not None:
            missing.difference_update(candidate.full_names)
            missing.update(part_names(module, candidate.name))
        key = name.rpartition(".")[2]
        rows_first = weight.mT if turned or module.slots[key].swapped else weight
        made = tensors(pack(rows_first, self.quantization_config.format))
        return {f"{name}_{part}": tensor for part, tensor in made.items()}

    # --- after loading

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self._finish_waiting(model)
        _check_filled(model)
        for module in model.modules():
            if isinstance(module, PackedModule):
                for name in module.slots:
                    for held in module.packed_weight(name):
                        if isinstance(held, nn.Parameter):
                            held.requires_grad_(False)
        self._describe(model)
        used = list(getattr(model, "_weight_conversions", None) or [])
        known = [each for each in _conversions(model) if stacks_experts(each)]
        have = {_signature(each) for each in used}
        used += [each for each in known if _signature(each) not in have]
        packed = [each for each in expert_conversions(used, model) if _signature(each) not in have]
        model._weight_conversions = [*used, *packed]  # noqa: SLF001 - what saving goes by
        LOG.info("%s", self.report)
        return model

    def _finish_waiting(self, model: nn.Module) -> None:
        """Modules whose weights came by another way, or not at all."""
        assert self.report is not None
        for name in list(dict.fromkeys(each.name for each in self._waiting.values())):
            module = model.get_submodule(name)
            if isinstance(module, PackedModule):
                continue
            held = next(each for each in self._waiting.values() if each.name == name)
            if all(getattr(module.get_parameter(each), "_is_hf_initialized", False) for each in held.weights):
                self._pack(model, name)
                _mark(model.get_submodule(name))
            else:
                self.report.kept[name] = "not in the files, and newly drawn"
        self._waiting = {}

    def _describe(self, model: Any) -> None:
        """Bring the report and the model's configuration in line with what the model holds now."""
        packed = tuple(name for name, each in model.named_modules() if isinstance(each, PackedModule))
        before = self.report.kept if self.report else {}
        found = candidates(model, (), strict=False)
        kept = {
            each.name: before.get(each.name) or each.kept or "in full precision"
            for each in found
            if each.name not in packed
        }
        self.report = LoadReport(self.quantization_config.format, packed, kept)
        self.quantization_config = self.quantization_config.without(tuple(sorted(kept)))
        model.config.quantization_config = self.quantization_config

    # --- saving, and back

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """What is saved is what the model holds: merged layers are plain, and config.json says so."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved
        check_no_packed_embedding(model)
        if any(isinstance(each, PackedModule) for each in model.modules()):
            self._describe(model)
        else:
            self.remove_quantization_config(model)
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        unpack_model(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._is_quantized = False  # noqa: SLF001 - transformers set it
        return model

    def is_serializable(self) -> bool:
        """Folders are written."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of the packed weights train; the weights themselves do not."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers have no graph break."""
        return True


def prepare_for_training(model: Any, *, gradient_checkpointing: bool = True) -> Any:
    """Freeze a quantised model for adapters on top of it; returns the model.

    PEFT's `prepare_model_for_kbit_training` copies embeddings and norms to float32 and leaves checkpointing off unless
    the model claims to be bitsandbytes'. This leaves every tensor's type alone.

    Args:
        model: a transformers model, before `get_peft_model`.
        gradient_checkpointing: recompute activations in backward; needs inputs that take a gradient, which is arranged.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if gradient_checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


def _conversions(model: Any) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415 - where it is used only

    return list(get_model_conversion_mapping(model, add_legacy=False))


def _signature(conversion: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    assert conversion is not None
    return tuple(conversion._original_source_patterns), tuple(conversion._original_target_patterns)  # noqa: SLF001


def _packed_names(model: nn.Module) -> list[str]:
    return [
        part
        for name, each in model.named_modules()
        if isinstance(each, PackedModule)
        for part in part_names(each, name)
    ]


def _mark(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # noqa: SLF001 - as if transformers had loaded it


def _check_filled(model: nn.Module) -> None:
    """Raise `CheckpointError` where a packed tensor got no values; those on meta were checked by their names."""
    missing = []
    for name, module in model.named_modules():
        if not isinstance(module, PackedModule):
            continue
        for key, held in module.named_parameters(recurse=False):
            if not held.is_meta and not getattr(held, "_is_hf_initialized", False):
                if any(key.startswith(f"{slot}_") and key.removeprefix(slot) in _SUFFIXES for slot in module.slots):
                    missing.append(f"{name}.{key}")
                else:
                    nn.init.zeros_(held)  # a bias that files leave out, as transformers draws it
    if missing:
        raise CheckpointError(
            f"{len(missing)} packed tensors are missing: {', '.join(missing[:3])}",
            state="the model was not returned",
            remedy=FROM_THE_ORIGINAL,
        )


_SUFFIXES = ("_packed", "_scale", "_global_scale")


def _register() -> None:
    """Tell transformers once, whatever is imported again."""
    if AUTO_QUANTIZATION_CONFIG_MAPPING.get(QUANT_METHOD) is not None:
        return
    register_quantization_config(QUANT_METHOD)(AptFP4Config)
    register_quantizer(QUANT_METHOD)(AptFP4HfQuantizer)


def _hook_peft() -> None:
    try:
        import peft  # noqa: F401, PLC0415 - only where it is installed
    except ImportError:
        return
    from apt_model.integrations.peft_fp4 import hook_lora  # noqa: PLC0415 - it needs peft

    hook_lora()


_register()
_hook_peft()
