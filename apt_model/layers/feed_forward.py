"""The position-wise sublayer: GELU, or the gated SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """[..., D] -> [..., D] through a hidden layer of `d_ff`; SwiGLU keeps its gate and value in one matrix."""

    def __init__(self, d_model: int, d_ff: int, *, activation: Literal["gelu", "swiglu"], dropout: float) -> None:
        super().__init__()
        self.gated = activation == "swiglu"
        self.up_proj = nn.Linear(d_model, 2 * d_ff if self.gated else d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        hidden = self.up_proj(x)
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden)
        return self.dropout(self.down_proj(hidden))
