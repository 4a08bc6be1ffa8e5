"""LoRA and DoRA over packed layers: `LoraConfig` learns of them once, in any import order, in any process."""

import functools
import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear, ParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from apt_model.core.errors import InputError
from apt_model.integrations.hf_selection import files_form, plain_linear
from apt_model.layers.fp4_experts import FP4Experts
from apt_model.layers.fp4_linear import FusedFP4Linear

_MARK = "_apt_fp4_original"


class LoraFP4Linear(Linear):  # type: ignore[misc]  # Any to mypy
    """`lora.Linear` over a `FusedFP4Linear`.

    Merging puts an `nn.Linear` of the layer's dtype in the packed layer's place: adding the adapter to 4 bits and
    rounding again would lose most of it. `unmerge` puts the packed layer back, bit for bit. To have the merged weight
    in 4 bits after all, quantise what `merge_and_unload` returns (`apt_model.optimization.quantize`).
    """

    packed_layer: FusedFP4Linear | None = None
    """The packed layer while a merged one stands in its place; no child, so that it is not saved beside it."""
    merging = False

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        if config.fan_in_fan_out:  # asked for because of a Conv1D, whose packed form has outputs first
            warnings.warn("fan_in_fan_out is set to False: a packed layer has its outputs first", stacklevel=2)
            config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the adapters into an `nn.Linear` that stands in the packed layer's place."""
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        base, outermost = self.get_base_layer(), not self.merging
        if isinstance(base, FusedFP4Linear):
            self.__dict__["packed_layer"], self.base_layer = base, plain_linear(base)
        self.__dict__["merging"] = True
        try:
            super().merge(safe_merge=safe_merge, adapter_names=names)
        finally:
            self.__dict__["merging"] = not outermost
            if outermost and not self.merged_adapters:
                self._put_back()

    def unmerge(self) -> None:
        """Put the packed layer back."""
        if not self.merged:
            super().unmerge()  # it warns
            return
        self.merged_adapters.clear()
        packed, plain = self.packed_layer, self.get_base_layer()
        if self.merging and packed is not None:  # a variant wants the weight without what is merged, in the same layer
            plain.weight.data = packed.dequantize()
            if packed.bias is not None:
                plain.bias.data = packed.bias.detach().to(plain.bias.dtype, copy=True)
        else:
            self._put_back()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What stands in this layer's place without adapters: merged, a plain layer as the model's class has it."""
        packed = self.packed_layer or self.get_base_layer()
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self.get_base_layer()
        return base if isinstance(base, FusedFP4Linear) else files_form(base, packed)

    def _put_back(self) -> None:
        if self.packed_layer is not None:
            self.base_layer = self.packed_layer
            self.__dict__["packed_layer"] = None

    def _apply(self, fn: Any, recurse: bool = True) -> "LoraFP4Linear":
        """Move the packed layer too while it is out of place."""
        if self.packed_layer is not None:
            self.packed_layer._apply(fn, recurse)  # noqa: SLF001 - as torch does with children
        super()._apply(fn, recurse)
        return self

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.", "apt_fp4.", 1)


class LoraFP4Experts(ParamWrapper):  # type: ignore[misc]  # Any to mypy
    """What `target_parameters` meets on packed experts: a refusal, where PEFT would train nothing, or fail later."""

    def __init__(self, base_layer: nn.Module, *_: Any, parameter_name: str = "", **__: Any) -> None:
        raise InputError(
            f"LoRA on packed experts ({parameter_name or type(base_layer).__name__}) is not there yet",
            remedy='keep them in 16 bits: AptFP4Config(modules_to_not_convert=("experts",))',
        )


def hook_lora() -> None:
    """Let every `LoraConfig` made from now on, or read from a file, know the packed layers; twice does no more."""
    original = LoraConfig.__post_init__
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        self._register_custom_module({FusedFP4Linear: LoraFP4Linear, FP4Experts: LoraFP4Experts})

    setattr(post_init, _MARK, original)
    LoraConfig.__post_init__ = post_init


def unhook_lora() -> None:
    """Undo `hook_lora`."""
    original = getattr(LoraConfig.__post_init__, _MARK, None)
    if original is not None:
        LoraConfig.__post_init__ = original
