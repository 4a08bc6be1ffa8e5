"""A stack of Llama-3-8B's decoder blocks with random weights, and nothing beside it: what the benchmarks of VGPU stream."""

import torch
from torch import Tensor, nn

SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
SMALL_SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}


class Stack(nn.Module):
    """Blocks one after another; the tables of positions come from outside, so that there are blocks only."""

    def __init__(self, config, count: int) -> None:
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        self.blocks = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(count))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, position_embeddings=(cos, sin))
        return x


def config_of(*, small: bool):
    from transformers import LlamaConfig

    return LlamaConfig(**(SMALL_SHAPE if small else SHAPE), vocab_size=8, use_cache=False, attn_implementation="sdpa")


def stack_of(count: int, device: str, *, small: bool, seed: int = 0) -> Stack:
    """Frozen, in bf16; every call on a device with a seed gives the same weights."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Stack(config_of(small=small), count).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def inputs_of(size: str, device: str, *, small: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of batch x length tokens, with the tables of their positions."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = config_of(small=small)
    batch, length = map(int, size.split("x"))
    torch.manual_seed(1)
    x = torch.randn(batch, length, config.hidden_size, device=device).bfloat16()
    with torch.device(device):
        return x, *LlamaRotaryEmbedding(config)(x, torch.arange(length)[None])


def bytes_of(model: nn.Module) -> int:
    """Of all parameters and buffers."""
    return sum(each.nbytes for each in [*model.parameters(), *model.buffers()])
