"""Architectures that stacks stream, tiny and with random weights, each with a call that gives its outputs."""

import small_models
import transformers as tf
from hf_models import LLAMA, TIED, ids

SIZES = {**LLAMA, **TIED, "num_hidden_layers": 4}
TOKENS = small_models.tokens(2, 9, seed=3, low=3, high=60)
IMAGE = small_models.noise(2, 3, 16, 16, seed=4)
SOUND = small_models.noise(2, 8, 40, seed=5)


def gpt2():
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=2, n_positions=64, **TIED))


def llama(**options):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **options))


def mixtral():
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def t5():
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2, decoder_start_token_id=0)
    )


def bert():
    return tf.BertForMaskedLM(tf.BertConfig(**{**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}))


def vit():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5))


def whisper():
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder")
             for name, value in (("layers", 3), ("attention_heads", 2), ("ffn_dim", 64))}  # fmt: skip
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=64, num_mel_bins=8, d_model=32, max_source_positions=20, max_target_positions=32,
            decoder_start_token_id=1, **TIED, **sides,
        )
    )  # fmt: skip


def logits(model):
    return [model(**ids(model)).logits]


ZOO = {
    "gpt2": (gpt2, logits),
    "llama": (llama, logits),
    "llama tied": (lambda: llama(tie_word_embeddings=True), logits),
    "mixtral": (mixtral, logits),
    "t5": (t5, logits),
    "t5 generates": (t5, lambda model: [model.generate(TOKENS, max_new_tokens=6, do_sample=False)]),
    "bert": (bert, lambda model: [model(input_ids=TOKENS).logits]),
    "vit": (vit, lambda model: [model(pixel_values=IMAGE).logits]),
    "whisper": (whisper, lambda model: [model(input_features=SOUND, decoder_input_ids=TOKENS[:, :5]).logits]),
    "apt seq2seq": (lambda: small_models.model_for("seq2seq"), lambda model: [model(TOKENS % 37, TOKENS[:, :5] % 37)]),
    "apt causal": (lambda: small_models.model_for("causal"), lambda model: [model(TOKENS % 37)]),
}  # fmt: skip
