"""One weight as each arm of `linear.py` holds it: in copies that no cache can serve, beside what should come out.

Every peer's import is inside its function, so that one that is absent or broken costs its own rows only.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.ops import fp4
from apt_model.ops.fp4 import naive

# What the copies hold together at least: several times any second-level cache.
ROTATED_BYTES = 400e6


@dataclasses.dataclass(frozen=True)
class Operand:
    """A weight [N, K], ready to be multiplied with."""

    calls: list[Callable[[Tensor], Tensor]]  # x [M, K] -> [M, N], each with a copy of its own
    product: Callable[[Tensor], Tensor]  # the same in fp32 from this arm's own values
    nbytes: int  # of one copy
    weight_error: float  # relative squared error of this arm's values


Builder = Callable[..., Operand]


def copies_of(nbytes: int, limit: int | None) -> int:
    return limit or max(2, math.ceil(ROTATED_BYTES / nbytes))


def relative_square(values: Tensor, weight: Tensor) -> float:
    exact = weight.float()
    return float((values.float() - exact).square().sum() / exact.square().sum())


def by_matrix(calls: list[Callable[[Tensor], Tensor]], values: Tensor, weight: Tensor, nbytes: int) -> Operand:
    values = values.float()
    return Operand(calls, lambda x: x.float() @ values.mT, nbytes, relative_square(values, weight))


def dense(weight: Tensor, limit: int | None = None) -> Operand:
    calls = [partial(_linear, weight=each) for each in dense_copies(weight, limit)]
    return by_matrix(calls, weight, weight, weight.nbytes)


def dense_copies(weight: Tensor, limit: int | None = None) -> list[Tensor]:
    return [weight.clone() for _ in range(copies_of(weight.nbytes, limit))]


def dense_layer(weight: Tensor, limit: int | None = None) -> Operand:
    calls = [_dense_layer(weight) for _ in range(copies_of(weight.nbytes, limit))]
    return by_matrix(calls, weight, weight, weight.nbytes)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _dense_layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def packed_of(weight: Tensor, form: str) -> tuple[fp4.PackedWeight, int, float]:
    packed = fp4.quantize(weight, form)
    nbytes = packed.packed.nbytes + packed.scale.nbytes
    return packed, nbytes, relative_square(naive.dequantize(packed, torch.float32), weight)


def _clone(order: fp4.Shuffled) -> fp4.Shuffled:
    return fp4.Shuffled(*(part.clone() if isinstance(part, Tensor) else part for part in order))


def ours(weight: Tensor, limit: int | None = None, *, form: str) -> Operand:
    packed, nbytes, error = packed_of(weight, form)
    calls = [partial(fp4.linear, weight=each) for each in orders_of(packed, weight.dtype, limit)]
    return Operand(calls, lambda x: naive.linear(x.float(), packed), nbytes, error)


def orders_of(
    packed: fp4.PackedWeight, dtype: torch.dtype, limit: int | None = None, *, gated: bool = False
) -> list[fp4.Shuffled]:
    """Copies in the kernels' order, as a layer holds it on a GPU."""
    order = fp4.shuffle_if_reversible(packed, dtype, gated=gated)
    return [_clone(order) for _ in range(copies_of(packed.packed.nbytes + packed.scale.nbytes, limit))]


def our_layer(weight: Tensor, limit: int | None = None) -> Operand:
    from apt_model.optimization import FusedFP4Linear

    packed, nbytes, error = packed_of(weight, "nvfp4")
    layers = [FusedFP4Linear.from_linear(_dense_layer(weight)) for _ in range(copies_of(nbytes, limit))]
    return Operand(layers, lambda x: naive.linear(x.float(), packed), nbytes, error)


def bitsandbytes(weight: Tensor, limit: int | None = None, *, kind: str) -> Operand:
    layers, values, nbytes = bitsandbytes_layers(weight, limit, kind=kind)
    return by_matrix(layers, values, weight, nbytes)


def bitsandbytes_layers(weight: Tensor, limit: int | None = None, *, kind: str) -> tuple[list[nn.Module], Tensor, int]:
    """Blocks of 64, scales in fp32: without the second quantisation, which only makes it slower."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        *reversed(weight.shape), bias=False, compute_dtype=weight.dtype, quant_type=kind, compress_statistics=False, device="meta"
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=kind, compress_statistics=False, module=layer
    )
    layer = layer.to(weight.device)
    state = layer.weight.quant_state
    values = bnb.functional.dequantize_4bit(layer.weight.data, state).view(weight.shape)
    nbytes = layer.weight.data.nbytes + state.absmax.nbytes
    copies = [layer] + [copy.deepcopy(layer) for _ in range(copies_of(nbytes, limit) - 1)]
    return copies, values, nbytes


def torchao_int4(weight: Tensor, limit: int | None = None) -> Operand:
    """Groups of 128 in the layout of torch's own tinygemm kernel: the one that runs on Hopper without further packages."""
    from torchao.quantization import Int4WeightOnlyConfig

    config = Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    layer = _torchao(weight, config)
    nbytes = layer.weight.qdata.nbytes + layer.weight.scale_and_zero.nbytes
    # It has no function that dequantises; a product with the unit matrix is exact.
    values = F.linear(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), layer.weight).mT
    return _torchao_operand(layer, values, weight, nbytes, limit)


