"""The APT model: pre-norm transformer, encoder-decoder or decoder-only.

- RMSNorm without bias, rotary positions, no biases in the matrices, GELU or SwiGLU;
- autopoietic attention: SDPA plus a gated low-rank function of the query's own input;
- left spin: a gate on the step of each residual, 2 an encoder layer, 3 a decoder layer, whose state runs along depth;
- one mask convention: True = may be attended to.

# Shape suffix legend
#   B = batch, S = source positions, T = target positions, D = d_model, V = vocab_size
"""

import contextlib
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apt_model.core.errors import ConfigError, InputError, SequenceLengthError
from apt_model.core.policy import Policy, current_policy
from apt_model.core.system import get_device_manager
from apt_model.layers.attention import AttentionCache, AutopoieticAttention
from apt_model.layers.left_spin import LeftSpinResidual, LeftSpinState
from apt_model.layers.norm import RMSNorm
from apt_model.layers.rope import RotaryTable
from apt_model.modeling import generation, pretrained
from apt_model.modeling.blocks import DecoderCache, DecoderLayer, EncoderLayer, activation_bytes
from apt_model.modeling.configuration import APTModelConfiguration
from apt_model.modeling.generation_config import GenerationConfig

__all__ = ["APTModel", "APTModelConfiguration"]


