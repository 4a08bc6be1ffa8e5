"""From a kernel that Triton has compiled to launches that leave Triton out: its launcher costs more than ours does.

What the binary takes is read from its PTX. Where that is not what would be passed, Triton's launcher stays.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any, final

from torch import Tensor
from triton import knobs

from apt_model.core.system import cuda
from apt_model.core.system.cuda_driver import MAP, Function, KernelLaunch, Parameter, TensorMap, library
from apt_model.ops.fp4.compiled import View

LOG = logging.getLogger(__name__)
# Triton's number of a descriptor's type -> the driver's: float16 and bfloat16.
_ELEMENTS = {6: 6, 10: 9}
# Bytes of shared memory from which Triton launches otherwise: more than a block of Hopper has.
_MOST_SHARED = 227 * 1024
# Places of x for which a launch keeps its map.
_MOST_MAPS = 256
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
    kinds = [kind for kind in kernel.src.signature.values() if kind != "constexpr"]
    codes = [code for i, kind in enumerate(kinds) for code in _codes(kind, kernel.metadata if i == 0 else None)]
    return [*codes, "Q", "Q"]  # scratch memory, of which there is none


def _codes(kind: Any, about: Any) -> list[str]:
    """Of one parameter; the first may be a descriptor, of which `about` has more to say."""
    if about is not None and str(kind).startswith("tensordesc<"):
        rank = len(_descriptor(about)[2])
        return [MAP, *"i" * rank, *"q" * rank]
    return ["Q" if str(kind).startswith("*") else _NUMBERS.get(kind, str(kind))]


def _descriptor(about: Any) -> tuple[int, int, tuple[int, ...], int]:
    """Of a kernel's only descriptor: the driver's type of its elements, their bytes, the box and the swizzling."""
    (meta,) = about.tensordesc_meta
    if meta["fp4_padded"] or meta.get("is_im2col"):
        raise ValueError("its descriptor is padded or im2col")
    return _ELEMENTS[meta["elem_type"]], meta["elem_size"], tuple(meta["block_size"]), meta["swizzle"]


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
        numbers: Sequence[int], view: View | None,
    ) -> None:  # fmt: skip
        self._index = index
        self._map: TensorMap | None = None
        self._maps: dict[int, bytes] = {}
        parameters = [Parameter("Q") for tensor in tensors if tensor is not None]
        if view is not None:
            shape, strides = view
            element, size, box, swizzle = _descriptor(kernel.metadata)
            self._map = TensorMap(element, size, shape, strides, box, swizzle)
            told = [*(Parameter("i", size) for size in shape), *(Parameter("q", step) for step in strides)]
            parameters = [Parameter(MAP), *told, *parameters[1:]]
        kinds = list(kernel.src.signature.values())[len(tensors) :]
        for kind, number in zip(kinds, numbers, strict=False):  # what is left are constants
            if kind != "constexpr":
                parameters.append(Parameter(_codes(kind, None)[0], number))
        parameters += [Parameter("Q", 0), Parameter("Q", 0)]
        self._launch = KernelLaunch(library(), _function(kernel), grid, parameters)

    def __call__(self, tensors: tuple[Tensor | None, ...]) -> bool:
        """Launch on the current stream; False where another device is the current one, or the launch is Triton's."""
        if cuda.current_index() != self._index or hooked():
            return False
        given: list[Any] = []
        for tensor in tensors:
            if tensor is not None:
                if not tensor.is_cuda:  # which Triton asks the driver, and says
                    return False
                given.append(tensor.data_ptr())
        if self._map is not None:
            given[0] = self._maps.get(given[0]) or self._encode(given[0])
            if given[0] is None:
                return False
        result = self._launch(cuda.current_stream(self._index), given)
        if result:  # 201 is a thread without a context, which Triton's launcher gives it
            LOG.info("a launch is left to Triton: the driver's result is %d", result)
        return not result

    def _encode(self, address: int) -> bytes | None:
        assert self._map is not None
        made = self._map.encode(library(), address)
        if made is not None:
            if len(self._maps) >= _MOST_MAPS:
                self._maps.clear()
            self._maps[address] = made
        return made


def hooked() -> bool:
    """Whether someone wants to hear of each launch, which only Triton's launcher tells."""
    runtime = knobs.runtime
    try:
        return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
    except AttributeError:  # something of another kind was put in their place
        return True
