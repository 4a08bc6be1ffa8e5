"""The layers of an APT model and what runs through them.

# Shape suffix legend
#   B = batch, S = source positions, T = target positions, D = d_model
"""

from typing import Any

from torch import Tensor, nn

from apt_model.layers.attention import AttentionCache, AutopoieticAttention
from apt_model.layers.feed_forward import FeedForward
from apt_model.layers.left_spin import LeftSpinResidual, LeftSpinState, PlainResidual
from apt_model.layers.norm import RMSNorm
from apt_model.layers.rope import Rotation
from apt_model.modeling.configuration import APTModelConfiguration


class DecoderCache:
    """Keys and values of every decoder layer during generation."""

    def __init__(self, own: list[AttentionCache], cross: list[AttentionCache] | None) -> None:
        self.own, self.cross = own, cross

    @property
    def length(self) -> int:
        """Positions stored so far."""
        return self.own[0].length

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        for cache in [*self.own, *(self.cross or [])]:
            cache.reorder(rows)


class Sublayer(nn.Module):
    """One residual step: u -> residual(u, body(norm(u))), or norm(residual(u, body(u))) in a post-norm model."""

    def __init__(self, config: APTModelConfiguration, body: nn.Module, num_sublayers: int) -> None:
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.body = body
        self.residual = _residual(config, num_sublayers)

    def forward(self, u: Tensor, state: LeftSpinState | None, **inputs: Any) -> tuple[Tensor, LeftSpinState | None]:
        """[B, T, D] and the state of the sublayer before -> the new stream and state."""
        if self.pre_norm:
            stepped: tuple[Tensor, LeftSpinState | None] = self.residual(u, self.body(self.norm(u), **inputs), state)
            return stepped
        u, state = self.residual(u, self.body(u, **inputs), state)
        return self.norm(u), state


def _residual(config: APTModelConfiguration, num_sublayers: int) -> nn.Module:
    if not config.use_left_spin:
        return PlainResidual()
    alpha, tau = config.resolve_left_spin(num_sublayers)
    return LeftSpinResidual(
        config.d_model,
        mode=config.left_spin_mode,
        alpha=alpha,
        tau=tau,
        beta=config.left_spin_beta,
        w1=config.left_spin_w1,
        w2=config.left_spin_w2,
        detach=config.left_spin_detach,
        num_sublayers=num_sublayers,
    )


def _attention(config: APTModelConfiguration, *, cross: bool) -> AutopoieticAttention:
    return AutopoieticAttention(
        config.d_model,
        config.num_heads,
        cross=cross,
        autopoietic=config.use_autopoietic,
        rank=config.autopoietic_rank,
        autopoietic_alpha=config.autopoietic_alpha,
        dropout=config.dropout,
    )


def _feed_forward(config: APTModelConfiguration) -> FeedForward:
    return FeedForward(config.d_model, config.d_ff, activation=config.activation, dropout=config.dropout)


class EncoderLayer(nn.Module):
    """Attention in both directions, then feed-forward."""

    def __init__(self, config: APTModelConfiguration) -> None:
        super().__init__()
        count = config.num_encoder_sublayers
        self.attention = Sublayer(config, _attention(config, cross=False), count)
        self.feed_forward = Sublayer(config, _feed_forward(config), count)

    def forward(
        self, u_BSD: Tensor, state: LeftSpinState | None, turn: Rotation, mask_BS: Tensor | None
    ) -> tuple[Tensor, LeftSpinState | None]:
        """One layer's two residual steps."""
        u_BSD, state = self.attention(u_BSD, state, turn=turn, key_mask_BS=mask_BS)
        stepped: tuple[Tensor, LeftSpinState | None] = self.feed_forward(u_BSD, state)
        return stepped


class DecoderLayer(nn.Module):
    """Causal attention, cross-attention where there is a memory, feed-forward."""

    def __init__(self, config: APTModelConfiguration) -> None:
        super().__init__()
        count = config.num_decoder_sublayers
        self.attention = Sublayer(config, _attention(config, cross=False), count)
        self.cross_attention = (
            Sublayer(config, _attention(config, cross=True), count) if config.is_encoder_decoder else None
        )
        self.feed_forward = Sublayer(config, _feed_forward(config), count)

    def forward(  # noqa: PLR0917 - activation checkpointing hands tensors over by position
        self,
        u_BTD: Tensor,
        state: LeftSpinState | None,
        turn: Rotation,
        mask_BT: Tensor | None,
        memory_BSD: Tensor | None,
        memory_mask_BS: Tensor | None,
        cache: AttentionCache | None = None,
        cross_cache: AttentionCache | None = None,
    ) -> tuple[Tensor, LeftSpinState | None]:
        """One layer's two or three residual steps."""
        u_BTD, state = self.attention(u_BTD, state, turn=turn, causal=True, key_mask_BS=mask_BT, cache=cache)
        if self.cross_attention is not None and (memory_BSD is not None or cross_cache is not None):
            u_BTD, state = self.cross_attention(
                u_BTD, state, memory_BSD=memory_BSD, key_mask_BS=memory_mask_BS, cache=cross_cache
            )
        stepped: tuple[Tensor, LeftSpinState | None] = self.feed_forward(u_BTD, state)
        return stepped


def activation_bytes(config: APTModelConfiguration, *, tokens: int, num_layers: int, cross: bool, itemsize: int) -> int:
    """Bytes that `num_layers` layers keep for backward over `tokens` positions, counted from what each operation saves.

    `cross` counts cross-attention with a memory of as many positions; `itemsize` is the bytes of an activation's type.
    Fused norms, as accelerators have them, keep their input and output; a CPU's keep a normalised copy as well.
    """
    width, hidden = config.d_model, config.d_ff
    term = config.autopoietic_rank + config.num_heads if config.use_autopoietic else 0
    # What attention returns; with the term, its value and the sum of both too.
    returned = width * (3 if config.use_autopoietic else 1)
    # The norm's input and output, query and key after their turn, and the projection (the value is a view of it).
    attention = 2 * width + 2 * width + (3 * width + term) + returned
    # Here the query is a view of its projection, and key and value one of the memory's.
    cross_attention = 2 * width + (width + term) + 2 * width + returned
    feed_forward = 2 * width + (4 if config.activation == "swiglu" else 2) * hidden
    residuals = (3 if cross else 2) * _residual_bytes(config, itemsize)
    per_token = itemsize * (attention + (cross_attention if cross else 0) + feed_forward) + residuals
    return per_token * tokens * num_layers


def _residual_bytes(config: APTModelConfiguration, itemsize: int) -> int:
    """Bytes that one residual keeps for a token: its dropout's choice, and what the gate's gradient needs."""
    elements = 1 if config.dropout else 0
    if config.use_left_spin and (config.left_spin_mode == "trust" or not config.left_spin_detach):
        elements += itemsize  # the step
    if config.use_left_spin and not config.left_spin_detach:
        if config.left_spin_mode == "trust" or itemsize < 4:
            elements += 4  # the step in fp32
        if config.left_spin_mode == "design":
            elements += 4  # its difference from the one before
    return elements * config.d_model
