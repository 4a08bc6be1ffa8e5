"""The kind "hf_block": layers of a transformers model whose architecture is on a list; the code is its own."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apt_model.cli.serving.apt_block import block_ports, check_mask, in_range, layer_range
from apt_model.cloud.server.blocks import Block, Kind, Tensors, fill
from apt_model.core.errors import ConfigError, InputError, MissingExtraError
from apt_model.core.options import require

# Names of code, or of other libraries' weights.
_FORBIDDEN = ("auto_map", "quantization_config", "_attn_implementation", "attn_implementation", "torch_dtype", "dtype")
_MOST_POSITIONS = 1 << 20
_ROTARY = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a model that was cast as a whole has rounded its rotary frequencies to."""


class _Architecture(NamedTuple):
    """Where transformers has a layer, and what it is called with."""

    module: str
    layer: str
    rotary: str | None = None
    causal: bool = True


ARCHITECTURES = {
    "bert": _Architecture("transformers.models.bert.modeling_bert", "BertLayer", causal=False),
    "gpt2": _Architecture("transformers.models.gpt2.modeling_gpt2", "GPT2Block"),
    "llama": _Architecture("transformers.models.llama.modeling_llama", "LlamaDecoderLayer", "LlamaRotaryEmbedding"),
    "qwen2": _Architecture("transformers.models.qwen2.modeling_qwen2", "Qwen2DecoderLayer", "Qwen2RotaryEmbedding"),
}
"""By `model_type` of config.json."""


class HFLayers(nn.Module):
    """Layers first .. last: x [B, T, D] -> [B, T, D], positions counted from 0."""

    def __init__(self, layers: nn.ModuleDict, rotary: nn.Module | None, mask: Callable[..., Any], config: Any) -> None:
        super().__init__()
        self.layers, self.rotary = layers, rotary
        self._mask, self._config = mask, config

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What the layers make of the stream; the mask is True where it may be attended to."""
        most = self._config.max_position_embeddings
        if x.shape[1] > most or 0 in x.shape:
            raise InputError(f"x: expected 1 to {most} positions, got {list(x.shape)}")
        check_mask("attention_mask", attention_mask, x)
        found = self._mask(self._config, x, attention_mask, None)
        more: dict[str, Any] = {}
        if self.rotary is not None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
            more = {"position_embeddings": self.rotary(x, positions), "position_ids": positions}
        for layer in self.layers.values():
            made = layer(x, attention_mask=found, **more)
            x = made[0] if isinstance(made, tuple) else made
        return x


def _make(options: Mapping[str, Any], tensors: Tensors) -> Block:
    about = options.get("model")
    if not isinstance(about, dict):
        raise ConfigError("hf_block.model: expected the model's config.json, an object")
    name = about.get("model_type")
    known = isinstance(name, str) and name in ARCHITECTURES
    require(known, "hf_block.model.model_type", " or ".join(ARCHITECTURES), name)
    assert isinstance(name, str)
    first, last = layer_range(options.get("layers"), "hf_block.layers")
    config = _config(name, about)
    require(last < config.num_hidden_layers, "hf_block.layers", f"layers of {config.num_hidden_layers}", [first, last])
    architecture = ARCHITECTURES[name]
    home = importlib.import_module(architecture.module)
    with torch.device("meta"):
        kind = getattr(home, architecture.layer)
        layers = nn.ModuleDict({str(index): kind(config, index) for index in range(first, last + 1)})
    fill(layers, tensors, "hf_block")
    for buffer, held in layers.named_buffers():
        if held.is_meta:
            raise ConfigError(f"hf_block: this version of transformers makes {buffer} in a layer of {name}")
    rotary = getattr(home, architecture.rotary)(config) if architecture.rotary is not None else None
    rounded = options.get("rotary")
    if rounded is not None:
        known = isinstance(rounded, str) and rounded in _ROTARY and rotary is not None
        require(known, "hf_block.rotary", " or ".join(_ROTARY) + ", of a model with rotary positions", rounded)
        rotary.to(_ROTARY[rounded])  # type: ignore[union-attr]
    masks = importlib.import_module("transformers.masking_utils")
    mask = masks.create_causal_mask if architecture.causal else masks.create_bidirectional_mask
    return Block(HFLayers(layers, rotary, mask, config), *block_ports(config.hidden_size, ()))


def _config(name: str, about: Mapping[str, Any]) -> Any:
    """The configuration, of plain values; `ConfigError` where transformers refuses it."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError("a block of kind hf_block", "transformers", "hf") from error
    plain = {key: value for key, value in about.items() if key not in (*_FORBIDDEN, "model_type")}
    try:
        config = transformers.AutoConfig.for_model(name, **plain, attn_implementation="sdpa")
        sizes = (config.hidden_size, config.num_attention_heads, config.max_position_embeddings)
        sound = all(type(size) is int and size > 0 for size in sizes)
    except Exception as error:  # whatever transformers makes of foreign values
        raise ConfigError(f"hf_block.model: {type(error).__name__}: {error}"[:300]) from error
    require(sound and sizes[2] <= _MOST_POSITIONS, "hf_block.model", "whole sizes above 0", sizes)
    if getattr(config, "use_sliding_window", False) or getattr(config, "add_cross_attention", False):
        raise ConfigError("hf_block: expected layers without sliding windows and cross-attention")
    return config


KIND = Kind("hf_block", _make, ("model", "layers", "rotary"), in_range)
