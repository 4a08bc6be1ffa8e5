"""What a block has to compute for a number of tokens: from its tensors, and from the model's configuration. Pure.

Counted are products, attention, and what elementwise kernels read and write, as eager PyTorch runs them.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from apt_model.vgpu.rates import UNKNOWN, Rates
from apt_model.vgpu.tree import Held, Node

_SCALES = re.compile(r"(scales?|scale_inv|qzeros|g_idx)$")
_QUERY = re.compile(r"^(q|q_proj|query|c_attn|qkv|qkv_proj|query_key_value|in_proj|wqkv)$", re.IGNORECASE)
_KEY = re.compile(r"^(k|k_proj|key)$", re.IGNORECASE)
_WIDENS = re.compile(r"^(gate_proj|up_proj|gate_up_proj|w1|w3|wi|wi_0|wi_1|c_fc|fc1|dense_h_to_4h)$")
_GATE = re.compile(r"^(gate_proj|w1|wi_0|gate_up_proj)$")
_CAUSAL = re.compile(r"ForCausalLM|LMHead")
# Kernels, and how often they read and write an activation's element.
_COPY, _LAYER_NORM, _ADD = (1, 2), (1, 2), (1, 3)
_ROTATED = (5, 10)  # each of queries and keys: half negated, joined, two products, a sum
_GATED = (2, 5)  # an activation, and a product of two
_WRITTEN_OUT_COST = (8, 18)
_RMS_LAUNCHES, _RMS_BYTES, _RMS_BYTES_HALF = 6, 28, 36  # in fp32, for half a width with a conversion at either end
_WRITTEN_OUT = {
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "quick_gelu",
}  # activations that are Python in transformers
_SDPA = 3  # kernels


class Facts(NamedTuple):
    """What the configuration tells of a model."""

    width: int | None = None
    """Of the residual stream."""
    attention: int | None = None
    """Heads times their width."""
    causal: bool = False
    rotary: bool = False
    top_k: int = 1
    """Experts that a token meets."""
    activation: str = ""
    fused_norm: bool = False
    """Whether RMSNorm is one kernel."""


class Product(NamedTuple):
    """With a weight of `numel` elements in `nbytes`; of each of `experts`, together, where that is not 0."""

    numel: int
    nbytes: int
    dtype: str
    fp4: bool
    experts: int


class Work(NamedTuple):
    """Of one block."""

    products: tuple[Product, ...]
    attention: tuple[tuple[int, bool], ...]
    """Width of all heads, and whether it is causal."""
    traffic: float
    """Bytes that elementwise kernels read and write, of one token."""
    chained: float
    """Those of RMSNorm and rotary embeddings, several kernels in a row with conversions and reductions between."""
    launches: int
    nbytes: int
    """Of its weights."""


def facts_of(config: Mapping[str, Any]) -> Facts:
    """Look up what `config` (as config.json has it) says, under transformers' several names and ours."""
    inner = config.get("text_config")
    config = {**config, **(inner if isinstance(inner, Mapping) else {})}
    width = _number(config, "hidden_size", "n_embd", "d_model", "dim")
    heads = _number(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
    head = _number(config, "head_dim", "d_kv") or (width // heads if width and heads else None)
    rotary = any(config.get(name) for name in ("rope_theta", "rope_parameters", "rope_scaling"))
    return Facts(
        width=width,
        attention=heads * head if heads and head else None,
        causal=bool(_CAUSAL.search(str((config.get("architectures") or [""])[0])) or config.get("decoder_only")),
        rotary=rotary,
        top_k=_number(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk") or 1,
        activation=str(next((config[name] for name in _ACTIVATIONS if config.get(name)), "")),
        fused_norm=config.get("model_type") == "apt" or "use_autopoietic" in config,
    )


_ACTIVATIONS = ("hidden_act", "activation_function", "hidden_activation", "activation", "dense_act_fn")


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    found = (config.get(name) for name in names)
    return next((each for each in found if isinstance(each, int) and each > 0), None)


def work_of(node: Node, facts: Facts, element: int) -> Work:
    """What a forward of `node` computes; `element`: bytes of an activation's element."""
    products, attention = [], []
    traffic, chained, launches = 0.0, 0.0, 0

    def count(kind: tuple[int, int], width: int) -> None:
        nonlocal traffic, launches
        launches += kind[0]
        traffic += width * kind[1] * element

    for each in node.walk():
        names = {held.name for held in each.own}
        last = each.name.rpartition(".")[2]
        for held in each.own:
            if each.looked_up and len(held.shape) == 2:
                count(_COPY, held.shape[1])
            elif (product := _product(held)) is not None:
                products.append(product)
                launches += 1
                out = held.shape[-2] if held.packed or "bias" not in names else _bias(each)
                name = held.name if product.experts else last
                if _QUERY.match(name):
                    width = facts.attention or (out if not _fused(name) else out // 3)
                    attention.append((width, facts.causal or "decoder" in each.name))
                    launches += _SDPA
                    count(_COPY, width)
                if facts.rotary and (_QUERY.match(name) or _KEY.match(name)):
                    launches += _ROTATED[0]
                    chained += out * _ROTATED[1] * element
                if _WIDENS.match(name):
                    _activated(name, out, facts, count)
            elif len(held.shape) == 1 and held.name == "weight":
                count(_ADD, held.shape[0])
                if "bias" in names or facts.fused_norm:
                    count(_LAYER_NORM, held.shape[0])
                else:
                    launches += _RMS_LAUNCHES
                    chained += held.shape[0] * _rms_bytes(element)
    return Work(tuple(products), tuple(attention), traffic, chained, launches, node.nbytes)


def chain_bytes(element: int) -> int:
    """What is counted, of each number, of an RMSNorm and a rotary embedding."""
    return _rms_bytes(element) + _ROTATED[1] * element


def _rms_bytes(element: int) -> int:
    return _RMS_BYTES_HALF if element < 4 else _RMS_BYTES


def _activated(name: str, out: int, facts: Facts, count: Any) -> None:
    """Between a feed-forward's products: the activation, and with a gate a product of two."""
    if _GATE.match(name):
        count(_GATED, out if name != "gate_up_proj" else out // 2)
    elif name not in ("up_proj", "w3", "wi_1") or facts.activation in _WRITTEN_OUT:
        count(_WRITTEN_OUT_COST if facts.activation in _WRITTEN_OUT else _COPY, out)


def _fused(name: str) -> bool:
    return not re.match(r"^(q|q_proj|query)$", name, re.IGNORECASE)


def _bias(node: Node) -> int:
    return next(held.shape[-1] for held in node.own if held.name == "bias")


def _product(held: Held) -> Product | None:
    """The product that is made with a parameter, if it is a matrix."""
    if len(held.shape) < 2 or _SCALES.search(held.name):
        return None
    experts = held.shape[0] if len(held.shape) == 3 else 0
    numel = 2 * held.numel * held.bits // 8 if held.packed else held.numel
    dtype = held.dtype if held.floats or held.packed else UNKNOWN
    return Product(numel, held.stored.nbytes, dtype, held.packed, experts)


def seconds(work: Work, tokens: int, length: int, rates: Rates, top_k: int) -> tuple[float, float] | None:
    """Of the device, and of the host that launches; None where a rate that it takes is not known."""
    taken = 0.0
    for product in work.products:
        rows, share = float(tokens), 1.0
        if product.experts:
            rows = tokens * top_k / product.experts
            share = 1 - (1 - 1 / product.experts) ** (tokens * top_k)  # of the experts, that some token meets
        found = rates.product_s(max(rows, 1.0), product.numel, product.dtype, fp4=product.fp4)
        if found is None:
            return None
        found *= min(rows, 1.0) if product.experts else 1.0
        taken += max(found, share * product.nbytes / (rates.memory_gbps * 1e9) if rates.memory_gbps else 0.0)
    for width, causal in work.attention:
        if rates.attention_tflops:
            taken += (2 if causal else 4) * tokens * length * width / (rates.attention_tflops * 1e12)
    if rates.memory_gbps:
        chains = rates.chain_gbps or rates.memory_gbps
        taken += (work.traffic / rates.memory_gbps + work.chained / chains) * tokens / 1e9
    return taken, work.launches * (rates.launch_s or 0.0)
