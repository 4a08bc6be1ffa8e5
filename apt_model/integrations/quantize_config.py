"""What can be asked of the quantisation of a folder, and what came of it. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from apt_model.core.options import check_types, require

REPORT_FILE = "quantized.json"


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """How a folder of weights becomes one of 4-bit weights. A value that cannot be met raises `ConfigError`."""

    weights: Literal["nvfp4", "mxfp4"] = "nvfp4"
    """nvfp4: 4.5 bits a weight, blocks of 16; mxfp4: 4.25 bits, blocks of 32. --format nvfp4 says the same."""
    layout: Literal["auto", "apt", "compressed-tensors"] = "auto"
    """Whose words config.json has; compressed-tensors is read by transformers and vLLM without this package. auto: apt
    for our own models, and where a weight has no form in compressed-tensors."""
    skip: tuple[str, ...] = ()
    """What stays as it is: names or patterns of layers or of parts of their names, as in lm_head, layers.0.mlp,
    layers.*.down_proj."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, hpu, npu, xpu, or one with a number, such as cuda:1."""
    dry_run: bool = False
    """Say what would become of every tensor, in bytes, and write nothing."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first value that cannot be met."""
        check_types(self)
        for pattern in self.skip:
            require(bool(pattern), "QuantizeConfig.skip", "names or patterns", pattern)


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """What became of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    converted: bool
    reason: str
    bytes_before: int
    bytes_after: int
    error: float | None = None
    """Squared error over the squared weights; None where nothing was converted, or yet."""


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """What became of a folder."""

    source: str
    out: str
    weights: str
    layout: str
    layout_reason: str
    decided_by: str
    """Which model told the layers apart, or that names did, and why."""
    dry_run: bool
    bytes_before: int
    bytes_after: int
    seconds: float
    tensors: tuple[TensorReport, ...]
    left_out: tuple[str, ...]
    """Files of the source that were not copied."""
    notes: tuple[str, ...]
    """What to know before the folder is used."""

    @property
    def converted(self) -> list[TensorReport]:
        """Those that became FP4."""
        return [each for each in self.tensors if each.converted]

    @property
    def kept(self) -> list[TensorReport]:
        """Those that stayed as they were."""
        return [each for each in self.tensors if not each.converted]
