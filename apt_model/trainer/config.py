"""What a training run is told. Imports no torch, so that the command line can show it at once."""

from dataclasses import dataclass, field
from typing import Literal

from apt_model.core.options import check_types, require
from apt_model.modeling.configuration import APTModelConfiguration


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    source: str = "stdlib"
    """'stdlib' (the running Python's own library), or a text file, a folder of text, or a .jsonl file."""
    task: Literal["causal", "seq2seq"] = "causal"
    """causal: predict the next token of text; seq2seq: from pairs (stdlib: a function's body and its docstring)."""
    include_tests: bool = False
    """With 'stdlib': its test suites too (about 31 MB instead of 12)."""
    suffixes: str = ".py,.md,.txt,.rst"
    """With a folder: which files are text, by ending, separated by commas."""
    holdout: float = 0.04
    """Share of the files (of the text, when there is one file) kept for evaluation, chosen by a hash of their names."""
    tokenizer: str | None = None
    """A tokenizer.json to use; None trains one on the training split with the model's vocab_size."""
    seq_len: int = 256
    """Tokens in a causal window, and at most in a source sequence."""
    target_len: int = 48
    """Tokens at most in a target sequence (seq2seq)."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first value that cannot be met."""
        check_types(self)
        require(0 < self.holdout < 1, "DataConfig.holdout", "0 < holdout < 1", self.holdout)
        require(self.seq_len >= 2, "DataConfig.seq_len", "at least 2", self.seq_len)
        require(self.target_len >= 2, "DataConfig.target_len", "at least 2", self.target_len)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule: linear warm-up, then a cosine to a share of the peak."""

    lr: float = 1e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """The last step's learning rate as a share of the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only (not on embeddings, norms, gates and scales)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first value that cannot be met."""
        check_types(self)
        for name in ("lr", "eps"):
            require(getattr(self, name) > 0, f"OptimizerConfig.{name}", "above 0", getattr(self, name))
        for name in ("weight_decay", "warmup_steps"):
            require(getattr(self, name) >= 0, f"OptimizerConfig.{name}", "0 or more", getattr(self, name))
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"OptimizerConfig.{name}", "in [0, 1)", getattr(self, name))
        require(0 <= self.min_lr_ratio <= 1, "OptimizerConfig.min_lr_ratio", "in [0, 1]", self.min_lr_ratio)


@dataclass(frozen=True, kw_only=True)
class GradientConfig:
    """What `use_dbc_dac` does to gradients before the optimizer sees them."""

    clipping: Literal["global", "adagc", "zclip"] = "global"
    """global: by the norm of all; adagc: each tensor by its own running norm; zclip: outliers of the global norm."""
    max_norm: float = 1.0
    """Bound of the global norm (global, and while adagc and zclip warm up)."""
    rank_ratio: float = 0.0
    """Low-rank compression of hidden matrices: rank as a share of the smaller side; 0 sends gradients whole."""
    row_balance: bool = False
    """Compression: divide rows by their L1 norms first (guarded, so that it never expands)."""
    error_feedback: bool = True
    """Compression: what was left out is added to the next gradient."""
    refresh_steps: int = 200
    """Compression: steps between restarts of the projection from noise."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first value that cannot be met."""
        check_types(self)
        require(self.max_norm > 0, "GradientConfig.max_norm", "above 0", self.max_norm)
        require(0 <= self.rank_ratio <= 1, "GradientConfig.rank_ratio", "in [0, 1]", self.rank_ratio)
        require(self.refresh_steps >= 1, "GradientConfig.refresh_steps", "at least 1", self.refresh_steps)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, whole: saved with the run as train.json."""

    out: str = "runs/default"
    """Folder of the run: configuration, tokenizer, metrics, checkpoints, curve."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`; without it, a folder that holds a run is refused."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences in a micro-batch."""
    grad_accumulation: int = 1
    """Micro-batches in a step."""
    seed: int = 0
    """Everything random in a run follows from it."""
    device: str = "auto"
    """Where to train: auto, cpu, cuda, hpu, npu, xpu, or one with a number, such as cuda:1."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 autocast over fp32 weights, or fp32; auto takes bf16 where the device computes in it."""
    compile: bool = False
    """torch.compile the model."""
    activation_checkpointing: bool = False
    """Recompute each layer in backward instead of keeping its activations."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl and on the screen."""
    eval_every: int = 200
    """Steps between evaluations on held-out text; 0 leaves only the last one."""
    eval_tokens: int = 16384
    """Held-out tokens in such an evaluation (`apt-model eval` takes them all)."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    max_skipped: int = 10
    """Stop when so many steps in a row had gradients that were not finite."""
    divergence_margin: float = 1.5
    """Stop when the smoothed loss is this many nats above its best for 50 steps."""
    tensorboard: Literal["auto", "on", "off"] = "auto"
    """Also write TensorBoard events; auto does when it is installed."""
    plot: Literal["auto", "on", "off"] = "auto"
    """Draw the loss curve (curve.png) at the end; auto does when matplotlib is installed."""
    model: APTModelConfiguration = field(default_factory=APTModelConfiguration)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first value that cannot be met."""
        check_types(self)
        for name in ("steps", "batch_size", "grad_accumulation", "log_every", "eval_tokens", "checkpoint_every"):
            require(getattr(self, name) >= 1, f"TrainConfig.{name}", "at least 1", getattr(self, name))
        for name in ("keep_checkpoints", "max_skipped"):
            require(getattr(self, name) >= 1, f"TrainConfig.{name}", "at least 1", getattr(self, name))
        require(self.eval_every >= 0, "TrainConfig.eval_every", "0 or more", self.eval_every)
        require(self.divergence_margin > 0, "TrainConfig.divergence_margin", "above 0", self.divergence_margin)
        longest = self.data.seq_len if self.data.task == "causal" else max(self.data.seq_len, self.data.target_len)
        require(
            longest <= self.model.max_seq_len,
            "TrainConfig.data.seq_len",
            f"at most model.max_seq_len = {self.model.max_seq_len}",
            longest,
        )
        require(
            self.data.task == "causal" or self.model.is_encoder_decoder,
            "TrainConfig.data.task",
            "'causal' for a decoder_only model",
            self.data.task,
            "--model.no-decoder-only builds an encoder",
        )
