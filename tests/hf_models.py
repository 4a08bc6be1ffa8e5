"""Tiny transformers models with random weights, in folders, as `from_pretrained` takes them."""

import transformers as tf
from small_models import noise

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
LLAMA = {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 64}
TIED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(**options):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, **TIED, **options))


def mixtral():
    return tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, **TIED, num_local_experts=4, num_experts_per_tok=2))


def qwen_moe():
    options = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4}
    return tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**LLAMA, **TIED, **options, num_experts_per_tok=2))


def t5():
    config = tf.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    return tf.T5ForConditionalGeneration(config)


def bart():
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder")
             for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))}  # fmt: skip
    return tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=64, d_model=32, max_position_embeddings=64, **sides, **TIED)
    )


def gpt2():
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    )


MODELS = {"dense": llama, "tied": lambda: llama(tie_word_embeddings=True), "mixtral": mixtral, "qwen_moe": qwen_moe,
          "t5": t5, "bart": bart, "gpt2": gpt2}  # fmt: skip


def ids(model, count=2, length=9):
    """Inputs for `model`, by name."""
    tokens = noise(count, length, seed=3).mul(100).long().abs() % 61 + 3
    both = {"decoder_input_ids": tokens[:, :5]} if model.config.is_encoder_decoder else {}
    return {"input_ids": tokens, **both}
