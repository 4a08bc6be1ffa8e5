"""Ready-made runs. Imports no torch."""

from apt_model.core.options import unknown_name
from apt_model.modeling.configuration import APTModelConfiguration
from apt_model.trainer.config import DataConfig, OptimizerConfig, TrainConfig

PRESETS: dict[str, TrainConfig] = {
    # Two CPU cores, a few minutes: what `make demo` trains.
    "tiny": TrainConfig(
        steps=800,
        batch_size=8,
        model=APTModelConfiguration(
            vocab_size=4096,
            d_model=256,
            num_decoder_layers=4,
            num_heads=4,
            d_ff=704,
            activation="swiglu",
            max_seq_len=512,
            decoder_only=True,
        ),
        data=DataConfig(seq_len=256),
        optimizer=OptimizerConfig(lr=4e-3, warmup_steps=40),
        eval_every=200,
        checkpoint_every=200,
    ),
    # The same size as an encoder-decoder, on functions and their docstrings.
    "tiny-seq2seq": TrainConfig(
        steps=600,
        batch_size=32,
        model=APTModelConfiguration(
            vocab_size=4096,
            d_model=256,
            num_encoder_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            d_ff=704,
            activation="swiglu",
            max_seq_len=512,
        ),
        data=DataConfig(task="seq2seq", seq_len=256, holdout=0.1),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=40),
        eval_every=200,
        checkpoint_every=200,
    ),
    # The mission's encoder-decoder, for one GPU.
    "mission": TrainConfig(
        steps=10000,
        batch_size=32,
        compile=True,
        model=APTModelConfiguration(
            vocab_size=30522,
            d_model=768,
            num_encoder_layers=12,
            num_decoder_layers=12,
            num_heads=12,
            d_ff=3072,
            max_seq_len=512,
        ),
        data=DataConfig(task="seq2seq", seq_len=512, target_len=64, include_tests=True),
        optimizer=OptimizerConfig(lr=5e-4, warmup_steps=500),
    ),
}


def preset(name: str) -> TrainConfig:
    """The run called `name`; `ConfigError` that lists the names when there is none."""
    if name not in PRESETS:
        raise unknown_name(name, PRESETS, "--preset")
    return PRESETS[name]
