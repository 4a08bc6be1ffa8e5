"""The kernel by which a Triton is tried: the smallest that loads, computes and stores."""

# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
import triton
import triton.language as tl


@triton.jit
def add_one(source, target, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201 - Triton's language has no annotations
    """target[i] = source[i] + 1 for BLOCK numbers."""
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at) + 1)
