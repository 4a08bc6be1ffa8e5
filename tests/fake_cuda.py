"""Stands in for NVIDIA's driver: ctypes callbacks that keep what each launch says, and maps that say what of."""

import ctypes
import struct
from typing import Any, NamedTuple

# A map's fields, in the bytes of a map: so that two are the same where all that was said of them is.
_MAP = "=IIQ3Q2Q3I3I4I"
_CONFIG = "7I4xQQI4x"


class Seen(NamedTuple):
    """A launch: its config, and its parameters as bytes."""

    function: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    attributes: tuple[tuple[int, int], ...]
    parameters: tuple[bytes, ...]


class FakeCuda:
    """Has the functions that the package calls; `sizes` are those of the parameters, by the kernel's handle."""

    def __init__(self, sizes: dict[int, list[int]] | None = None) -> None:
        self.sizes, self.seen, self.encoded = sizes or {}, [], 0
        self.result = self.map_result = 0
        self.entered, self.cured = [], False  # devices whose context was made current, and whether that helps
        pointer, number = ctypes.c_void_p, ctypes.c_uint
        self.cuLaunchKernelEx = ctypes.CFUNCTYPE(ctypes.c_int, *[pointer] * 4)(self._launch)
        self.cuTensorMapEncodeTiled = ctypes.CFUNCTYPE(
            ctypes.c_int, pointer, number, number, pointer, *[pointer] * 4, *[number] * 4
        )(self._encode)
        self.cuDevicePrimaryCtxRetain = ctypes.CFUNCTYPE(ctypes.c_int, pointer, ctypes.c_int)(lambda *_: 0)
        self.cuDevicePrimaryCtxRelease_v2 = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(self._release)
        self.cuCtxSetCurrent = ctypes.CFUNCTYPE(ctypes.c_int, pointer)(self._enter)

    def _enter(self, _: int | None) -> int:
        if self.cured:
            self.result = self.map_result = 0
        return 0

    def _release(self, device: int) -> int:
        self.entered.append(device)
        return 0

    def _launch(self, config: int, function: int, table: int, extra: int | None) -> int:
        if self.result:
            return self.result
        *whole, stream, attributes, count = struct.unpack(_CONFIG, ctypes.string_at(config, 56))
        found = tuple(struct.unpack("I4xi60x", ctypes.string_at(attributes + 72 * i, 72)) for i in range(count))
        sizes = self.sizes[function]
        places = struct.unpack(f"{len(sizes)}Q", ctypes.string_at(table, 8 * len(sizes)))
        assert extra is None
        assert all(place % min(size, 64) == 0 for place, size in zip(places, sizes, strict=True)), "alignment"
        parameters = tuple(ctypes.string_at(place, size) for place, size in zip(places, sizes, strict=True))
        self.seen.append(Seen(function, tuple(whole[:3]), tuple(whole[3:6]), whole[6], stream, found, parameters))
        return 0

    def _encode(self, made: int, element: int, rank: int, address: int, *rest: Any) -> int:
        sizes, strides, box, steps, *flags = rest
        if self.map_result:
            return self.map_result
        assert made % 64 == 0
        self.encoded += 1
        wide = [struct.unpack(f"{rank}Q", ctypes.string_at(sizes, 8 * rank))]
        wide.append(struct.unpack(f"{rank - 1}Q", ctypes.string_at(strides, 8 * rank - 8)))
        narrow = [struct.unpack(f"{rank}I", ctypes.string_at(each, 4 * rank)) for each in (box, steps)]
        ctypes.memmove(made, map_of(element, address, *wide, *narrow, flags), 128)
        return 0


def map_of(  # noqa: PLR0917 - as the driver has them
    element: int, address: int, sizes: Any, strides: Any, box: Any, steps: Any, flags: Any
) -> bytes:
    """A map that says of what it is; innermost dimension first, as the driver has them."""
    rank = len(sizes)
    return struct.pack(
        _MAP, element, rank, address, *_padded(sizes, 3), *_padded(strides, 2), *_padded(box, 3), *_padded(steps, 3),
        *flags,
    ).ljust(128, b"\0")  # fmt: skip


def triton_map(  # noqa: PLR0917 - as Triton has them
    address: int, swizzle: int, size: int, element: int, box: Any, shape: Any, strides: Any, nan: int
) -> bytes:
    """What Triton's `fill_tma_descriptor` asks of the driver (driver.c of 3.6 and 3.9)."""
    assert nan == 0
    return map_of(
        element, address, shape[::-1], [size * each for each in strides[:-1]][::-1], box[::-1], [1] * len(box),
        (0, swizzle, 2, 0),
    )  # fmt: skip


def _padded(values: Any, count: int) -> list[int]:
    return [*values, *[0] * (count - len(values))]
