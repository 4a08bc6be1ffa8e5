"""Measure which launches of the FP4 kernels are best on this machine for a model's layers."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from apt_model.core.errors import InputError
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.layers.packed_products import product_dtype
from apt_model.ops.fp4 import Shuffled, measured
from apt_model.ops.fp4.measured import Measured

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TunedShape:
    """What was measured for the layers of one shape, format and type; as a text, one line for each number of rows."""

    out_features: int
    in_features: int
    format: str
    dtype: torch.dtype
    launches: tuple[Measured, ...]
    """One for each bucket of rows: the fastest, and what would have been taken."""

    def __str__(self) -> str:
        where = f"{self.out_features} x {self.in_features} in {self.format}, {str(self.dtype).partition('.')[2]}"
        return "\n".join(f"{where}, up to {_line(each)}" for each in self.launches)


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """What `tune` found; as a text, one line a launch."""

    shapes: tuple[TunedShape, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.shapes))


def tune(model: nn.Module, rows: Sequence[int] = (1, 16, 64, 256)) -> TuneReport:
    """Time launches of the FP4 kernels for each shape, format and type of a model's `FusedFP4Linear` layers.

    The fastest are taken from then on, in this process and, from a file in the user's cache folder
    (`docs/environment.md`), in later ones with the same GPU and Triton. Takes minutes for a new shape, most of them to
    compile. Progress goes to the log. Call it as the model runs: on its GPU, under the same autocast.

    Args:
        model: with its layers on a GPU.
        rows: numbers of rows of input (batch times positions) to measure, each for all up to the next bucket's end:
            8, 16, 32, 64, 128, 256, 1024, 6144.

    Raises:
        ConfigError: a number of rows is not from 1 to 6144, above which there is nothing to choose.
        InputError: the model has no such layer, or none where a fused kernel takes its weight.
    """
    measured.check_rows(rows, "tune")
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, FusedFP4Linear)]
    if not layers:
        raise InputError(
            f"tune: expected a model with FusedFP4Linear layers, got {type(model).__name__} without one",
            remedy="quantise it first: apt_model.optimization.quantize(model)",
        )
    shapes: dict[tuple[object, ...], TunedShape] = {}
    for name, layer in layers:
        device = next(layer.parameters()).device  # of the bytes, which reading by name would bring back to files' order
        dtype = product_dtype(torch.empty(0, dtype=layer.dtype, device=device))
        key = (layer.out_features, layer.in_features, layer.format, dtype, device)
        if key in shapes:
            continue
        weight = layer.operand("weight", dtype, gated=layer.activation == "swiglu")
        if not isinstance(weight, Shuffled):
            LOG.info("tune: %s is left out: no fused kernel takes its weight for %s on %s", name or "it", dtype, device)
            continue
        LOG.info("tune: %d x %d in %s for %s, as in %s", *key[:4], name or "the model")
        shapes[key] = TunedShape(
            out_features=layer.out_features, in_features=layer.in_features, format=layer.format, dtype=dtype,
            launches=tuple(measured.measure(weight, rows)),
        )  # fmt: skip
    if not shapes:
        raise InputError(
            f"tune: expected layers that a fused kernel serves, got {len(layers)} that none does, the last for {dtype} "
            f"on {device}",
            remedy="move the model to an NVIDIA GPU from Ampere on, in bf16, with Triton installed: "
            "model.to('cuda', torch.bfloat16); elsewhere there is nothing to tune",
        )
    return TuneReport(shapes=tuple(shapes.values()))


def _line(each: Measured) -> str:
    was = "which fails here" if each.before_microseconds is None else f"{each.before_microseconds:.1f} us"
    now = f"{each.rows} rows: {each.setting or 'slabs'}, {each.microseconds:.1f} us"
    return f"{now} (as before)" if each.setting == each.before else f"{now} (before: {each.before or 'slabs'}, {was})"
