"""Every tolerance that the numerics tests use, each with its reason. One that is exceeded is a fault to find."""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """|got - expected| <= absolute + relative * |expected|, elementwise."""

    relative: float
    absolute: float
    reason: str


TOLERANCES = {
    "definition_fp64": Tolerance(1e-12, 1e-12, "fp64 both sides; sums of at most 65 terms in another order"),
    "softplus_fp64": Tolerance(
        2e-10, 2e-10, "fp64, but torch takes softplus(x) as x beyond 20, where they differ by 2e-9"
    ),
    "definition_fp32": Tolerance(1e-6, 1e-6, "fp32 arithmetic on values near 1: a few of its 6e-8 roundings"),
    "one_rounding_bf16": Tolerance(2**-8, 1e-6, "one rounding to bf16's 8 bits, at most half of 2^-7 of the value"),
    "one_truncation_bf16": Tolerance(2**-7, 1e-6, "bits beyond bf16's 8 cut off, at most 2^-7 of the value"),
    "scale_equivariance": Tolerance(
        1e-6, 1e-5, "eps is absolute: 1e-6 beside a mean square of 1; steps are a few times that"
    ),
    "rotation_equivariance": Tolerance(1e-9, 1e-9, "fp64; a rotation by 65 x 65 products moves the norms by rounding"),
    "closed_form_fp64": Tolerance(1e-10, 1e-10, "fp64 gradients through two expressions of the same function"),
    "compiled": Tolerance(1e-5, 1e-5, "fp32; fused kernels contract multiply and add and sum in another order"),
    "bound": Tolerance(1e-6, 0.0, "fp32 norms of the rounded result and of the stream that bounds it"),
    "attention_fp64": Tolerance(1e-10, 1e-10, "fp64; SDPA sums the softmax in blocks, the explicit form at once"),
    "whole_model_fp64": Tolerance(1e-9, 1e-9, "fp64; logits of order 1 after some hundred sums in another order"),
    "other_shape": Tolerance(2e-5, 2e-5, "fp32 through a whole small model; a product of another shape sums otherwise"),
    "memory_per_doubling": Tolerance(
        2.3, 0.0, "twice the positions hold twice the memory; a seventh more for workspaces"
    ),
    "fp4_choice_of_scale": Tolerance(
        1e-5, 0.0, "fp32 sums of at most 32 squares: two scales whose errors are this near may be ordered either way"
    ),
    "fp4_nvfp4_gaussian": Tolerance(0.0067, 0.0, "goal: squared error beside the weight's own; .0066 at 2M samples"),
    "fp4_nvfp4_laplace": Tolerance(0.0069, 0.0, "goal: squared error beside the weight's own; .0068 at 2M samples"),
    "fp4_mxfp4_gaussian": Tolerance(0.0126, 0.0, "goal: squared error beside the weight's own; .0125 at 2M samples"),
    "fp4_mxfp4_laplace": Tolerance(0.0152, 0.0, "goal: squared error beside the weight's own; .0151 at 2M samples"),
    "fp4_search_gaussian": Tolerance(0.75, 0.0, "goal: a quarter less squared error than round-to-nearest"),
    "fp4_search_laplace": Tolerance(0.81, 0.0, "heavy tails gain less: a fifth, by the published table as well"),
    "fp4_nvfp4_importance": Tolerance(0.95, 0.0, "weighted error beside that of an unweighted search: less"),
    "fp4_mxfp4_importance": Tolerance(0.99, 0.0, "two scales to choose from instead of nine: less to gain"),
    "fp8_nvfp4_weight": Tolerance(
        0.0070, 0.0, "Gaussian weights; .00695 at 2M samples, of which nvfp4 itself is .0066"
    ),
    "fp8_nvfp4_output": Tolerance(0.034, 0.0, "beside 16-bit x, norm over norm on Gaussian operands; .0329 measured"),
    "fp8_mxfp4_output": Tolerance(0.0275, 0.0, "the rounding of x alone, as mxfp4 is exact in E4M3; .0264 measured"),
    "fp8_sums": Tolerance(
        4e-3, 0.0, "norm over norm; E4M3 products added to fp32 every 128 inputs, and one rounding to 16 bits"
    ),
    "fp8_fast_sums": Tolerance(
        8e-3, 0.0, "the same where Hopper keeps sums to 14 bits: 130 cuts of up to 2^-13 for 4160 inputs, most one way"
    ),
    "accumulation": Tolerance(1e-4, 1e-6, "fp32 gradients summed over micro-batches instead of in one product"),
}


def assert_close(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise `AssertionError` that shows the worst element when the two differ by more than the named tolerance."""
    limit = TOLERANCES[name]
    torch.testing.assert_close(
        got, expected, rtol=limit.relative, atol=limit.absolute, msg=lambda text: f"{name} ({limit.reason})\n{text}"
    )
