"""From a kernel that Triton has compiled to launches that leave Triton out: its launcher costs more than ours does.

What the binary takes is read from its PTX. Where that is not what would be passed, Triton's launcher stays.
"""

import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, final

from torch import Tensor
from triton import knobs

from apt_model.core.system import cuda
from apt_model.core.system.cuda_driver import MAP, Function, KernelLaunch, Parameter, TensorMap, enter, library
from apt_model.ops.fp4.compiled import View, known

LOG = logging.getLogger(__name__)
# Triton's number of a descriptor's type -> the driver's: int32, float16 and bfloat16.
_ELEMENTS = {3: 3, 6: 6, 10: 9}
# Bytes of shared memory from which Triton launches otherwise: more than a block of Hopper has.
_MOST_SHARED = 227 * 1024
# CUDA_ERROR_INVALID_CONTEXT; and for a map that is not made.
_NO_CONTEXT = 201
# Places of a tensor for which a launch keeps its map.
_MOST_MAPS = 1024
_ENTRY = re.compile(r"\.visible\s+\.entry\s+[\w$]+\s*\(([^)]*)\)")
_PARAMETER = re.compile(
    r"\.param(?:\s+\.align\s+(?P<align>\d+))?\s+\.(?P<type>\w+)(?P<pointer>\s+\.ptr(?:\s+\.\w+)*(?:\s+\.align\s+\d+)?)?"
    r"\s+[\w$]+(?:\[(?P<count>\d+)\])?"
)
# In Triton's signatures, and in PTX.
_NUMBERS = {"i32": "i", "i64": "q"}
_PTX_NUMBERS = {f"{kind}{bits}": code for bits, code in ((32, "i"), (64, "q")) for kind in "bsu"}


def fault(kernel: Any) -> str | None:
    """Why launches of a compiled kernel have to be Triton's, or None where they can be direct."""
    try:
        return _fault(kernel, kernel.metadata)
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        return f"this Triton describes a kernel in another way: {type(problem).__name__}: {problem}"


def _fault(kernel: Any, about: Any) -> str | None:
    if about.target.backend != "cuda":
        return f"there is no direct launch for {about.target.backend}"
    scratch = about.global_scratch_size + about.profile_scratch_size
    if about.num_ctas != 1 or about.launch_cooperative_grid or scratch or about.shared > _MOST_SHARED:
        return "it needs a cluster, a cooperative launch, scratch memory or more shared memory than others"
    try:
        library()
    except (OSError, AttributeError) as problem:
        return f"the driver cannot be called: {problem}"
    _function(kernel)
    expected, found = _expected(kernel), _found(kernel.asm["ptx"])
    return None if expected == found else f"its binary takes {found}, and {expected} would be passed"


def _function(kernel: Any) -> Function:
    about = kernel.metadata
    return Function(int(kernel.function), 32 * about.num_warps, about.shared, bool(about.launch_pdl))


def _expected(kernel: Any) -> list[str]:
    """What would be passed, a code each; what cannot be passed stands by its name."""
    about = _descriptors(kernel)
    kinds = [kind for kind in kernel.src.signature.values() if kind != "constexpr"]
    codes = [code for i, kind in enumerate(kinds) for code in _codes(kind, about[i : i + 1])]
    return [*codes, "Q", "Q"]  # scratch memory, of which there is none


def _codes(kind: Any, about: list["_Descriptor"]) -> list[str]:
    """Of one parameter, which is a descriptor if `about` says something of one."""
    if about and str(kind).startswith("tensordesc<"):
        rank = len(about[0].box)
        return [MAP, *"i" * rank, *"q" * rank]
    return ["Q" if str(kind).startswith("*") else _NUMBERS.get(kind, str(kind))]


class _Descriptor(NamedTuple):
    element: int  # the driver's type
    size: int  # in bytes
    box: tuple[int, ...]
    swizzle: int


