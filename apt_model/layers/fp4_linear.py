"""`nn.Linear` with its weight in 4 bits."""

import math

import torch
from torch import Tensor, nn
from typing_extensions import Self

from apt_model.core.errors import InputError
from apt_model.core.options import require
from apt_model.layers.packed import PackedModule, check_dtype, empty, pack, tensors
from apt_model.layers.packed_products import autocasts, dequantize_in_slabs, fused_linear, product_dtype
from apt_model.ops import fp4
from apt_model.ops.fp4 import ACTIVATION_DTYPES, ACTIVATIONS, FORMATS


class FusedFP4Linear(PackedModule, nn.Linear):
    """act(x W^T + b) with W [out, in] in 4-bit floating point: a drop-in for `nn.Linear` whose weight is frozen.

    Gradients flow to the input and the bias. A new layer is drawn as `nn.Linear` is, then quantised. The weight takes
    4.5 bits an element in nvfp4, 4.25 in mxfp4: 28% or 27% of bf16.

    `weight` is a `PackedView`: shape [out, in], the layer's `dtype` and device, values made when something computes
    with them, and an error when something writes, so that code which asks `layer.weight.dtype`, multiplies with it or
    merges into it gets the truth. It is no parameter; `weight_packed`, `weight_scale` and `weight_global_scale` are.

    Args:
        in_features: width K of the input; any number above 0.
        out_features: rows of the weight; with swiglu the rows of gate and up together, and the result is half as wide.
        bias: whether to add one.
        format: nvfp4 (blocks of 16, E4M3 scales, one fp32 scale) or mxfp4 (blocks of 32, E8M0 scales).
        activation: relu, gelu, gelu_tanh, silu or swiglu, in the same kernel; None for none.
        activation_dtype: "fp8" rounds many rows of input, and the weight for them, to E4M3, which GPUs of compute
            capability 8.9 and later multiply at twice the rate: faster, and less exact. Gradients are as without it.
            `explain` says from how many rows on. May be set on a layer at any time.
        device: where the tensors are; on meta nothing is drawn.
        dtype: type that `dequantize` returns and of the bias; None is torch's default type.

    Shapes: x [..., K] of any float type -> [..., out] in the same type.
    """

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    weight_global_scale: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "nvfp4",  # noqa: A002 - the public name
        activation: str | None = None,
        activation_dtype: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make the full weight a parameter
        where = type(self).__name__
        require(format in FORMATS, f"{where}.format", "nvfp4 or mxfp4", format)
        require(activation in ACTIVATIONS, f"{where}.activation", f"one of {ACTIVATIONS}", activation)
        require(activation_dtype in ACTIVATION_DTYPES, f"{where}.activation_dtype", "None or 'fp8'", activation_dtype)
        require(in_features > 0, f"{where}.in_features", "above 0", in_features)
        require(out_features > 0, f"{where}.out_features", "above 0", out_features)
        if activation == "swiglu":
            require(out_features % 2 == 0, f"{where}.out_features", "an even number with swiglu", out_features)
        self.in_features, self.out_features = in_features, out_features
        self.format, self.activation, self.slots, self.orders = format, activation, {}, {}
        self.activation_dtype = activation_dtype
        self.dtype = check_dtype(dtype or torch.get_default_dtype(), where)
        self.add_packed("weight", empty((out_features, in_features), format, device))
        made = nn.Parameter(torch.empty(out_features, device=device, dtype=self.dtype)) if bias else None
        self.register_parameter("bias", made)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        format: str = "nvfp4",  # noqa: A002 - the public name
        activation: str | None = None,
        activation_dtype: str | None = None,
    ) -> Self:
        """The layer of `linear`'s weight, quantised; `linear`'s bias is taken over, not copied."""
        if not isinstance(linear, nn.Linear) or isinstance(linear, PackedModule):
            raise InputError(f"from_linear: expected an nn.Linear, got {type(linear).__name__}")
        layer = cls.from_weight(
            linear.weight, linear.bias, format=format, activation=activation, activation_dtype=activation_dtype
        )
        return layer.train(linear.training)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: nn.Parameter | None = None,
        *,
        format: str = "nvfp4",  # noqa: A002 - the public name
        activation: str | None = None,
        activation_dtype: str | None = None,
    ) -> Self:
        """The layer of a weight [out, in], quantised on the weight's device; `bias` is taken over, not copied."""
        out_features, in_features = weight.shape
        layer = cls(
            in_features, out_features, bias=False, format=format, activation=activation,
            activation_dtype=activation_dtype, device="meta", dtype=weight.dtype,
        )  # fmt: skip
        layer.add_packed("weight", pack(weight.detach(), format))
        layer.register_parameter("bias", bias)
        return layer

    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Linear` does and quantise the weight; on meta there is nothing to draw."""
        device = self.weight_packed.device
        if device.type == "meta":
            return
        weight = torch.empty(self.out_features, self.in_features, device=device, dtype=self.dtype)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        with torch.no_grad():
            for part, drawn in tensors(pack(weight, self.format)).items():
                getattr(self, f"weight_{part}").copy_(drawn)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W [out, in] as a read-only tensor of the layer's type; the packed parameters are what is stored."""
        return self.weight_view("weight")

    @property
    def W_q(self) -> Tensor:  # noqa: N802 - HQQ's name
        """The packed weight, by the name from which PEFT knows to call `dequantize`."""
        return self.packed_weight("weight").packed

    def order_for(self, device: torch.device) -> None:
        """As `PackedModule` says."""
        self._order_for("weight", device, gated=self.activation == "swiglu")

    def dequantize(self) -> Tensor:
        """W [out, in] in the layer's type: a new tensor."""
        return dequantize_in_slabs(self.packed_weight("weight"), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] -> [..., out] (swiglu: [..., out / 2]), same type; under autocast in autocast's."""
        plain, activation = not autocasts(x), self.activation
        weight = self.operand("weight", x.dtype if plain else product_dtype(x), gated=activation == "swiglu")
        held = self._parameters  # in which torch's own look-up takes as long to find something as a launch
        bias = held["bias"] if "bias" in held else self.bias  # noqa: SIM401
        return (fp4.linear if plain else fused_linear)(x, weight, bias, activation, self.activation_dtype)

    def explain(self, rows: int, dtype: torch.dtype | None = None) -> str:
        """One line: what computes `rows` rows of input in `dtype` (None is the layer's) where the layer is, and why."""
        require(rows > 0, "explain.rows", "above 0", rows)
        dtype = dtype or self.dtype
        weight = self.operand("weight", dtype, gated=self.activation == "swiglu")
        return fp4.explain(rows, weight, dtype, self.activation, self.activation_dtype)

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        bits = FORMATS[self.format].bits
        shown = f"{super().extra_repr()}, format={self.format!r}, bits={bits:g}, activation={self.activation!r}"
        return shown if self.activation_dtype is None else f"{shown}, activation_dtype={self.activation_dtype!r}"
