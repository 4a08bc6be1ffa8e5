"""What names and shapes alone say of a tensor in a file: which are matrices of linear layers. Imports no torch."""

import re
from collections.abc import Mapping
from typing import Any

# Kept in full precision by name, whoever knows the model: small beside their effect, as everyone who quantises has it.
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|classifier|score|qa_outputs)$|^output$")
ROUTER = re.compile(r"router|(^|\.)(gate|shared_expert_gate)$")
# Where names alone decide: what is no linear layer, by its layer's name in small letters.
EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|shared|relative_attention_bias)$")
NORM = re.compile(r"norm|(^|\.)ln_")
CONVOLUTION = re.compile(r"conv")
# Hugging Face's names for the 3-D parameters of fused experts.
EXPERT_WEIGHTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to; of fused experts, the tensor itself."""
    return name.removesuffix(".weight")


def is_experts(name: str) -> bool:
    """Whether a 3-D tensor is a fused weight of experts."""
    return ".experts." in name and name.rpartition(".")[2] in EXPERT_WEIGHTS


def turned_layers(shapes: Mapping[str, Any]) -> set[str]:
    """Last names of layers of which some have as many biases as columns and not as rows, as GPT-2's have: [K, N].

    Args:
        shapes: by a tensor's name, something with its shape as `shape`.
    """
    found = set()
    for name, entry in shapes.items():
        bias = shapes.get(f"{layer_of(name)}.bias")
        matrix = name.endswith(".weight") and len(entry.shape) == 2
        if matrix and bias is not None and tuple(bias.shape) != tuple(entry.shape[:1]):
            found.add(layer_of(name).rpartition(".")[2])
    return found
