import itertools

import pytest
import torch
from tolerances import TOLERANCES

from apt_model.layers.attention import AutopoieticAttention
from apt_model.layers.rope import RotaryTable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDTH, HEADS = 512, 8
LENGTHS = (2048, 4096, 8192)


class NaiveAttention(AutopoieticAttention):
    """Negative control: the same function with its matrix of scores."""

    def forward(self, x_BTD, *, turn=None, **_):
        query, key, value, term = self._project(x_BTD, turn, None, None)
        score = query @ key.transpose(-1, -2) * self.head_dim**-0.5
        score = score.masked_fill(torch.ones_like(score[0, 0], dtype=torch.bool).triu(1), -torch.inf)
        out = (score.softmax(dim=-1) @ value).transpose(1, 2) + self._self_value(*term)
        return self.out_proj(out.flatten(2))


def peak_bytes(cls, positions):
    """The most memory that forward and backward over one sequence hold at once, beyond what was held before."""
    layer = cls(WIDTH, HEADS, rank=WIDTH // 4).cuda().bfloat16()
    turn = RotaryTable(positions, WIDTH // HEADS, 10000.0).cuda()(0, positions)
    x = torch.randn(1, positions, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):  # the first makes workspaces that stay
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer(x, turn=turn, causal=True).sum().backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        layer.zero_grad(set_to_none=True)
        x.grad = None
    return peak


def growth(cls):
    peaks = [peak_bytes(cls, positions) for positions in LENGTHS]
    return [longer / shorter for shorter, longer in itertools.pairwise(peaks)]


def test_memory_grows_in_proportion_to_the_length():
    assert max(growth(AutopoieticAttention)) < TOLERANCES["memory_per_doubling"].relative


def test_the_check_of_memory_catches_a_matrix_of_scores():
    assert max(growth(NaiveAttention)) > 3