def _descriptors(kernel: Any) -> list[_Descriptor]:
    """Of a kernel's first parameters."""
    found = []
    for meta in getattr(kernel.metadata, "tensordesc_meta", None) or ():
        if meta["fp4_padded"] or meta.get("is_im2col"):
            raise ValueError("its descriptor is padded or im2col")
        element, box = _ELEMENTS[meta["elem_type"]], tuple(meta["block_size"])
        found.append(_Descriptor(element, meta["elem_size"], box, meta["swizzle"]))
    return found


def _found(ptx: str) -> list[str]:
    """What the entry in a PTX text takes, a code each; what is none of ours stands as it is there."""
    entries = _ENTRY.findall(ptx)
    return [_code(" ".join(text.split())) for text in entries[0].split(",")] if len(entries) == 1 else []


def _code(text: str) -> str:
    match = _PARAMETER.fullmatch(text)
    if match is None:
        return text
    align, kind, pointer, count = match["align"], match["type"], match["pointer"], match["count"]
    if (kind, count, pointer) == ("b8", "128", None) and int(align or 1) <= int(count):
        return MAP
    if align is not None or count is not None:
        return text
    if pointer is not None:
        return "Q" if _PTX_NUMBERS.get(kind) == "q" else text
    return _PTX_NUMBERS.get(kind, text)


@final
class Direct:
    """A launch of a compiled kernel with its grid and numbers; called with its tensors, which come before those."""

    def __init__(  # noqa: PLR0917 - as a launch has them
        self, kernel: Any, index: int, tensors: Sequence[Tensor | None], grid: tuple[int, int, int],
        numbers: Sequence[int], views: Sequence[View],
    ) -> None:  # fmt: skip
        self._index = index
        self._maps: list[_Maps] = []
        parameters = []
        for (shape, strides), (element, size, box, swizzle) in zip(views, _descriptors(kernel), strict=True):
            form = TensorMap(element, size, shape, strides, box, swizzle)
            self._maps.append(known(("maps", form), partial(_Maps, form)))
            told = [*(Parameter("i", size) for size in shape), *(Parameter("q", step) for step in strides)]
            parameters += [Parameter(MAP), *told]
        parameters += [Parameter("Q") for tensor in tensors[len(views) :] if tensor is not None]
        kinds = list(kernel.src.signature.values())[len(tensors) :]
        for kind, number in zip(kinds, numbers, strict=False):  # what is left are constants
            if kind != "constexpr":
                parameters.append(Parameter(_codes(kind, [])[0], number))
        parameters += [Parameter("Q", 0), Parameter("Q", 0)]
        self._launch = KernelLaunch(library(), _function(kernel), grid, parameters)

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> bool:
        """Launch on the current stream; False where another device is the current one, or the launch is Triton's."""
        if cuda.current_index() != self._index or hooked():
            return False
        addresses = []
        for tensor in tensors:
            if tensor is not None:
                if not tensor.is_cuda:  # which Triton asks the driver, and says
                    return False
                addresses.append(tensor.data_ptr())
        result = self._at(addresses)
        if result == _NO_CONTEXT and enter(library(), self._index):
            result = self._at(addresses)
        if result:
            LOG.info("a launch is left to Triton: the driver's result is %d", result)
        return not result

    def _at(self, addresses: list[int]) -> int:
        """Launch with tensors that are there; the driver's result."""
        given: list[Any] = [*addresses]
        for i, maps in enumerate(self._maps):
            made = maps.found.get(addresses[i]) or maps.make(addresses[i])
            if made is None:
                return _NO_CONTEXT
            given[i] = made
        return self._launch(cuda.current_stream(self._index), given)


class _Maps:
    """The maps of a tensor, by where it is."""

    __slots__ = ("form", "found")

    def __init__(self, form: TensorMap) -> None:
        self.form, self.found = form, dict[int, bytes]()

    def make(self, address: int) -> bytes | None:
        """The map of a tensor that is at `address` for the first time; None where the driver makes none."""
        made = self.form.encode(library(), address)
        if made is not None:
            if len(self.found) >= _MOST_MAPS:
                self.found.clear()
            self.found[address] = made
        return made


def hooked() -> bool:
    """Whether someone wants to hear of each launch, which only Triton's launcher tells."""
    runtime = knobs.runtime
    try:
        return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
    except AttributeError:  # something of another kind was put in their place
        return True
