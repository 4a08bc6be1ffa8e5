"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): pairs of a head's channels turn with the position."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Rotation(NamedTuple):
    """Cosines and sines of the positions of a sequence, fp32, [T, 1, 2, head_dim / 2] each.

    Both halves of a head turn by the same angles; the sines that the first half takes are negative.
    """

    cos: Tensor
    sin: Tensor


class RotaryTable(nn.Module):
    """The angles of all positions, made once and always fp32, whatever type the model is cast to.

    A table, because compiled code would otherwise compute powers and cosines again in every kernel that turns
    something: measured on an H200, that took 12 of 69 ms of a training step.

    Args:
        max_seq_len: number of positions.
        head_dim: width of a head, even.
        theta: base of the frequencies.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, max_seq_len: int, head_dim: int, theta: float) -> None:
        super().__init__()
        self.max_seq_len, self.head_dim, self.theta = max_seq_len, head_dim, theta
        self.register_buffer("cos", torch.empty(max_seq_len, 1, 2, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(max_seq_len, 1, 2, head_dim // 2), persistent=False)
        self.fill(self.cos.device)

    @torch.no_grad()
    def fill(self, device: torch.device) -> None:
        """Compute the table on `device`."""
        position = torch.arange(self.max_seq_len, device=device, dtype=torch.float32)
        channel = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32)
        angle = position[:, None] * self.theta ** (-channel / self.head_dim)
        self.cos = torch.stack((angle.cos(), angle.cos()), dim=1)[:, None]
        self.sin = torch.stack((-angle.sin(), angle.sin()), dim=1)[:, None]

    def forward(self, start: int, length: int) -> Rotation:
        """The angles of the positions start .. start + length - 1."""
        return Rotation(self.cos[start : start + length], self.sin[start : start + length])

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "RotaryTable":
        """Move with the model, but keep fp32: a cast would round the angles."""
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        if self.cos.dtype != torch.float32:
            self.fill(self.cos.device)
        return self

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return f"{self.max_seq_len}, head_dim={self.head_dim}, theta={self.theta:g}"


def rotate(x_BTHd: Tensor, turn: Rotation) -> Tensor:
    """Turn the pairs (channel i, channel i + d/2) of every head; [B, T, H, d] -> the same shape and type."""
    pair = x_BTHd.unflatten(-1, (2, -1)).to(torch.promote_types(x_BTHd.dtype, torch.float32))
    return (pair * turn.cos + pair.flip(-2) * turn.sin).to(x_BTHd.dtype).flatten(-2)
