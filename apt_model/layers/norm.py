"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv 1910.07467)."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` whose weight follows the stream's type, so that the fused kernel serves a bf16 stream too."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., D] -> [..., D], same type."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)
