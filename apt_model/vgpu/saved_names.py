"""What transformers makes of the names in a saved model's files: order, ties, fused experts, buffers. Pure.

A file has its tensors by the alphabet, a tied one once, and experts one by one. A model has its modules in the order
in which they are made, and that is the order in which blocks are planned.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Saved(NamedTuple):
    """A tensor of a file."""

    dtype: str
    shape: tuple[int, ...]


# Siblings stand in this order where their names say something, and by the alphabet (numbers by value) where not.
_ORDER = tuple(
    re.compile(pattern)
    for pattern in (
        r"^(shared|wte|embed_tokens|tok_embeddings|word_embeddings?|embed_in|embeddings?)$",
        r"^conv\d?$",
        r"^(wpe|embed_positions|position_embeddings)$",
        r"embed",
        r"^(ln_?1|norm1|layer_norm1)$",
        r"^(vision|visual|audio)",
        r"^self$|^(self_?)?att(n|ention)$",
        r"^(ln_?2|norm2|layer_norm2)$",
        r"cross_?att|encoder_attn|encdecatt",
        r"^(q|q_proj|query|c_attn|qkv|qkv_proj|query_key_value|in_proj)$",
        r"^(k|k_proj|key)$",
        r"^(v|v_proj|value)$",
        r"^(gate|router)$",
        r"^experts$",
        r"^(gate_proj|gate_up_proj|w1|wi_0)$",
        r"^(up_proj|w3|wi_1|wi|c_fc|fc1)$",
        r"^(model|transformer|bert|roberta|gpt_neox|base_model|language_model)$",
        r"^encoder",
        r"^(layers?|h|blocks?|transform)$",
        r"^decoder",
        r"",  # all others
        r"^(mlp|feed_forward|intermediate|densereludense|block_sparse_moe|shared_expert)$",
        r"^(o|o_proj|out_proj|down_proj|w2|wo|c_proj|fc2|dense|relative_attention_bias|shared_expert_gate)$",
        r"^output$",
        r"norm|^ln_",
        r"^(pooler|body|self_value)$",
        r"^(lm_head|embed_out|cls|classifier|score|qa_outputs)$",
    )
)
_OTHERS = next(i for i, pattern in enumerate(_ORDER) if not pattern.pattern)
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$")
_PARTS = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}
_WITH_HEAD = re.compile(r"ForCausalLM|LMHead|ForConditionalGeneration")
_TOKENS = re.compile(r"(^|\.)(embed_tokens|wte|shared|word_embeddings|embed_in|tok_embeddings)\.weight$")
# Left over from older versions, made anew or not used by today's.
_LEFT_OVER = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias)$")
_BUFFER = re.compile(r"(running_mean|running_var|num_batches_tracked|position_ids|final_logits_bias)$")


def rank(name: str) -> tuple[int, list[tuple[int, str]]]:
    """A key by which siblings are put in order."""
    small = name.lower()
    special = next((i for i, each in enumerate(_ORDER) if i != _OTHERS and each.search(small)), _OTHERS)
    return special, [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", small)]


def left_over(name: str, tensor: Saved) -> bool:
    """Whether a model of today takes this tensor for nothing."""
    return bool(_LEFT_OVER.search(name)) or (name.endswith("attn.bias") and len(tensor.shape) == 4)


def is_buffer(name: str) -> bool:
    """Whether a tensor of the file is no parameter, and stays on level 1."""
    return bool(_BUFFER.search(name))


def fused(tensors: Mapping[str, Saved]) -> dict[str, Saved]:
    """The tensors with experts as transformers 5 has them: `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I]."""
    groups: dict[str, dict[str, list[Saved]]] = defaultdict(lambda: defaultdict(list))
    for name, tensor in tensors.items():
        if match := _EXPERT.match(name):
            groups[match[1]][_PARTS[match[3]]].append(tensor)
    whole = {owner: parts for owner, parts in groups.items() if _alike(parts)}
    found = {
        name: tensor for name, tensor in tensors.items()
        if not ((match := _EXPERT.match(name)) and match[1] in whole)
    }  # fmt: skip
    for owner, parts in whole.items():
        (count, up, down) = len(parts["up"]), parts["up"][0], parts["down"][0]
        found[f"{owner}.gate_up_proj"] = Saved(up.dtype, (count, 2 * up.shape[0], up.shape[1]))
        found[f"{owner}.down_proj"] = Saved(down.dtype, (count, *down.shape))
    return found


def _alike(parts: Mapping[str, list[Saved]]) -> bool:
    """Whether every expert has the same three matrices."""
    return len(parts) == 3 and len({len(each) for each in parts.values()}) == 1 and all(
        len(set(each)) == 1 and len(each[0].shape) == 2 for each in parts.values()
    )  # fmt: skip


def ties(tensors: Mapping[str, Saved], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Parameters that are others' too: the name in the model, and the name of the one that is in the file."""
    tokens = next((name for name in tensors if _TOKENS.search(name)), None)
    for name in tensors:
        if name.endswith("shared.weight"):
            prefix = name.removesuffix("shared.weight")
            for side in ("encoder", "decoder"):
                inside = f"{prefix}{side}.embed_tokens.weight"
                if inside not in tensors and any(each.startswith(f"{prefix}{side}.") for each in tensors):
                    yield inside, name
        if name.endswith("cls.predictions.bias"):
            yield f"{name.removesuffix('bias')}decoder.bias", name
            if tokens and f"{name.removesuffix('bias')}decoder.weight" not in tensors:
                yield f"{name.removesuffix('bias')}decoder.weight", tokens
    head = "lm_head.weight"
    if tokens and (head in tensors or _WITH_HEAD.search(str((config.get("architectures") or [""])[0]))):
        asked = head not in tensors or config.get("tie_word_embeddings") is True
        if asked and tensors.get(head, tensors[tokens]).shape == tensors[tokens].shape:
            yield head, tokens


def made_buffers(config: Mapping[str, Any]) -> int:
    """Bytes of buffers that a model makes when it is built, as far as its configuration tells them."""
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if config.get("model_type") == "apt":  # a table of rotations: cosines and sines
        return 2 * 4 * int(config.get("max_seq_len", 2048)) * int(config.get("d_model", 512)) // int(
            config.get("num_heads", 8)
        )  # fmt: skip
    if config.get("model_type") in ("bert", "roberta", "xlm-roberta", "camembert", "electra"):
        return 2 * 8 * int(config.get("max_position_embeddings", 512))  # positions and token types
    rotary = any(config.get(name) for name in ("rope_theta", "rope_parameters", "rope_scaling"))
    if rotary and isinstance(width, int) and isinstance(heads, int):
        return 2 * 4 * int(config.get("head_dim") or width // heads) // 2  # frequencies, twice
    return 0