def torchao_nvfp4(weight: Tensor, limit: int | None = None) -> Operand:
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig

    layer = _torchao(weight, NVFP4WeightOnlyConfig())
    nbytes = layer.weight.qdata.nbytes + layer.weight.scale.nbytes
    return _torchao_operand(layer, layer.weight.dequantize(weight.dtype), weight, nbytes, limit)


def _torchao(weight: Tensor, config: object) -> nn.Linear:
    from torchao.quantization import quantize_

    layer = _dense_layer(weight)
    quantize_(layer, config)
    if type(layer.weight.data) is Tensor:
        raise RuntimeError("torchao left the weight as it was")
    return layer


def _torchao_operand(layer: nn.Linear, values: Tensor, weight: Tensor, nbytes: int, limit: int | None) -> Operand:
    copies = [layer.weight.detach().clone() for _ in range(copies_of(nbytes, limit))]
    return by_matrix([partial(_linear, weight=each) for each in copies], values, weight, nbytes)


def gemlite(weight: Tensor, limit: int | None = None) -> Operand:
    """MXFP4 with the codes and scales of our quantiser. Kernels are chosen by its own "fast" tuning."""
    from gemlite.helper import A16W4_MXFP

    packed, nbytes, error = packed_of(weight, "mxfp4")
    _tune_briefly()
    processor = A16W4_MXFP(device=weight.device, dtype=weight.dtype)
    layers = [
        processor.from_packed_weights(packed.packed.clone(), packed.scale.view(torch.float8_e8m0fnu).clone())
        for _ in range(copies_of(nbytes, limit))
    ]
    return Operand(layers, lambda x: naive.linear(x.float(), packed), nbytes, error)


def _tune_briefly(*, compile_only: bool = False) -> None:
    """Its tuner takes 125 ms a candidate; 25 ms tell candidates apart too."""
    import triton
    from gemlite.triton_kernels import gemm_kernels, gemm_splitK_kernels

    def once(call, quantiles):
        call()
        return [1.0] * len(quantiles)

    bench = once if compile_only else partial(triton.testing.do_bench, warmup=5, rep=20)
    for kernel in (gemm_kernels.gemm_MX_kernel, gemm_splitK_kernels.gemm_splitK_MX_kernel):
        kernel._do_bench = bench


def values_of(layer: nn.Module) -> Tensor:
    """The weight [N, K] that a linear layer of ours, of bitsandbytes or of torch stands for."""
    if hasattr(layer, "dequantize"):
        return layer.dequantize()
    if type(layer).__name__ == "Linear4bit":
        import bitsandbytes as bnb

        state = layer.weight.quant_state
        return bnb.functional.dequantize_4bit(layer.weight.data, state).view(layer.out_features, layer.in_features)
    return layer.weight


def why_of(error: BaseException) -> str:
    """What a row says of a failure: the error, and the one that it began with (a failed capture hides its cause)."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    found = [f"{type(each).__name__}: {' '.join(str(each).split())[:300]}" for each in (error, first)]
    return found[0] if first is error else f"{found[0]} (first: {found[1]})"


BASE = "bf16"
OURS = ("ours nvfp4", "ours mxfp4")
ARMS: dict[str, Builder] = {
    BASE: dense,
    OURS[0]: partial(ours, form="nvfp4"),
    OURS[1]: partial(ours, form="mxfp4"),
    "bitsandbytes fp4": partial(bitsandbytes, kind="fp4"),
    "bitsandbytes nf4": partial(bitsandbytes, kind="nf4"),
    "torchao int4": torchao_int4,
    "torchao nvfp4": torchao_nvfp4,
    "gemlite mxfp4": gemlite,
}
# Only what a call costs the host differs from the functions above.
LAYERS: dict[str, Builder] = {"nn.Linear": dense_layer, "FusedFP4Linear": our_layer}

# Speed over bf16 at M, (N, K) -> {M: ratio}: not measured beside the others but quoted from an earlier run of another
# program on an NVIDIA H200 (fp16, groups of 128).
MARLIN = {
    (28672, 8192): {1: 2.48, 4: 2.44, 16: 2.34, 64: 1.43, 256: 0.59, 4096: 0.53},
    (8192, 8192): {1: 2.17, 4: 2.17, 16: 2.12, 64: 1.12, 256: 0.55, 4096: 0.50},
    (14336, 4096): {1: 2.02, 4: 2.00, 16: 2.00, 64: 1.17, 256: 0.52, 4096: 0.45},
    (4096, 4096): {1: 1.22, 4: 1.27, 16: 1.25, 64: 0.52, 256: 0.62, 4096: 0.45},
}
