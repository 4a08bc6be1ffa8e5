"""4-bit floating-point weights: formats, quantiser, and the linear over them. README.md has the maths."""

from apt_model.ops.fp4.format import FORMATS, MXFP4, NVFP4, PackedWeight, check, get_format
from apt_model.ops.fp4.naive import dequantize
from apt_model.ops.fp4.orders import forget
from apt_model.ops.fp4.quantize import quantize
from apt_model.ops.fp4.select import ACTIVATIONS, explain, linear

__all__ = [
    "ACTIVATIONS", "FORMATS", "MXFP4", "NVFP4", "PackedWeight",
    "check", "dequantize", "explain", "forget", "get_format", "linear", "quantize",
]  # fmt: skip
