"""What Gluon's functions are called: they were renamed between Triton 3.6 and 3.9."""

# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def reinterpret(
        memory, TYPE: gl.constexpr, A: gl.constexpr, B: gl.constexpr, C: gl.constexpr, layout: gl.constexpr
    ):
        """The same shared memory as [A, B, C] of TYPE in another layout."""
        return memory.reinterpret(TYPE, [A, B, C], layout)

else:

    @gluon.jit
    def reinterpret(
        memory, TYPE: gl.constexpr, A: gl.constexpr, B: gl.constexpr, C: gl.constexpr, layout: gl.constexpr
    ):
        """The same shared memory as [A, B, C] of TYPE in another layout."""
        return memory._reinterpret(TYPE, [A, B, C], layout)  # noqa: SLF001 - its name there
