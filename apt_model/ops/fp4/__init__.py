"""4-bit floating-point weights: formats, quantiser, and the linear over them. README.md has the maths."""

from apt_model.ops.fp4.format import FORMATS, MXFP4, NVFP4, PackedWeight, check, get_format
from apt_model.ops.fp4.fp8 import ACTIVATION_DTYPES, FP8_ROWS
from apt_model.ops.fp4.layout import Shuffled, shuffle_if_reversible, unshuffle
from apt_model.ops.fp4.naive import dequantize
from apt_model.ops.fp4.quantize import quantize
from apt_model.ops.fp4.select import ACTIVATIONS, explain, linear, wants_order
from apt_model.ops.fp4.slab import Operand, unpack, unpacks

__all__ = [
    "ACTIVATIONS", "ACTIVATION_DTYPES", "FORMATS", "FP8_ROWS", "MXFP4", "NVFP4", "Operand", "PackedWeight", "Shuffled",
    "check", "dequantize", "explain", "get_format", "linear", "quantize", "shuffle_if_reversible", "unpack", "unpacks",
    "unshuffle", "wants_order",
]  # fmt: skip
