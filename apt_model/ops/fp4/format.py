"""The two 4-bit formats, how their tensors look, and how codes and scales are read. README.md has the maths.

# Shape suffix legend
#   N = output features, K = input features, G = blocks of a row, P = bytes of a row; leading dimensions are experts
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from apt_model.core.errors import InputError
from apt_model.core.fp4_storage import ROW_MULTIPLE, row_bytes

FormatName = Literal["nvfp4", "mxfp4"]

# E2M1: what codes 0 .. 7 stand for; codes 8 .. 15 are their negatives.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST_CODE = MAGNITUDES[-1]
# Largest finite E4M3 value.
LARGEST_SCALE = 448.0
_E8M0_NAN = 255
# 2^-127, the smallest E8M0 value, is below fp32's normal numbers.
_SMALLEST_E8M0_BITS = 0x00400000


@dataclass(frozen=True)
class Format:
    """How many weights of a row share a scale, and what the scale is made of."""

    name: FormatName
    block: int
    scale_dtype: torch.dtype
    has_global_scale: bool
    bits: float  # a weight, scales included


NVFP4 = Format("nvfp4", 16, torch.float8_e4m3fn, has_global_scale=True, bits=4.5)
MXFP4 = Format("mxfp4", 32, torch.uint8, has_global_scale=False, bits=4.25)
FORMATS: dict[str, Format] = {each.name: each for each in (NVFP4, MXFP4)}


class PackedWeight(NamedTuple):
    """A weight [..., N, K] in canonical storage, the one that files hold.

    Two codes a byte, that of the even input in the low half. A weight's value is code * scale / global_scale.
    """

    packed: Tensor  # uint8 [..., N, ceil(K / 16) * 8]
    scale: Tensor  # float8_e4m3fn [..., N, ceil(K / 16)], or uint8 (E8M0: 2^(byte - 127)) [..., N, ceil(K / 32)]
    global_scale: Tensor | None  # float32 [..., 1] in nvfp4: a divisor, as compressed-tensors has it
    in_features: int

    @property
    def format(self) -> Format:
        """Read from the type of the scales."""
        return NVFP4 if self.scale.dtype == NVFP4.scale_dtype else MXFP4

    @property
    def shape(self) -> torch.Size:
        """[..., N, K]: the shape of the weight that this stands for."""
        return torch.Size((*self.packed.shape[:-1], self.in_features))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.packed.device

    def picked(self, index: int | Tensor) -> "PackedWeight":
        """Weight `index` of a stack [E, N, K], or a stack of several; nothing is unpacked."""
        scale = self.scale.view(torch.uint8)[index]  # not every device indexes float8
        divisor = None if self.global_scale is None else self.global_scale[index]
        return PackedWeight(self.packed[index], scale.view(self.scale.dtype), divisor, self.in_features)


def get_format(name: str) -> Format:
    """Look a format up; `InputError` names the two there are."""
    if name not in FORMATS:
        raise InputError(f"format: expected nvfp4 or mxfp4, got {name!r}")
    return FORMATS[name]


def row_blocks(in_features: int, form: Format) -> int:
    """G, the scales of a row."""
    return -(-in_features // form.block)


def check(weight: PackedWeight, name: str = "weight") -> PackedWeight:
    """Return `weight` where its tensors fit together; else raise `InputError` with what was expected and what came."""
    form, shape = weight.format, tuple(weight.packed.shape[:-1])
    if not shape:
        raise InputError(f"{name}_packed: expected [..., N, P], got {list(weight.packed.shape)}")
    expected: list[tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]] = [
        ("packed", weight.packed, torch.uint8, (*shape, row_bytes(weight.in_features))),
        ("scale", weight.scale, form.scale_dtype, (*shape, row_blocks(weight.in_features, form))),
    ]
    if form.has_global_scale:
        expected.append(("global_scale", weight.global_scale, torch.float32, (*shape[:-1], 1)))
    elif weight.global_scale is not None:
        raise InputError(f"{name}_global_scale: mxfp4 has none")
    for part, tensor, dtype, size in expected:
        if tensor is None:
            raise InputError(f"{name}_{part}: {form.name} needs it")
        if tensor.dtype != dtype or tuple(tensor.shape) != size:
            raise InputError(
                f"{name}_{part}: expected {dtype} {list(size)} for {weight.in_features} inputs in {form.name}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    return weight


def pack(codes: Tensor) -> Tensor:
    """uint8 codes 0 .. 15 [..., K] -> bytes [..., P]; the rest of the last bytes holds zero codes."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % ROW_MULTIPLE))
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """Bytes [..., P] -> uint8 codes [..., K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :in_features]


def code_values(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What each code stands for; by arithmetic, as a table would have to be brought to the device."""
    high, low = ((codes >> 1) & 3).to(torch.int32), (codes & 1).to(torch.int32)
    twice = torch.where(high == 0, low, (2 + low) << (high - 1).clamp_min(0)).to(dtype)
    return torch.where(codes >= 8, -0.5, 0.5).to(dtype) * twice


def scale_values(scale: Tensor) -> Tensor:
    """What each scale stands for, in fp32; E8M0's byte 255 is NaN."""
    if scale.dtype != torch.uint8:
        return scale.to(torch.float32)
    exponent = scale.to(torch.int32)
    bits = torch.where(exponent == 0, _SMALLEST_E8M0_BITS, exponent << 23)
    return torch.where(exponent == _E8M0_NAN, torch.nan, bits.view(torch.float32))


def spread(scales: Tensor, form: Format, in_features: int) -> Tensor:
    """One value a block [..., G] -> one a weight [..., K]."""
    # Not repeat_interleave: inductor for CPUs leaves the end of a row whose last block is in part unwritten.
    return scales[..., torch.arange(in_features, device=scales.device) // form.block]
