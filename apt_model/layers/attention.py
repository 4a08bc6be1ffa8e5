"""Multi-head attention over PyTorch's SDPA, with the autopoietic term.

# Shape suffix legend
#   B = batch, T = query positions, S = key positions, D = d_model, H = heads, d = head_dim, r = rank of the self-value
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.core.errors import InputError
from apt_model.layers.rope import Rotation, rotate

# The projection's rows are rounded up to this, so that its output rows stay aligned for the matrix units (16 bytes in
# bf16); the rows past the last used one are zero and get no gradient.
_ROW_ALIGNMENT = 8


class AttentionCache:
    """Keys and values of one attention, [B, H, capacity, d], the first `length` positions filled."""

    def __init__(self, keys_BHSd: Tensor, values_BHSd: Tensor, length: int) -> None:
        self.keys, self.values, self.length = keys_BHSd, values_BHSd, length

    @classmethod
    def empty(
        cls, batch: int, heads: int, capacity: int, head_dim: int, *, device: torch.device, dtype: torch.dtype
    ) -> "AttentionCache":
        """Room for `capacity` positions."""
        shape = (batch, heads, capacity, head_dim)
        return cls(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype), 0)

    def append(self, keys_BHTd: Tensor, values_BHTd: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions; return all keys and values so far."""
        end = self.length + keys_BHTd.shape[2]
        self.keys[:, :, self.length : end] = keys_BHTd
        self.values[:, :, self.length : end] = values_BHTd
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was (beam search)."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)


def attention_mask(
    causal: bool, key_mask_BS: Tensor | None, query_length: int, key_length: int, device: torch.device
) -> tuple[Tensor | None, bool]:
    """SDPA's `attn_mask` (True = attend) and `is_causal`, for queries that stand at the last positions of the keys.

    Where no key mask asks for one, no mask is built, so that the flash kernels apply.
    """
    if not causal or query_length == 1:
        return (None if key_mask_BS is None else key_mask_BS[:, None, None, :]), False
    if key_mask_BS is None and query_length == key_length:
        return None, True
    query_position = torch.arange(key_length - query_length, key_length, device=device)
    distance_TS = query_position[:, None] - torch.arange(key_length, device=device)
    mask = distance_TS >= 0
    if key_mask_BS is not None:
        # A padding position still attends to itself: a row without any key would be undefined.
        mask = (mask & key_mask_BS[:, None, None, :]) | (distance_TS == 0)
    return mask, False


