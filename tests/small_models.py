"""Models small enough to run in milliseconds, and the random inputs they take."""

import torch

from apt_model.modeling.apt_model import APTModel, APTModelConfiguration

VOCAB = 37
SHAPE = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "d_ff": 64,
    "max_seq_len": 64,
}
# What a model may be made of: each mechanism, place of the norm, activation and output projection.
VARIANTS = {
    "plain": {"use_left_spin": False, "use_autopoietic": False},
    "design": {},
    "design-post-swiglu-tied": {"norm_position": "post", "activation": "swiglu", "tie_word_embeddings": True},
    "trust": {"left_spin_mode": "trust", "activation": "swiglu"},
    "trust-post": {"left_spin_mode": "trust", "norm_position": "post", "tie_word_embeddings": True},
    "guard": {"left_spin_mode": "guard", "left_spin_tau": 0.1, "tie_word_embeddings": True},
    "full-gradient": {"left_spin_detach": False, "left_spin_beta": 1.0, "norm_position": "post"},
}

# Three ways to use a model: a causal one, the decoder of an encoder-decoder alone, and source to target.
USES = ("causal", "decoder alone", "seq2seq")


def build(seed=0, *, started=True, **options):
    """A model drawn from `seed`; `started` gives the parameters that begin at zero or one other values too."""
    torch.manual_seed(seed)
    model = APTModel(APTModelConfiguration(**{**SHAPE, **options}))
    if started:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "self_value" in name or parameter.ndim == 1:
                    parameter.add_(0.3 * noise(*parameter.shape, seed=len(name)))
                elif name.endswith("in_proj.weight") and options.get("use_autopoietic", True):
                    unused = model.get_submodule(name.rpartition(".in_proj")[0]).padding_rows
                    parameter[-unused - model.config.num_heads : len(parameter) - unused].normal_(0, 0.3)
    return model


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(*shape, seed=0, low=0, high=VOCAB):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def model_for(use, variant="design", **options):
    return build(decoder_only=use == "causal", **{**VARIANTS[variant], **options})


SOURCE = tokens(3, 7, seed=1)


def call(model, use, ids, source=SOURCE, **masks):
    return model(source[: len(ids)], ids, **masks) if use == "seq2seq" else model(ids, **masks)
