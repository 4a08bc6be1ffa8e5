"""What `quantize` is told, and what it reports. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from apt_model.core.options import check_types


@dataclass(frozen=True, kw_only=True)
class FP4Config:
    """How `quantize` treats a model. A value that cannot be met raises `ConfigError`."""

    format: Literal["nvfp4", "mxfp4"] = "nvfp4"
    """nvfp4: 4.5 bits a weight. mxfp4: 4.25 bits, and about twice the squared error."""
    skip: tuple[str, ...] = ("lm_head",)
    """What stays as it is: patterns (*, ?), each held against every run of whole parts of a module's dotted name, as in
    "lm_head", "visual", "layers.0.mlp", "layers.*.down_proj"."""
    embeddings: bool = False
    """Whether `nn.Embedding` is quantised too, unless it is tied. Off, as quantised token tables cost some quality."""
    activation_dtype: Literal["fp8"] | None = None
    """fp8: where a product has many rows of input, they are rounded to E4M3, and the weight for them too: faster, and
    less exact (`FusedFP4Linear`). GPUs below compute capability 8.9 refuse. Linear layers and experts have it, experts
    not while torch.compile traces. None: inputs are taken as they are."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first value that cannot be met."""
        check_types(self)


class Skipped(NamedTuple):
    """A module or parameter that stays as it was."""

    name: str
    reason: str
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({self.reason}; {size_text(self.size)})"


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """What `quantize` did to a model; as a text, one line a finding."""

    format: str
    quantized: tuple[str, ...]
    """Modules whose weights are in 4 bits now."""
    asked: tuple[Skipped, ...]
    """Left as they are because of `FP4Config.skip`."""
    skipped: tuple[Skipped, ...]
    """Linear layers, experts and, where asked for, embeddings that could not be quantised."""
    others: tuple[Skipped, ...]
    """Matrices of modules that are no linear layers."""
    frozen: int
    """Weights that were trainable before."""
    bytes_before: int
    """Of all parameters and buffers."""
    bytes_after: int
    """The same, afterwards."""
    activation_dtype: str | None = None
    """That of the config."""

    def __str__(self) -> str:
        sizes = f"{size_text(self.bytes_before)} -> {size_text(self.bytes_after)} in parameters and buffers"
        lines = [f"{self.format}: {len(self.quantized)} modules quantised, {sizes}"]
        if self.activation_dtype:
            lines.append(f"products of many rows: in {self.activation_dtype} (experts: not while torch.compile traces)")
        if self.frozen:
            lines.append(f"frozen now, trainable before: {self.frozen} weights")
        for what, left in (
            ("left as asked", self.asked),
            ("could not be quantised", self.skipped),
            ("no linear layers", self.others),
        ):
            if left:
                lines.append(f"{what}: {', '.join(map(str, left))}")
        return "\n".join(lines)


def size_text(size: int) -> str:
    """Bytes, as a report names them."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size} bytes"
