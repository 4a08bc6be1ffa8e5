"""What becomes of every tensor of a folder: kept, quantised, or, where it is FP4 already, renamed.

# Shape suffix legend
#   N = output features, K = input features
"""

from collections.abc import Iterable
from typing import NamedTuple

from apt_model.core.errors import ConfigError
from apt_model.core.fp4_names import HEAD, layer_of
from apt_model.core.fp4_storage import GLOBAL_SCALE, PACKED, SCALE, packed_parts
from apt_model.core.tensor_files import Entry, tensor_bytes
from apt_model.integrations.fp4_files import FP4Folder
from apt_model.integrations.outline import EXPERTS, Outline
from apt_model.ops.fp4.format import Format

COMPRESSED_TENSORS = "compressed-tensors"
EMBEDDING = "an embedding"


class Decision(NamedTuple):
    """What becomes of one tensor."""

    name: str
    entry: Entry
    reason: str
    converted: bool = False
    transposed: bool = False
    """The file has [K, N]; what is written has [N, K]."""
    group: str = ""
    """Tensors of one group share their global scale."""
    target: str | None = None
    """Its name in the new files; None where it stays, '' where it is left out."""
    inverted: bool = False
    """Its values are replaced by one over them."""

    @property
    def packed(self) -> bool:
        """Whether it holds or becomes FP4 codes."""
        return self.converted or (self.target or "").endswith(PACKED)

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K] of a weight that is converted."""
        *lead, rows, columns = self.entry.shape
        return (*lead, columns, rows) if self.transposed else self.entry.shape

    def outputs(self, form: Format) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name, type and shape of what is written in its place."""
        if self.target == "":
            return {}
        if not self.converted:
            shape, target = self.entry.shape, self.target or self.name
            one = shape[-1:] == (1,) or not (self.target or "").endswith(GLOBAL_SCALE)
            return {target: (self.entry.dtype, shape if one else (*shape, 1))}
        return {self.name + part: held for part, held in packed_parts(self.shape, form.name).items()}

    def bytes_after(self, form: Format) -> int:
        """Bytes of what is written in its place."""
        return sum(tensor_bytes(*part) for part in self.outputs(form).values())


def rename(fp4: FP4Folder, layout: str) -> list[Decision]:
    """The decisions that bring FP4 weights into another layout, value for value.

    Raises `ConfigError` when they are in that layout already, or it has no form for them.
    """
    tensors, method = fp4.tensors, fp4.scheme.method
    if method == layout or (method, layout) == ("apt_fp4", "apt"):
        raise ConfigError(
            f"{tensors.folder} holds {fp4.scheme.format} weights in the layout {layout} already: there is nothing to do"
        )
    fused = any(len(each.shape) > 2 for each in fp4.weights.values())
    if layout == COMPRESSED_TENSORS and (method == "apt_fp4" or fused):
        raise ConfigError(
            f"--layout compressed-tensors: {tensors.folder} may hold fused experts or rows of any length, for which it "
            "has no form",
            remedy="quantise the 16-bit original with --layout compressed-tensors",
        )
    targets: dict[str, str] = {}
    for base, stored in fp4.weights.items():
        targets |= {stored.packed: base + PACKED, stored.scale: base + SCALE}
        if stored.global_scale is not None:
            targets[stored.global_scale] = base + GLOBAL_SCALE
    inverted = {stored.global_scale for stored in fp4.weights.values() if stored.inverted}
    return [
        Decision(
            name,
            entry,
            f"{fp4.scheme.format} already" if name in targets else _why_left_out(name in fp4.left_out),
            target="" if name in fp4.left_out else targets.get(name),
            inverted=name in inverted,
        )
        for name, entry in tensors.entries.items()
    ]


def kept_layers(decisions: Iterable[Decision], outline: Outline) -> list[str]:
    """Names of layers with a matrix that stays as it is, as the files and as the model have them."""
    kept: set[str] = set()
    inside = set()
    for each in decisions:
        named = outline.renamed.get(each.name, each.name)
        inside.add(layer_of(named))
        matrix = len(each.entry.shape) > 1 and (each.name.endswith(".weight") or EXPERTS in each.name)
        if matrix and not each.packed and each.target is None and not each.reason.startswith(EMBEDDING):
            kept |= {layer_of(each.name), layer_of(named)}
    tied = {name for name in outline.linears if name not in inside and HEAD.search(name)}
    return sorted(kept | tied)


def _why_left_out(left_out: bool) -> str:
    return "left out: a scale of activations or of the cache" if left_out else "not quantised"