class APTModel(nn.Module):
    """Encoder-decoder `model(src_tokens, tgt_tokens)`, or causal language model `model(input_ids)`.

    A model built while `vb.enable()` is in force follows its policy (`model.policy`): autocast and checkpointing.

    Raises:
        SequenceLengthError: more positions than `config.max_seq_len`.
        InputError: token ids or masks of the wrong shape or type.
    """

    def __init__(self, config: APTModelConfiguration) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.apply_policy(current_policy())
        # The modules' own draws are replaced below, and must not move the generator that those start from.
        with torch.random.fork_rng(devices=[]):
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            self.rotary = RotaryTable(config.max_seq_len, config.head_dim, config.rope_theta)
            self.dropout = nn.Dropout(config.dropout)
            final = RMSNorm if config.norm_position == "pre" else nn.Identity
            if config.is_encoder_decoder:
                self.encoder_layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))
                self.encoder_norm = final(config.d_model, eps=config.norm_eps)
            self.decoder_layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))
            self.decoder_norm = final(config.d_model, eps=config.norm_eps)
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights from torch's global seed: embeddings N(0, 1), matrices N(0, 1 / inputs), the term at zero.

        Each matrix draws from a generator of its own, named after it, so that models which differ in a mechanism start
        from the same values in what they share.
        """
        if self.embedding.weight.is_meta:
            return
        self.rotary.fill(self.embedding.weight.device)
        seed = int(torch.randint(2**62, (), device="cpu"))
        _draw(self.embedding.weight, 1.0, seed, "embedding")
        for name, module in self.named_modules():
            if isinstance(module, AutopoieticAttention):
                module.reset_gate()
            elif isinstance(module, nn.Linear) and not name.endswith("self_value"):
                rows = self._drawn_rows(name, module)
                module.weight.zero_()
                for part, (start, stop) in rows.items():
                    _draw(module.weight[start:stop], module.in_features**-0.5, seed, part)
            elif isinstance(module, (RMSNorm, LeftSpinResidual)):
                module.reset_parameters()

    def _drawn_rows(self, name: str, linear: nn.Linear) -> dict[str, tuple[int, int]]:
        """Which rows of a matrix are drawn, by the name of their generator; the others start at zero."""
        owner = self.get_submodule(name.rpartition(".")[0])
        if not name.endswith("in_proj") or not isinstance(owner, AutopoieticAttention):
            return {name: (0, linear.out_features)}
        heads = sum(owner.widths[:1] if owner.cross else owner.widths[:3])
        if not owner.autopoietic:
            return {name: (0, heads)}
        return {name: (0, heads), f"{name}.self_value": (heads, heads + owner.rank)}

    def hidden_matrices(self) -> list[tuple[str, nn.Parameter]]:
        """The weight matrices between the embedding and the output projection, by name."""
        return [
            (name, parameter)
            for name, parameter in self.named_parameters()
            if parameter.ndim == 2 and not name.startswith(("embedding.", "lm_head."))
        ]

    def num_parameters(self) -> int:
        """Parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each layer in backward instead of keeping its activations."""
        self.activation_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for backward."""
        self.activation_checkpointing = False

    def apply_policy(self, policy: Policy | None) -> None:
        """Follow `policy` from the next forward on; None follows none."""
        self.policy = policy
        # Read now, not in forward: torch.compile takes them as constants.
        self._machine = {} if policy is None else _machine()

    def forward(
        self,
        src_tokens: Tensor,
        tgt_tokens: Tensor | None = None,
        *,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token at every target position.

        Args:
            src_tokens: source ids [B, S] with `tgt_tokens`; alone, the ids [B, T] of a causal language model.
            tgt_tokens: target ids [B, T]; position t is predicted from the source and targets up to t.
            src_mask: bool, the shape of `src_tokens`, True where it may be attended to. Without it, source positions
                that hold `pad_token_id` are masked when the configuration names one; a causal language model masks
                nothing, as padding on the right is in every token's future.
            tgt_mask: bool [B, T], the same for the target.

        Returns:
            [B, T, V], in the autocast type under autocast, else in the parameters' type.
        """
        with self.precision(src_tokens.device):
            if tgt_tokens is None:
                if tgt_mask is not None:
                    raise InputError("tgt_mask without tgt_tokens: a causal language model's mask is src_mask")
                return self.decode(src_tokens, tgt_mask=src_mask)
            memory, src_mask = self.encode(src_tokens, src_mask)
            return self.decode(tgt_tokens, memory=memory, memory_mask=src_mask, tgt_mask=tgt_mask)

    def encode(self, src_tokens: Tensor, src_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Encode the source: ids [B, S] -> memory [B, S, D] and the mask in force, bool [B, S] or None."""
        if self.config.decoder_only:
            raise ConfigError("a decoder_only model has no encoder: it takes model(input_ids)")
        self._check_tokens("src_tokens", src_tokens, past=0)
        src_mask = self._source_mask(src_tokens, src_mask)
        u, state = self._embed(src_tokens), None
        turn = self.rotary(0, src_tokens.shape[1])
        recompute = self._recompute(src_tokens, self.config.num_encoder_layers, cross=False)
        for layer in self.encoder_layers:
            u, state = _run(recompute, layer, u, state, turn, src_mask)
        return self.encoder_norm(u), src_mask

    def decode(
        self,
        tgt_tokens: Tensor,
        *,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of the decoder; without `memory` (and a cache of it) cross-attention is left out.

        With `cache` the tokens continue what it holds, and `tgt_mask` covers cached positions too.
        """
        past = 0 if cache is None else cache.length
        # As the caller of a causal language model knows them, or of an encoder-decoder.
        tokens_name, mask_name = ("input_ids", "src_mask") if memory is None else ("tgt_tokens", "tgt_mask")
        self._check_tokens(tokens_name, tgt_tokens, past)
        self._check_mask(mask_name, tgt_mask, tgt_tokens.shape[0], past + tgt_tokens.shape[1])
        if memory is not None and memory.shape[0] != tgt_tokens.shape[0]:
            raise InputError(f"tgt_tokens: {tgt_tokens.shape[0]} rows, but the source has {memory.shape[0]}")
        u, state = self._embed(tgt_tokens), None
        turn = self.rotary(past, tgt_tokens.shape[1])
        layers = self.config.num_decoder_layers
        recompute = cache is None and self._recompute(tgt_tokens, layers, cross=memory is not None)
        for index, layer in enumerate(self.decoder_layers):
            own = cache.own[index] if cache is not None else None
            cross = cache.cross[index] if cache is not None and cache.cross is not None else None
            u, state = _run(recompute, layer, u, state, turn, tgt_mask, memory, memory_mask, own, cross)
        return self._logits(self.decoder_norm(u))

    def new_cache(self, batch: int, capacity: int, *, cross: bool) -> DecoderCache:
        """An empty cache for `batch` sequences of at most `capacity` positions; `cross` for a source's keys too."""
        config, weight = self.config, self.embedding.weight
        dtype = torch.get_autocast_dtype(weight.device.type) if _autocasting(weight.device) else weight.dtype

        def empty(positions: int) -> AttentionCache:
            return AttentionCache.empty(
                batch, config.num_heads, positions, config.head_dim, device=weight.device, dtype=dtype
            )

        layers = range(config.num_decoder_layers)
        return DecoderCache([empty(capacity) for _ in layers], [empty(0) for _ in layers] if cross else None)

    def generate(
        self,
        input_ids: Tensor,
        config: GenerationConfig | None = None,
        *,
        attention_mask: Tensor | None = None,
        causal: bool | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue `input_ids`, or write the target of a source.

        Args:
            input_ids: prompt or source ids [B, T].
            config: how.
            attention_mask: bool [B, T], True = attend; prompts are padded on the left, sources on either side. Without
                it, positions that hold `pad_token_id` are masked when the configuration names one.
            causal: continue the prompt instead of translating a source. Default: only a decoder_only model.
            **options: instead of `config`, its fields by name (`max_new_tokens=32, do_sample=True, ...`).

        Returns:
            ids: [B, T + new] the prompt and its continuation, or [B, 1 + new] the target from `bos_token_id` on; rows
            that ended earlier are filled with `pad_token_id` (or `eos_token_id`).
        """
        return generation.generate(self, input_ids, config, attention_mask=attention_mask, causal=causal, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `directory`; an older model there is replaced whole."""
        pretrained.save_model(self, Path(directory))

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> "APTModel":
        """Read what `save_pretrained` wrote; the model comes back in evaluation mode.

        Raises `CheckpointError` when a file is missing, truncated, or does not fit the configuration.
        """
        return pretrained.load_model(cls, Path(directory), device=torch.device(device), dtype=dtype)

    @classmethod
    def without_values(cls, directory: str | Path) -> "APTModel":
        """The model of a folder with its parameters on meta, for whoever brings their values block by block.

        As in `VGPUStack.load(folder, config=..., model=lambda: APTModel.without_values(folder))`.

        Raises `CheckpointError` when a file is missing, truncated, or does not fit the configuration.
        """
        return pretrained.model_without_values(cls, Path(directory))

    def _embed(self, tokens: Tensor) -> Tensor:
        u = self.embedding(tokens)
        if _autocasting(u.device):
            u = u.to(torch.get_autocast_dtype(u.device.type))  # the stream has the type of the matrices' outputs
        embedded: Tensor = self.dropout(u)
        return embedded

    def _logits(self, u_BTD: Tensor) -> Tensor:
        if self.config.tie_word_embeddings:
            return F.linear(u_BTD, self.embedding.weight) * self.config.d_model**-0.5
        logits: Tensor = self.lm_head(u_BTD)
        return logits

    def _check_tokens(self, name: str, tokens: Tensor, past: int) -> None:
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] == 0:
            raise InputError(
                f"{name}: expected token ids [batch, positions >= 1] of an integer type, "
                f"got {list(tokens.shape)} of {tokens.dtype}"
            )
        if past + tokens.shape[1] > self.config.max_seq_len:
            raise SequenceLengthError(
                f"{name}: {past + tokens.shape[1]} positions, but the model was built for max_seq_len = "
                f"{self.config.max_seq_len}",
                remedy=f"cut the sequence, or train with max_seq_len >= {past + tokens.shape[1]}",
            )

    def _check_mask(self, name: str, mask: Tensor | None, rows: int, positions: int) -> None:
        if mask is not None and (mask.dtype != torch.bool or list(mask.shape) != [rows, positions]):
            raise InputError(
                f"{name}: expected bool [{rows}, {positions}] (True = attend), got {list(mask.shape)} of {mask.dtype}"
            )

    def _source_mask(self, src_tokens: Tensor, src_mask: Tensor | None) -> Tensor | None:
        self._check_mask("src_mask", src_mask, *src_tokens.shape)
        if src_mask is None and self.config.pad_token_id is not None:
            src_mask = src_tokens != self.config.pad_token_id
        if src_mask is None:
            return None
        # A source of padding alone attends to itself, as attention over no key is undefined.
        return src_mask | ~src_mask.any(dim=1, keepdim=True)

    def precision(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The autocast context that the policy asks for on `device`; none without a policy, or inside an autocast."""
        if self.policy is None or _autocasting(device):
            return contextlib.nullcontext()
        native_bf16, _ = self._machine.get(device.type, (False, 0))
        if self.policy.resolve_precision(native_bf16=native_bf16) == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def _recompute(self, tokens: Tensor, num_layers: int, *, cross: bool) -> bool:
        if not (self.training and torch.is_grad_enabled()):
            return False
        if self.activation_checkpointing or self.policy is None:
            return self.activation_checkpointing
        itemsize = 2 if _autocasting(tokens.device) else self.embedding.weight.itemsize
        need = activation_bytes(
            self.config, tokens=tokens.numel(), num_layers=num_layers, cross=cross, itemsize=itemsize
        )
        _, memory = self._machine.get(tokens.device.type, (False, 0))
        # Weights, gradients and two moments in fp32 come first.
        free = memory - 16 * self.num_parameters()
        return self.policy.resolve_checkpointing(activation_bytes=need, free_bytes=free)


def _machine() -> dict[str, tuple[bool, int]]:
    """For the CPU and the best accelerator: native bf16, and bytes of memory."""
    managers = [get_device_manager("cpu"), get_device_manager()]
    return {manager.device.type: (manager.supports_bf16(), manager.total_memory()) for manager in managers}


def _draw(weight: Tensor, std: float, seed: int, name: str) -> None:
    generator = torch.Generator(weight.device).manual_seed(seed ^ zlib.crc32(name.encode()))
    weight.normal_(0.0, std, generator=generator)


def _autocasting(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type)


def _run(recompute: bool, layer: nn.Module, u: Tensor, state: LeftSpinState | None, *inputs: Any) -> Any:
    if recompute:
        return checkpoint(layer, u, state, *inputs, use_reentrant=False)
    return layer(u, state, *inputs)
