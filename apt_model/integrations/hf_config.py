"""What transformers is told of FP4 weights: `quantization_config`, as an argument and in config.json."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import Self

from apt_model.core.errors import ConfigError
from apt_model.core.fp4_storage import QUANT_METHOD, quantization_config, read_format
from apt_model.core.options import check_types, require, unknown_name


@dataclass(kw_only=True)
class AptFP4Config(QuantizationConfigMixin):  # type: ignore[misc]  # Any to mypy
    """How `from_pretrained(..., quantization_config=AptFP4Config())` loads a model in 16 bits.

    A folder that is quantised already says so itself; transformers then warns that it does not read this argument.
    A value that cannot be met raises `ConfigError`.
    """

    quant_method: ClassVar[str] = QUANT_METHOD

    format: Literal["nvfp4", "mxfp4"] = "nvfp4"
    """nvfp4: 4.5 bits a weight. mxfp4: 4.25 bits, and about twice the squared error."""
    modules_to_not_convert: tuple[str, ...] = ()
    """What stays as it is beside heads, routers and tied weights: patterns (*, ?), each held against every run of whole
    parts of a module's dotted name, as in "visual", "layers.0.mlp", "layers.*.down_proj"."""
    activation_dtype: Literal["fp8"] | None = None
    """fp8: products of many rows are in FP8, as `FusedFP4Linear` says. Files are the same; config.json keeps it."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first value that cannot be met."""
        given: Any = self.modules_to_not_convert
        self.modules_to_not_convert = tuple(given) if isinstance(given, list) else given  # as transformers' own take it
        check_types(self)
        for pattern in self.modules_to_not_convert:
            require(bool(pattern), "AptFP4Config.modules_to_not_convert", "names or patterns", pattern)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What config.json says; an error names what this version does not read, or does not know."""
        form, known = read_format(config_dict, "config.json"), {*quantization_config("nvfp4", ()), "activation_dtype"}
        for name in config_dict:
            if name not in known:
                raise unknown_name(name, known, "AptFP4Config")
        made = cls(
            format=form,  # type: ignore[arg-type]  # `read_format` checks it
            modules_to_not_convert=tuple(config_dict.get("modules_to_not_convert") or ()),
            activation_dtype=config_dict.get("activation_dtype"),
        )
        if return_unused_kwargs:
            return made, kwargs
        if kwargs:
            raise ConfigError(f"AptFP4Config has no option {next(iter(kwargs))!r}")
        return made

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets."""
        run_time = {} if self.activation_dtype is None else {"activation_dtype": self.activation_dtype}
        return {**quantization_config(self.format, self.modules_to_not_convert), **run_time}

    def without(self, names: tuple[str, ...]) -> Self:
        """The same, with these modules left as they are."""
        return dataclasses.replace(self, modules_to_not_convert=names)
