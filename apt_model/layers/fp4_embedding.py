"""`nn.Embedding` with its table in 4 bits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from apt_model.core.errors import InputError
from apt_model.core.options import require
from apt_model.layers.packed import PackedModule, check_dtype, empty, pack
from apt_model.layers.packed_products import dequantize_in_slabs
from apt_model.ops.fp4 import FORMATS, PackedWeight

# Options of nn.Embedding that write to the table or shape its gradient, and the values that ask for neither.
_OF_TRAINING = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}


class FusedFP4Embedding(PackedModule, nn.Embedding):
    """Rows of a table [num_embeddings, embedding_dim] in 4-bit floating point: a drop-in for a frozen `nn.Embedding`.

    Only the rows that are asked for are dequantised. The table takes 4.5 bits an element in nvfp4, 4.25 in mxfp4: 28%
    or 27% of bf16. A new one is drawn as `nn.Embedding` is, then quantised. `weight` is a `PackedView`, as in
    `FusedFP4Linear`.

    Args:
        num_embeddings: rows of the table; any number above 0.
        embedding_dim: width of a row; any number above 0.
        padding_idx: the row that a new table has at zero, as in `nn.Embedding`; no row takes a gradient.
        format: nvfp4 (blocks of 16, E4M3 scales, one fp32 scale) or mxfp4 (blocks of 32, E8M0 scales).
        device: where the tensors are; on meta nothing is drawn.
        dtype: type of the rows that come out; None is torch's default type.

    Shapes: ids [...] in int32 or int64 -> [..., embedding_dim] in `dtype`.
    """

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    weight_global_scale: nn.Parameter | None
    # What code for nn.Embedding reads; with these values none of them does anything.
    max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        format: str = "nvfp4",  # noqa: A002 - the public name
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Embedding's would make the full table a parameter
        where = type(self).__name__
        require(format in FORMATS, f"{where}.format", "nvfp4 or mxfp4", format)
        require(num_embeddings > 0, f"{where}.num_embeddings", "above 0", num_embeddings)
        require(embedding_dim > 0, f"{where}.embedding_dim", "above 0", embedding_dim)
        if padding_idx is not None:
            within = -num_embeddings <= padding_idx < num_embeddings
            require(within, f"{where}.padding_idx", f"one of {num_embeddings} rows", padding_idx)
            padding_idx %= num_embeddings
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.format, self.slots, self.orders = format, {}, {}
        self.dtype = check_dtype(dtype or torch.get_default_dtype(), where)
        self.add_packed("weight", empty((num_embeddings, embedding_dim), format, device))
        self.reset_parameters()

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, *, format: str = "nvfp4") -> Self:  # noqa: A002 - the public name
        """The layer of `embedding`'s table, quantised on its device."""
        if not isinstance(embedding, nn.Embedding) or isinstance(embedding, PackedModule):
            raise InputError(f"from_embedding: expected an nn.Embedding, got {type(embedding).__name__}")
        if option := option_of_training(embedding):
            raise InputError(
                f"from_embedding: expected an embedding that can be frozen, got one with {option}",
                remedy="quantise it once it is trained, with that option at its default",
            )
        table = embedding.weight.detach()
        rows, width = table.shape
        layer = cls(rows, width, embedding.padding_idx, format=format, device="meta", dtype=table.dtype)
        layer.add_packed("weight", pack(table, format))
        return layer.train(embedding.training)

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """An `nn.Embedding` of the table's values in `dtype`, None for the layer's; the layer stays as it is."""
        table = self.dequantize().to(dtype or self.dtype)
        return nn.Embedding.from_pretrained(table, freeze=False, padding_idx=self.padding_idx).train(self.training)

    def reset_parameters(self) -> None:
        """Draw the table as `nn.Embedding` does and quantise it; on meta there is nothing to draw."""
        device = self.weight_packed.device
        if device.type == "meta":
            return
        table = nn.init.normal_(torch.empty(self.num_embeddings, self.embedding_dim, device=device, dtype=self.dtype))
        if self.padding_idx is not None:
            table[self.padding_idx] = 0
        self.load_state_dict({"weight": table})

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The table as a read-only tensor of the layer's type; the packed parameters are what is stored."""
        return self.weight_view("weight")

    def dequantize(self) -> Tensor:
        """The table in the layer's type: a new tensor."""
        return dequantize_in_slabs(self.packed_weight("weight"), self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows that `ids` [...] asks for, [..., embedding_dim]."""
        table = self.packed_weight("weight")
        packed = F.embedding(ids, table.packed)
        scale = F.embedding(ids, table.scale.view(torch.uint8))  # not every device indexes float8
        rows = PackedWeight(
            packed.view(-1, packed.shape[-1]),
            scale.view(-1, scale.shape[-1]).view(table.scale.dtype),
            *table[2:],
        )
        return dequantize_in_slabs(rows, self.dtype).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return f"{super().extra_repr()}, format={self.format!r}, bits={FORMATS[self.format].bits:g}"


def option_of_training(embedding: nn.Embedding) -> str | None:
    """The option of an embedding that a frozen table cannot meet, with its value; None where there is none."""
    given = ((name, getattr(embedding, name), off) for name, off in _OF_TRAINING.items())
    return next((f"{name}={value!r}" for name, value, off in given if value != off), None)


def check_no_packed_embedding(model: nn.Module) -> None:
    """Raise `InputError` where a model has a packed embedding, for which our files have no form yet."""
    packed = [name for name, module in model.named_modules() if isinstance(module, FusedFP4Embedding)]
    if packed:
        raise InputError(
            f"save_pretrained: expected embeddings in full precision, got {', '.join(packed)} in 4 bits",
            remedy="save the model before its embeddings are quantised; or apt_model.optimization.dequantize(model)",
        )
