"""Compile every kernel for one target, with no GPU: `python tests/numerics/compile_kernels.py cuda:90`.

Prints a line a variant: name, constants, registers, bytes of spills and of shared memory, as far as the target says.
"""

import itertools
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from apt_model.ops.fp4.fused_quantize import tile
from apt_model.ops.fp4.kernel_quantize import quantize_kernel
from apt_model.ops.left_spin import kernel as left_spin

WIDTHS = (768, 4096)


def left_spin_variants():
    for block, (design, scale, before) in itertools.product(
        (1024, 8192), [(True, False, True), (True, False, False), (False, True, False), (False, False, False)]
    ):
        signature = {
            "u_ptr": "*bf16", "delta_ptr": "*bf16", "scale_ptr": "*fp32", "before_ptr": "*bf16",
            "phi_before_ptr": "*fp32", "out_ptr": "*bf16", "gate_ptr": "*fp32", "phi_ptr": "*fp32", "width": "i32",
            **dict.fromkeys(("alpha", "tau", "beta", "w1", "w2", "eps"), "fp32"),
        }  # fmt: skip
        constants = {"DESIGN": design, "HAS_SCALE": scale, "HAS_BEFORE": before, "HAS_PHI": before, "BLOCK": block}
        yield left_spin.step_kernel, signature, constants, {}
    for scale in (True, False):
        signature = {
            "upstream_ptr": "*fp32", "delta_ptr": "*bf16", "scale_ptr": "*fp32", "gate_ptr": "*fp32",
            "grad_delta_ptr": "*bf16", "grad_scale_ptr": "*fp32", "rows": "i32", "width": "i32",
        }  # fmt: skip
        yield left_spin.gradient_kernel, signature, {"HAS_SCALE": scale, "BLOCK": 1024}, {}


def fp4_quantize_variants():
    for (weight, width, cost), nvfp4 in itertools.product([("bf16", 4096, False), ("fp32", 40, True)], [True, False]):
        signature = {
            "weight_ptr": f"*{weight}", "global_ptr": "*fp32", "cost_ptr": "*fp32", "packed_ptr": "*u8",
            "scale_ptr": "*u8", **dict.fromkeys(("rows", "width", "row_bytes", "row_blocks"), "i32"),
            "row_stride": "i64", "column_stride": "i32",
        }  # fmt: skip
        window = {"FIRST": -2, "LAST": 6} if nvfp4 else {"FIRST": -1, "LAST": 0}
        constants = {**window, "NVFP4": nvfp4, "HAS_COST": cost, **tile(width)}
        yield quantize_kernel, signature, constants, {"num_warps": 4, "enable_fp_fusion": False}


def main(name: str) -> None:
    backend, _, arch = name.partition(":")
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    for kernel, signature, constants, options in (*left_spin_variants(), *fp4_quantize_variants()):
        source = ASTSource(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
        compiled = triton.compile(source, target=target, options=options)
        print(kernel.fn.__name__, constants, options, f"shared {compiled.metadata.shared}")


if __name__ == "__main__":
    main(sys.argv[1])
