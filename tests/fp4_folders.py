"""Folders of weights, small enough to quantise in milliseconds."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_models import noise

from apt_model.core.tensor_folders import index_text


def layers(*, dtype=torch.bfloat16, width=32, hidden=64, count=2) -> dict[str, torch.Tensor]:
    """Tensors of a decoder, as Llama's files name them."""
    shapes = {
        "self_attn.q_proj.weight": (width, width), "self_attn.k_proj.weight": (width // 2, width),
        "self_attn.v_proj.weight": (width // 2, width), "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (hidden, width), "mlp.up_proj.weight": (hidden, width),
        "mlp.down_proj.weight": (width, hidden), "input_layernorm.weight": (width,),
    }  # fmt: skip
    named = {f"model.layers.{n}.{name}": shape for n in range(count) for name, shape in shapes.items()}
    named |= {"model.embed_tokens.weight": (48, width), "lm_head.weight": (48, width)}
    return {name: _uneven(shape, seed).to(dtype) for seed, (name, shape) in enumerate(named.items())}


def _uneven(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Rows of very different size, so that neither codes nor scales are all alike."""
    sizes = torch.linspace(0.01, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return noise(*shape, seed=seed) * sizes * 2.0 ** (seed % 5)


def experts(*, turned=False, dtype=torch.bfloat16, width=32, hidden=64) -> dict[str, torch.Tensor]:
    """Tensors of three fused experts, [E, outputs, inputs] or, turned, [E, inputs, outputs]."""
    gate_up, down = noise(3, 2 * hidden, width, seed=1).to(dtype), noise(3, width, hidden, seed=2).to(dtype)
    scale = torch.tensor([1.0, 30.0, 0.001], dtype=dtype)[:, None, None]
    made = {"gate_up_proj": gate_up * scale, "down_proj": down * scale}
    return {
        f"model.layers.0.mlp.experts.{name}": (tensor.mT if turned else tensor).contiguous()
        for name, tensor in made.items()
    }


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], *, shards=1, **config) -> Path:
    """A folder with config.json, the tensors, and two files that go along."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "made_up", **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"max_length": 9}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    homes = {name: f"model-{n % shards + 1:05}-of-{shards:05}.safetensors" for n, name in enumerate(tensors)}
    for file in sorted(set(homes.values())):
        mine = {name: tensor for name, tensor in tensors.items() if homes[name] == file}
        save_file(mine, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(index_text(homes, total, {}))
    return folder
