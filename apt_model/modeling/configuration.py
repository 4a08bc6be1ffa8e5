"""The configuration of an APT model. Imports no torch, so that the command line can show it at once."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from apt_model.core.errors import CheckpointError
from apt_model.core.files import write_text
from apt_model.core.fp4_storage import QUANTIZATION_CONFIG
from apt_model.core.options import check_types, from_dict, require

CONFIG_FILE = "config.json"
MODEL_TYPE = "apt"
# Written into config.json beside the options, and not options themselves.
_STAMPS = ("model_type", "architectures", "apt_version", QUANTIZATION_CONFIG)


@dataclass(frozen=True, kw_only=True)
class APTModelConfiguration:
    """Shape and mechanisms of an `APTModel`.

    With `decoder_only` the model is a causal language model over the decoder stack; otherwise it is an encoder-decoder
    that can also run its decoder alone. Unknown names and values that cannot be met raise `ConfigError`.
    """

    vocab_size: int = 32000
    """Number of token ids."""
    d_model: int = 512
    """Width of the residual stream."""
    num_encoder_layers: int = 6
    """Encoder layers (two residuals each: attention, feed-forward)."""
    num_decoder_layers: int = 6
    """Decoder layers (three residuals each: attention, cross-attention, feed-forward)."""
    num_heads: int = 8
    """Attention heads; d_model / num_heads is a head's width and must be even."""
    d_ff: int = 2048
    """Width of the feed-forward's hidden layer."""
    max_seq_len: int = 2048
    """Positions the model is built for; a longer sequence is refused."""
    decoder_only: bool = False
    """Build no encoder and no cross-attention: a causal language model."""
    dropout: float = 0.0
    """Probability of dropping an element of a sublayer's output, while training."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Feed-forward: two matrices and GELU, or three and a gated SiLU."""
    norm_position: Literal["pre", "post"] = "pre"
    """RMSNorm before each sublayer, or after each residual."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    tie_word_embeddings: bool = False
    """The output projection is the embedding matrix, logits scaled by 1/sqrt(d_model)."""
    pad_token_id: int | None = None
    """Id that pads a batch; source positions that hold it are masked unless a mask is given."""
    bos_token_id: int | None = None
    """Id that starts a target sequence when generating from a source."""
    eos_token_id: int | None = None
    """Id that ends a generated sequence."""
    use_autopoietic: bool = True
    """Add the gated low-rank self-value to every attention."""
    sr_ratio: float = 4.0
    """Self-value's rank is max(4, d_model / sr_ratio)."""
    autopoietic_alpha: float = 0.1
    """Scale of the self-value."""
    use_left_spin: bool = True
    """Gate the step of every residual by its size relative to the stream."""
    left_spin_mode: Literal["design", "trust", "guard"] = "design"
    """design: the mission's formula; trust: smooth trust region with a learned branch scale; guard: plain below tau."""
    left_spin_alpha: float | None = None
    """Strength. None: 0.5 in design, sqrt(sublayers)/2 in trust, min(0.5, 1/tau) in guard (the most it takes)."""
    left_spin_tau: float | None = None
    """Threshold on the relative step, in design (None: 0.3) and in guard (required there)."""
    left_spin_beta: float = 0.7
    """Design: share of this sublayer's angle in the running angle; 1 keeps no inertia."""
    left_spin_w1: float = 1.0
    """Design: weight of the relative step in the score."""
    left_spin_w2: float = 0.5
    """Design: weight of the change of step between neighbouring sublayers in the score."""
    left_spin_detach: bool = True
    """Stop the gradient at the gate."""
    use_dbc_dac: bool = True
    """The trainer treats gradients (finite check, clipping, optional low-rank compression) before the optimizer."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first value that cannot be met."""
        check_types(self)
        name = type(self).__name__
        for field, value in self.to_dict().items():
            require(not isinstance(value, float) or math.isfinite(value), f"{name}.{field}", "a finite number", value)
        for field in ("vocab_size", "d_model", "num_heads", "d_ff", "max_seq_len", "num_decoder_layers"):
            require(getattr(self, field) >= 1, f"{name}.{field}", "at least 1", getattr(self, field))
        require(
            self.decoder_only or self.num_encoder_layers >= 1,
            f"{name}.num_encoder_layers",
            "at least 1 in an encoder-decoder",
            self.num_encoder_layers,
            "decoder_only=True builds a model without an encoder",
        )
        width, rest = divmod(self.d_model, self.num_heads)
        require(
            rest == 0 and width % 2 == 0,
            f"{name}.d_model",
            f"a multiple of 2 * num_heads = {2 * self.num_heads} (rotary positions turn pairs)",
            self.d_model,
        )
        require(0 <= self.dropout < 1, f"{name}.dropout", "0 <= dropout < 1", self.dropout)
        for field in ("norm_eps", "rope_theta", "sr_ratio"):
            require(getattr(self, field) > 0, f"{name}.{field}", "above 0", getattr(self, field))
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            require(
                value is None or 0 <= value < self.vocab_size, f"{name}.{field}", f"0..{self.vocab_size - 1}", value
            )
        self._check_left_spin(name)

    def _check_left_spin(self, name: str) -> None:
        if self.left_spin_alpha is not None:
            require(
                self.left_spin_alpha > 0,
                f"{name}.left_spin_alpha",
                "above 0",
                self.left_spin_alpha,
                "use_left_spin=False gives the plain residual",
            )
        require(0 < self.left_spin_beta <= 1, f"{name}.left_spin_beta", "0 < beta <= 1", self.left_spin_beta)
        if self.left_spin_mode == "guard" and self.use_left_spin:
            require(
                self.left_spin_tau is not None and self.left_spin_tau > 0,
                f"{name}.left_spin_tau",
                "a threshold above 0 in guard mode",
                self.left_spin_tau,
                "take 1.25 times the 99.9th percentile of |delta|/|u| over a batch of your data",
            )
            alpha, tau = self.resolve_left_spin(1)
            require(
                alpha <= 1 / tau,
                f"{name}.left_spin_alpha",
                f"at most 1 / left_spin_tau = {1 / tau:g} in guard mode (above it a longer step comes out shorter)",
                alpha,
                "leave it out",
            )
        if self.left_spin_mode == "trust" and self.use_left_spin:
            require(self.left_spin_tau is None, f"{name}.left_spin_tau", "None in trust mode", self.left_spin_tau)
        for field, neutral in (("left_spin_beta", 0.7), ("left_spin_w1", 1.0), ("left_spin_w2", 0.5)):
            value = getattr(self, field)
            require(
                self.left_spin_mode == "design" or value == neutral,
                f"{name}.{field}",
                f"{neutral}, its default, outside design mode (it has no meaning there)",
                value,
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads

    @property
    def autopoietic_rank(self) -> int:
        """Rank of the self-value."""
        return max(4, int(self.d_model / self.sr_ratio))

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an encoder."""
        return not self.decoder_only

    @property
    def num_encoder_sublayers(self) -> int:
        """Residuals along the encoder."""
        return 0 if self.decoder_only else 2 * self.num_encoder_layers

    @property
    def num_decoder_sublayers(self) -> int:
        """Residuals along the decoder."""
        return (2 if self.decoder_only else 3) * self.num_decoder_layers

    def resolve_left_spin(self, num_sublayers: int) -> tuple[float, float]:
        """The strength and the threshold in force in a stack of `num_sublayers` residuals."""
        alpha, tau = self.left_spin_alpha, self.left_spin_tau
        if tau is None:
            tau = 0.3 if self.left_spin_mode == "design" else 0.0
        if alpha is None and self.left_spin_mode == "trust":
            alpha = math.sqrt(num_sublayers) / 2
        elif alpha is None:
            alpha = 1 / tau if self.left_spin_mode == "guard" and tau > 2 else 0.5
        return alpha, tau

    def replace(self, **changes: Any) -> "APTModelConfiguration":
        """A copy with some options changed."""
        return from_dict(type(self), {**self.to_dict(), **changes})

    def plain(self) -> "APTModelConfiguration":
        """The same model without left spin, autopoietic attention and DBC-DAC."""
        return self.replace(use_left_spin=False, use_autopoietic=False, use_dbc_dac=False)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "APTModelConfiguration":
        """Make it from plain values; an unknown name raises `ConfigError` that names the nearest known one."""
        return from_dict(cls, {name: value for name, value in values.items() if name not in _STAMPS})

    def save(self, directory: Path, **more: Any) -> None:
        """Write `config.json` into `directory`, whole or not at all, with `more` beside the options."""
        from apt_model import __version__  # noqa: PLC0415 - only here, and the package imports us lazily

        stamps = {"model_type": MODEL_TYPE, "architectures": ["APTModel"], "apt_version": __version__}
        write_text(directory / CONFIG_FILE, json.dumps({**stamps, **self.to_dict(), **more}, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "APTModelConfiguration":
        """Read `config.json`. Raises `CheckpointError` when it is missing, not JSON, or of another kind of model."""
        path = directory / CONFIG_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{directory} holds no {CONFIG_FILE}: it is not a saved model",
                remedy="give a folder that save_pretrained wrote, or a step folder of a run",
            ) from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        kind = values.get("model_type") if isinstance(values, dict) else None
        if kind != MODEL_TYPE:
            raise CheckpointError(f"{path} describes a model of type {kind!r}, not {MODEL_TYPE!r}")
        return cls.from_dict(values)
