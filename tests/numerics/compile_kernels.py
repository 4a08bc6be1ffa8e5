"""Compile every kernel for one target, with no GPU: `python tests/numerics/compile_kernels.py cuda:90 [--some]`.

With --some every third variant of each kernel. Prints a line a variant: name, constants, options, shared memory.
"""

import concurrent.futures
import functools
import itertools
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from apt_model.ops.fp4 import fp8, plan
from apt_model.ops.fp4.fused_quantize import tile
from apt_model.ops.fp4.kernel_decode import decode_kernel
from apt_model.ops.fp4.kernel_quantize import quantize_kernel
from apt_model.ops.fp4.kernel_rows import rows_kernel
from apt_model.ops.fp4.kernel_tile import tile_kernel
from apt_model.ops.fp4.kernel_unpack import unpack_kernel, unpack_order_kernel, unpack_pairs_kernel
from apt_model.ops.fp4.tables import Decode, Tile
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


def fp4_unpack_variants(*, fp8=False, ptx=False):
    kinds = [("fp8e4nv", 16, True), ("fp8e4nv", 32, True)] if fp8 else [
        (out, *kind) for out, kind in itertools.product(("bf16", "fp16", "fp32"), [(16, True), (32, False)])
    ]  # fmt: skip
    for out, block, divisor in kinds:
        signature = {
            "packed_ptr": "*u8", "scale_ptr": "*u8", "divisor_ptr": "*fp32", "out_ptr": f"*{out}",
            **dict.fromkeys(("width", "packed_stride", "scale_stride", "out_stride"), "i32"),
        }  # fmt: skip
        yield unpack_kernel, signature, {"BLOCK": block, "HAS_DIVISOR": divisor, "BYTES": 512}, {}
        signature = {
            "words_ptr": "*i32", "scales_ptr": "*i32", "alpha_ptr": "*fp32", "divisor_ptr": "*fp32",
            "out_ptr": f"*{out}",
            **dict.fromkeys(("rows", "width", "out_stride", "chunks", "first_tile", "first_chunk"), "i32"),
        }  # fmt: skip
        yield unpack_order_kernel, signature, {"BLOCK": block, "FP16": out == "fp16", "HAS_DIVISOR": divisor}, {}
        if ptx and out != "fp32":
            signature = {name: kind for name, kind in signature.items() if name != "divisor_ptr"}
            signature["out_ptr"] = "*i16" if fp8 else "*i32"
            for fp16 in {out == "fp16", fp8}:
                yield (
                    unpack_pairs_kernel,
                    signature,
                    {"BLOCK": block, "FP16": fp16, "E4M3": fp8, "CHUNKS": 2},
                    {"num_warps": 8},
                )


def fp8_rows_variants():
    for x, width in (("bf16", 768), ("bf16", 8192), ("fp32", 32768), ("fp16", 40000)):
        block, once = fp8.block(width)
        signature = {
            "x_ptr": f"*{x}", "rest_ptr": "*fp32", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "rest_out_ptr": "*fp32",
            **dict.fromkeys(("width", "out_width", "row_stride", "count"), "i32"),
        }  # fmt: skip
        constants = {"BLOCK": block, "ONCE": once, "SHARE": 2}
        yield rows_kernel, signature, constants, {"num_warps": fp8.warps(block)}


def fp4_product_variants(capability):
    """What is launched on an NVIDIA GPU; x in shared memory and `tile_kernel` are for Hopper alone."""
    launches = [Decode(1, 8, 0, 4, 1), Decode(2, 16, 0, 4, 4), Decode(1, 16, 0, 8, 8), Decode(4, 8, 0, 4, 2, 2)]
    if capability == 90:
        launches += [
            Decode(2, 8, 8, 4, 4),
            Decode(4, 16, 8, 4, 2, 2),
            Decode(1, 16, 4, 8, 8),
            Tile(1, 8, 8, 3, 2),
            Tile(2, 256, 2, 3, 1),
        ]
    launches = [(each, False) for each in launches]
    launches += [(Tile(2, 256, 2, 3, 1), True), (Tile(1, 64, 4, 3, 2), True)] if capability == 90 else []
    kinds = [("bf16", 16, None), ("fp16", 16, "swiglu"), ("bf16", 32, "gelu")]
    for (setting, turned), (dtype, block, activation) in itertools.product(launches, kinds):
        tile = isinstance(setting, Tile)
        types = [f"*{dtype}", "*i32", "*i32"]
        if plan.described(setting):
            boxes = plan.boxes(setting, block, turned)
            types[: len(boxes)] = [
                f"tensordesc<{kind[1:]}{shape},{layout!r}>" for kind, (shape, layout) in zip(types, boxes, strict=False)
            ]
        x, words, scales = types
        signature = {
            "x_desc" if tile else "x": x, "words_desc" if tile else "words_ptr": words,
            "scales_desc" if tile else "scales_ptr": scales, "alpha_ptr": "*fp32",
            "bias_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "partial_ptr": "*fp32", "counter_ptr": "*i32",
            **dict.fromkeys(("M", "N"), "i32"),
        }  # fmt: skip
        ints = ("chunks", "steps_per_split") if tile else ("K", "stride_x", "groups", "groups_per_split")
        signature |= dict.fromkeys(ints, "i32")
        if tile:
            own = {"C": setting.c, "STAGES": setting.stages, "TURNED": turned, "GROUP": 8}
        else:
            own = {"KEPT": setting.kept, "REP": setting.rep, "AHEAD": setting.ahead}
        constants = {
            "SPLIT": setting.split, "WG": setting.wg, "BM": setting.bm, "BLOCK": block,
            "FP16": dtype == "fp16", "HAS_BIAS": not turned, "PDL": capability >= 90,
            "ACTIVATION": plan.CODES[None if turned else activation],
            **own,
        }  # fmt: skip
        yield (
            tile_kernel if tile else decode_kernel,
            signature,
            constants,
            {"num_warps": setting.warps},
        )


def variants_of(name: str):
    backend, _, arch = name.partition(":")
    found = [*left_spin_variants(), *fp4_quantize_variants(), *fp4_unpack_variants(ptx=backend == "cuda")]
    if backend == "cuda" and int(arch) >= 89:  # Triton has E4M3 from there on
        found += [*fp8_rows_variants(), *fp4_unpack_variants(fp8=True, ptx=True)]
    if backend == "cuda":
        found += fp4_product_variants(int(arch))
    return found


def compiled(name: str, number: int) -> str:
    backend, _, arch = name.partition(":")
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    kernel, signature, constants, options = variants_of(name)[number]
    form = GluonASTSource if kernel.is_gluon() else ASTSource
    source = form(kernel, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    made = triton.compile(source, target=target, options=options)
    shown = {key: value for key, value in constants.items() if isinstance(value, (int, bool))}
    return f"{kernel.fn.__name__} {shown} {options} shared {made.metadata.shared}"


def main(name: str, *, some: bool) -> None:
    by_kernel: dict[str, list[int]] = {}
    for number, (kernel, *_) in enumerate(variants_of(name)):
        by_kernel.setdefault(kernel.fn.__name__, []).append(number)
    numbers = [number for found in by_kernel.values() for number in found[:: 3 if some else 1]]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for line in pool.map(functools.partial(compiled, name), numbers):
            print(line)


if __name__ == "__main__":
    main(sys.argv[1], some="--some" in sys.argv)