class AutopoieticAttention(nn.Module):
    """Attention whose every head adds a gated, low-rank function of the query's own input to what it attended to.

    Per head h and position t, with x the query-side input, o what scaled-dot-product attention returned, rank r:

        o[t,h] + autopoietic_alpha * tanh(amp[h]) * sigmoid((W_g x[t] + b_g)[h] / temp[h]) * (V U x[t])[h]

    The term looks at position t only: it is causal, ignores padding and neighbours, and needs no cache. V, W_g and b_g
    start at 0, so that a new model equals the one without the term bit for bit. U and W_g are rows of the same matrix
    as the query's projection. With `autopoietic=False` this is plain attention.

    Args:
        d_model: width D of input and output.
        num_heads: heads H.
        cross: keys and values come from `memory` instead of the input.
        autopoietic: whether to add the term.
        rank: rank r of the self-value.
        autopoietic_alpha: scale of the term.
        dropout: probability of dropping an element of the output, while training.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        cross: bool = False,
        autopoietic: bool = True,
        rank: int = 64,
        autopoietic_alpha: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.cross = num_heads, d_model // num_heads, cross
        self.autopoietic, self.rank, self.autopoietic_alpha = autopoietic, rank, autopoietic_alpha
        self.widths = [d_model] if cross else [d_model] * 3
        if autopoietic:
            self.widths += [rank, num_heads]
        self.padding_rows = -sum(self.widths) % _ROW_ALIGNMENT
        self.in_proj = nn.Linear(d_model, sum(self.widths) + self.padding_rows, bias=False)
        self.memory_proj = nn.Linear(d_model, 2 * d_model, bias=False) if cross else None
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)
        if autopoietic:
            self.self_value = nn.Linear(rank, d_model, bias=False)
            self.gate_bias = nn.Parameter(torch.empty(num_heads))
            self.amp = nn.Parameter(torch.empty(num_heads))
            self.temp_raw = nn.Parameter(torch.empty(num_heads))
            self.reset_gate()

    def reset_gate(self) -> None:
        """Start the term at zero: V = 0, b_g = 0, and amp and temp at 1 (W_g is zeroed with its matrix)."""
        if self.autopoietic:
            nn.init.zeros_(self.self_value.weight)
            nn.init.zeros_(self.gate_bias)
            nn.init.ones_(self.amp)
            nn.init.constant_(self.temp_raw, math.log(math.expm1(0.9)))

    @property
    def temp(self) -> Tensor:
        """Temperature of each head's gate, [H], at least 0.1."""
        return F.softplus(self.temp_raw) + 0.1

    def forward(
        self,
        x_BTD: Tensor,
        *,
        turn: Rotation | None = None,
        causal: bool = False,
        key_mask_BS: Tensor | None = None,
        memory_BSD: Tensor | None = None,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D].

        Args:
            x_BTD: queries' input, and keys' and values' too unless this is cross-attention.
            turn: rotary angles of the T positions (self-attention).
            causal: a position sees itself and those before it.
            key_mask_BS: True where a key may be attended to, cached positions included.
            memory_BSD: keys' and values' input of cross-attention; not needed when `cache` already holds them.
            cache: keys and values so far; self-attention appends, cross-attention fills it once.
        """
        query, key, value, term = self._project(x_BTD, turn, memory_BSD, cache)
        mask, is_causal = attention_mask(causal, key_mask_BS, query.shape[2], key.shape[2], x_BTD.device)
        out_BTHd = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
        out_BTHd = out_BTHd.transpose(1, 2)
        if term is not None:
            out_BTHd = out_BTHd + self._self_value(*term)
        return self.dropout(self.out_proj(out_BTHd.flatten(2)))

    def _project(
        self, x_BTD: Tensor, turn: Rotation | None, memory_BSD: Tensor | None, cache: AttentionCache | None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Query, key and value, [B, H, T or S, d], and the term's inputs (U x [B, T, r], W_g x [B, T, H])."""
        parts = self.in_proj(x_BTD).split([*self.widths, self.padding_rows], dim=-1)
        term = (parts[-3], parts[-2]) if self.autopoietic else None
        query = self._heads(parts[0])
        if self.cross:
            key, value = self._memory(memory_BSD, cache)
        else:
            if turn is None:
                raise InputError("self-attention needs `turn`, the rotary angles of its positions")
            query, key = rotate(query, turn), rotate(self._heads(parts[1]), turn)
            key, value = key.transpose(1, 2), self._heads(parts[2]).transpose(1, 2)
            if cache is not None:
                key, value = cache.append(key, value)
        return query.transpose(1, 2), key, value, term

    def _memory(self, memory_BSD: Tensor | None, cache: AttentionCache | None) -> tuple[Tensor, Tensor]:
        if cache is not None and cache.length:
            return cache.keys, cache.values
        if memory_BSD is None or self.memory_proj is None:
            raise InputError("cross-attention needs `memory_BSD`, the encoder's output")
        key, value = (self._heads(part).transpose(1, 2) for part in self.memory_proj(memory_BSD).chunk(2, dim=-1))
        if cache is not None:
            cache.keys, cache.values, cache.length = key, value, key.shape[2]
        return key, value

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.num_heads, self.head_dim))

    def _self_value(self, low_BTr: Tensor, gate_BTH: Tensor) -> Tensor:
        """The term, [B, T, H, d]."""
        strength_H = self.autopoietic_alpha * torch.tanh(self.amp)
        gate_BTH = strength_H * torch.sigmoid((gate_BTH + self.gate_bias) / self.temp)
        value_BTHd = self._heads(self.self_value(low_BTr))
        return gate_BTH.to(value_BTHd.dtype).unsqueeze(-1) * value_BTHd
