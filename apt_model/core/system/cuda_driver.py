"""NVIDIA's driver, called without torch or Triton between: kernels that are loaded are launched from prepared memory.

Whose context is current, and which stream is meant, the caller knows. A result that is not 0 is the driver's error.
"""

import ctypes
import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, final

# A tensor map, as a parameter's code and in bytes; it lies at a multiple of its size.
MAP = "128s"
_MAP_BYTES = 128
# cuda.h: a CUlaunchConfig, whose stream comes after 32 bytes and whose end is a pointer to attributes and their number.
_CONFIG_HEAD, _CONFIG_TAIL = "7I4x", "QI4x"
# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION and its value, 1.
_EARLY = ctypes.create_string_buffer(struct.pack("I4xi60x", 6, 1))
# CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE.
_PLAIN, _PROMOTED, _ZEROS = 0, 2, 0
# Where the config lies in a launch's memory, so that what is written by each call is one piece: the stream, the rest of
# the config, and from a tensor map's place on the parameters that change.
_CONFIG, _STREAM, _GIVEN = 64, 96, 128


@functools.cache
def library() -> Any:
    """The driver; `OSError` or `AttributeError` where there is none, or one that is older than what is called here."""
    found = ctypes.CDLL("libcuda.so.1")  # lets other threads run during a call
    _ = found.cuLaunchKernelEx, found.cuTensorMapEncodeTiled, found.cuDevicePrimaryCtxRelease_v2
    return found


def enter(driver: Any, device: int) -> bool:
    """Make the device's primary context this thread's own, as a thread that has not called CUDA has none."""
    context = ctypes.c_void_p()
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return False
    entered = driver.cuCtxSetCurrent(context) == 0
    driver.cuDevicePrimaryCtxRelease_v2(device)  # torch keeps it
    return entered


class Function(NamedTuple):
    """A kernel that is loaded, and how a block of it is launched."""

    handle: int
    threads: int
    shared: int  # bytes of dynamic shared memory
    early: bool  # may begin before the launch in front of it has ended


class Parameter(NamedTuple):
    """One of a kernel's parameters, in the order in which it takes them."""

    code: str  # as `struct` writes it: Q is a pointer, i and q are whole numbers, `MAP` is a tensor map
    value: int | None = None  # None: given with every launch


@final
class KernelLaunch:
    """A kernel with its grid and the parameters that stay; called with a stream and those that do not, in their order.

    A call has its memory to itself until the driver, which copies what is in it, returns: threads may call it at once.
    """

    def __init__(
        self, driver: Any, function: Function, grid: tuple[int, int, int], parameters: Sequence[Parameter]
    ) -> None:
        self._launch, self._function = driver.cuLaunchKernelEx, ctypes.c_void_p(function.handle)
        self._tail = struct.pack(_CONFIG_TAIL, ctypes.addressof(_EARLY), function.early)
        given, end, self._places = f"Q{len(self._tail)}s8x", _GIVEN, [0] * len(parameters)
        for i in sorted(range(len(parameters)), key=lambda i: parameters[i].value is not None):
            size = struct.calcsize(parameters[i].code)
            pad = -end % size
            self._places[i] = end + pad
            end += pad + size
            if parameters[i].value is None:
                given += f"{pad}x{parameters[i].code}"
        self._image = bytearray(end + -end % 8)
        struct.pack_into(_CONFIG_HEAD, self._image, _CONFIG, *grid, function.threads, 1, 1, function.shared)
        for place, (code, value) in zip(self._places, parameters, strict=True):
            if value is not None:
                struct.pack_into(code, self._image, place, value)
        self._write = struct.Struct(given).pack_into
        self._spare: list[tuple[Any, int, tuple[Any, ...]]] = []

    def __call__(self, stream: int, given: Sequence[int | bytes]) -> int:
        """Launch in the current context; the driver's result, 0 where it took the launch."""
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = self._memory()
        buffer, start, arguments = memory
        self._write(buffer, start, stream, self._tail, *given)
        result: int = self._launch(*arguments)
        self._spare.append(memory)
        return result

    def _memory(self) -> tuple[Any, int, tuple[Any, ...]]:
        """Memory for one call at a time, where the stream stands in it, and the driver's arguments."""
        table = len(self._image)
        buffer = ctypes.create_string_buffer(_MAP_BYTES + table + 8 * len(self._places))
        first = -ctypes.addressof(buffer) % _MAP_BYTES
        address = ctypes.addressof(buffer) + first
        pointers = struct.pack(f"{len(self._places)}Q", *(address + place for place in self._places))
        ctypes.memmove(address, bytes(self._image) + pointers, table + len(pointers))
        arguments = (ctypes.byref(buffer, first + _CONFIG), self._function, ctypes.byref(buffer, first + table), None)
        return buffer, first + _STREAM, arguments


class TensorMap(NamedTuple):
    """How the device brings boxes of a tensor to shared memory by itself: all of it but where the tensor is."""

    element: int  # a CUtensorMapDataType
    element_bytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements; the last is 1
    box: tuple[int, ...]
    swizzle: int  # a CUtensorMapSwizzle

    def encode(self, driver: Any, address: int) -> bytes | None:
        """The map of the tensor at `address`, or None where the driver makes none."""
        rank, steps = len(self.box), [step * self.element_bytes for step in self.strides[-2::-1]]
        sizes, counts = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
        buffer = ctypes.create_string_buffer(2 * _MAP_BYTES)
        made = ctypes.addressof(buffer) + -ctypes.addressof(buffer) % _MAP_BYTES
        result = driver.cuTensorMapEncodeTiled(
            ctypes.c_void_p(made), self.element, rank, ctypes.c_void_p(address), sizes(*self.shape[::-1]),
            sizes(*steps), counts(*self.box[::-1]), counts(*[1] * rank), _PLAIN, self.swizzle, _PROMOTED, _ZEROS,
        )  # fmt: skip
        return None if result else ctypes.string_at(made, _MAP_BYTES)
