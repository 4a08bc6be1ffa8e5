"""The kind "apt_block": layers of an APT model's encoder or decoder, one after the other."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apt_model.cloud.server.blocks import Block, Kind, Port, Tensors, fill
from apt_model.cloud.server.tensors import FLOATS
from apt_model.core.errors import ConfigError, InputError
from apt_model.core.options import require
from apt_model.layers.left_spin import LeftSpinState
from apt_model.layers.rope import RotaryTable
from apt_model.modeling.blocks import DecoderLayer, EncoderLayer
from apt_model.modeling.configuration import APTModelConfiguration

_MOST_LAYERS = 1024


class AptLayers(nn.Module):
    """Layers first .. last of a stack: x [B, T, D] -> [B, T, D], positions counted from 0."""

    def __init__(self, config: APTModelConfiguration, *, encoder: bool, first: int, last: int) -> None:
        super().__init__()
        kind = EncoderLayer if encoder else DecoderLayer
        self.encoder, self.positions = encoder, config.max_seq_len
        with torch.device("meta"):
            self.layers = nn.ModuleDict({str(index): kind(config) for index in range(first, last + 1)})
        self.rotary = RotaryTable(config.max_seq_len, config.head_dim, config.rope_theta)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What the layers make of the stream; masks are True where it may be attended to."""
        state: LeftSpinState | None = None
        if x.shape[1] > self.positions:
            raise InputError(f"x: expected at most {self.positions} positions, got {x.shape[1]}")
        check_mask("attention_mask", attention_mask, x)
        if memory is not None:
            if memory.shape[0] != x.shape[0]:
                raise InputError(f"memory: expected {x.shape[0]} rows, as x has, got {memory.shape[0]}")
            memory = memory.to(x.dtype)
            check_mask("memory_mask", memory_mask, memory)
        turn = self.rotary(0, x.shape[1])
        for layer in self.layers.values():
            if self.encoder:
                x, state = layer(x, state, turn, attention_mask)
            else:
                x, state = layer(x, state, turn, attention_mask, memory, memory_mask)
        return x


def check_mask(name: str, mask: Tensor | None, x: Tensor) -> None:
    """Raise `InputError` unless there is none, or one element a position of `x` [B, T, D]."""
    if mask is not None and mask.shape != x.shape[:2]:
        raise InputError(f"{name}: expected {list(x.shape[:2])}, as x has, got {list(mask.shape)}")


def layer_range(value: object, where: str) -> tuple[int, int]:
    """First and last, of a list of two."""
    whole = isinstance(value, list) and len(value) == 2 and all(type(each) is int for each in value)
    require(whole, where, "[first, last]", value)
    assert isinstance(value, list)
    first, last = value
    require(0 <= first <= last < first + _MOST_LAYERS, where, f"at most {_MOST_LAYERS} layers, in order", value)
    return first, last


def in_range(options: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor is one of the block's layers: "3.attention.norm.weight" for layers [0, 3]."""
    first, last = layer_range(options.get("layers"), "layers")
    number = name.partition(".")[0]
    return number.isdecimal() and first <= int(number) <= last


def block_ports(width: int, others: tuple[Port, ...]) -> tuple[Port, Port, tuple[Port, ...]]:
    """`x` and `y` [B, T, width], a mask [B, T], and others."""
    mask = Port("attention_mask", ("BOOL",), (-1, -1), optional=True)
    return Port("x", FLOATS, (-1, -1, width)), Port("y", FLOATS, (-1, -1, width)), (mask, *others)


def _make(options: Mapping[str, Any], tensors: Tensors) -> Block:
    stack = options.get("stack", "decoder")
    require(stack in ("decoder", "encoder"), "apt_block.stack", "decoder or encoder", stack)
    if not isinstance(options.get("model"), dict):
        raise ConfigError("apt_block.model: expected the model's configuration, an object")
    config = APTModelConfiguration.from_dict(options["model"])
    first, last = layer_range(options.get("layers"), "apt_block.layers")
    encoder = stack == "encoder"
    count = config.num_encoder_layers if encoder else config.num_decoder_layers
    require(last < count, "apt_block.layers", f"layers of {count}", [first, last])
    if config.use_left_spin and config.left_spin_mode == "design" and (first, last) != (0, count - 1):
        raise ConfigError(
            f"apt_block.layers: expected [0, {count - 1}], all of the stack, along which the left spin of design mode "
            f"hands on its state, got [{first}, {last}]"
        )
    require(config.max_seq_len <= 1 << 20, "apt_block.model.max_seq_len", "at most 1048576", config.max_seq_len)
    _check_width(config, tensors)
    module = AptLayers(config, encoder=encoder, first=first, last=last)
    fill(module.layers, tensors, "apt_block")
    width = config.d_model
    memory = (
        Port("memory", FLOATS, (-1, -1, width), optional=True),
        Port("memory_mask", ("BOOL",), (-1, -1), optional=True),
    )
    cross = config.is_encoder_decoder and not encoder
    return Block(module, *block_ports(width, memory if cross else ()))


def _check_width(config: APTModelConfiguration, tensors: Tensors) -> None:
    """A configuration is small, what it describes is not: the rotary table is made only for weights that are there."""
    widths = {size for tensor in tensors.values() for size in tensor.shape}
    require(config.d_model in widths, "apt_block.model.d_model", f"a width of its tensors, {sorted(widths)[:9]}",
            config.d_model)  # fmt: skip


KIND = Kind("apt_block", _make, ("model", "stack", "layers"), in_range)
