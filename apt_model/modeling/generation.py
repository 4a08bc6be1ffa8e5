"""Generation: greedy, sampling and beam search over a key-value cache.

# Shape suffix legend
#   R = rows being decoded (batch times beams), T = prompt positions, V = vocab_size
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apt_model.core.errors import ConfigError, InputError, SequenceLengthError
from apt_model.core.options import from_dict
from apt_model.modeling.generation_config import GenerationConfig

if TYPE_CHECKING:
    from apt_model.modeling.apt_model import APTModel


class _Decoder:
    """The model as a function from the tokens so far to the next token's logits, cached or not."""

    def __init__(
        self, model: "APTModel", prompt: Tensor, mask: Tensor | None, source: Tensor | None, *, capacity: int | None
    ) -> None:
        self.model = model
        self.mask = mask if source is None else None
        self.memory: Tensor | None = None
        self.memory_mask: Tensor | None = None
        if source is not None:
            self.memory, self.memory_mask = model.encode(source, mask)
        rows = prompt.shape[0]
        self.cache = None if capacity is None else model.new_cache(rows, capacity, cross=source is not None)

    def __call__(self, tokens: Tensor) -> Tensor:
        """All tokens so far [R, t] -> logits [R, V] of the next, fp32."""
        past = 0 if self.cache is None else self.cache.length
        mask = self.mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], tokens.shape[1] - mask.shape[1])], dim=1)
        logits = self.model.decode(
            tokens[:, past:], memory=self.memory, memory_mask=self.memory_mask, tgt_mask=mask, cache=self.cache
        )
        return logits[:, -1].float()

    def reorder(self, rows: Tensor) -> None:
        """Continue row `rows[i]` in row i."""
        if self.cache is not None:
            self.cache.reorder(rows)
        if self.mask is not None:
            self.mask = self.mask.index_select(0, rows)

    def repeat(self, times: int) -> None:
        """Give every row `times` copies, side by side."""
        if self.memory is not None:
            self.memory = self.memory.repeat_interleave(times, dim=0)
        if self.memory_mask is not None:
            self.memory_mask = self.memory_mask.repeat_interleave(times, dim=0)


@torch.no_grad()
def generate(
    model: "APTModel",
    input_ids: Tensor,
    config: GenerationConfig | None,
    *,
    attention_mask: Tensor | None,
    causal: bool | None,
    **options: Any,
) -> Tensor:
    """See `APTModel.generate`."""
    if config is not None and options:
        raise ConfigError("generate: give a GenerationConfig or options by name, not both")
    config = config or from_dict(GenerationConfig, options)
    causal = model.config.decoder_only if causal is None else causal
    mask = _mask(model, input_ids, attention_mask, causal)
    was_training = model.training
    model.eval()
    try:
        with model.precision(input_ids.device):
            prompt = input_ids if causal else _start(model, input_ids)
            _check_room(model, prompt, config)
            capacity = prompt.shape[1] + config.max_new_tokens if config.use_cache else None
            decoder = _Decoder(model, prompt, mask, None if causal else input_ids, capacity=capacity)
            return (_beam_search if config.num_beams > 1 else _one_by_one)(model, decoder, prompt, config)
    finally:
        model.train(was_training)


def _start(model: "APTModel", source: Tensor) -> Tensor:
    bos = model.config.bos_token_id
    if bos is None:
        raise ConfigError(
            "generate: the configuration has no bos_token_id, so a target has no first token",
            remedy="set bos_token_id, or continue the ids themselves with causal=True",
        )
    return source.new_full((source.shape[0], 1), bos)


def _mask(model: "APTModel", ids: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    if mask is None:
        if not causal or model.config.pad_token_id is None:
            return None
        mask = ids != model.config.pad_token_id
    if mask.dtype != torch.bool or mask.shape != ids.shape:
        raise InputError(
            f"attention_mask: expected bool {list(ids.shape)} (True = attend), got {list(mask.shape)} of {mask.dtype}"
        )
    if not causal:
        return mask
    if not bool(mask[:, -1].all()):
        raise InputError("generate: a prompt's last position is padding; pad prompts on the left")
    return None if bool(mask.all()) else mask


def _check_room(model: "APTModel", prompt: Tensor, config: GenerationConfig) -> None:
    need, room = prompt.shape[1] + config.max_new_tokens, model.config.max_seq_len
    if need > room:
        raise SequenceLengthError(
            f"generate: {prompt.shape[1]} prompt tokens and max_new_tokens = {config.max_new_tokens} need {need} "
            f"positions, but the model was built for max_seq_len = {room}",
            remedy=f"max_new_tokens={room - prompt.shape[1]} or a shorter prompt"
            if prompt.shape[1] < room
            else f"a prompt of at most {room - 1} tokens",
        )


def _filler(model: "APTModel") -> int:
    """What fills a row after its end."""
    config = model.config
    fill = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
    return 0 if fill is None else fill


def _one_by_one(model: "APTModel", decoder: _Decoder, tokens: Tensor, config: GenerationConfig) -> Tensor:
    choose = _sampler(config, tokens.device)
    eos, fill = model.config.eos_token_id, _filler(model)
    done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for _ in range(config.max_new_tokens):
        chosen = choose(decoder(tokens)).masked_fill(done, fill)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        if eos is not None:
            done = done | (chosen == eos)
            if bool(done.all()):
                break
    return tokens


def _sampler(config: GenerationConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    if not config.do_sample:
        return lambda logits_RV: logits_RV.argmax(dim=-1)
    generator = None if config.seed is None else torch.Generator(device).manual_seed(config.seed)

    def draw(logits_RV: Tensor) -> Tensor:
        kept = keep_likely(logits_RV / config.temperature, top_k=config.top_k, top_p=config.top_p)
        return torch.multinomial(kept.softmax(dim=-1), 1, generator=generator)[:, 0]

    return draw


def keep_likely(logits_RV: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set to -inf what is outside the `top_k` likeliest, then outside the smallest set with probability `top_p`."""
    if 0 < top_k < logits_RV.shape[-1]:
        last_kept = logits_RV.topk(top_k, dim=-1).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < last_kept, -torch.inf)
    if top_p < 1:
        ordered, order = logits_RV.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        # A token stays while those before it have not reached p yet, so the likeliest always stays.
        drop = probability.cumsum(dim=-1) - probability >= top_p
        logits_RV = logits_RV.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits_RV


def _beam_search(model: "APTModel", decoder: _Decoder, prompt: Tensor, config: GenerationConfig) -> Tensor:
    """The likeliest of `num_beams` hypotheses a row; one that ended stays in its beam with its score."""
    beams, batch, start = config.num_beams, prompt.shape[0], prompt.shape[1]
    eos, fill = model.config.eos_token_id, _filler(model)
    first = decoder(prompt).log_softmax(dim=-1)
    vocab = first.shape[-1]
    if beams > vocab:
        raise ConfigError(f"generate: num_beams = {beams} is more than the {vocab} tokens there are")
    score, chosen = first.topk(beams, dim=-1)  # [batch, beams] each
    decoder.reorder(torch.arange(batch, device=prompt.device).repeat_interleave(beams))
    decoder.repeat(beams)
    tokens = torch.cat([prompt.repeat_interleave(beams, dim=0), chosen.view(-1, 1)], dim=1)
    done = chosen.view(-1) == (-1 if eos is None else eos)
    length = torch.ones_like(score)
    base = torch.arange(batch, device=prompt.device)[:, None] * beams
    for _ in range(config.max_new_tokens - 1):
        if bool(done.all()):
            break
        step = decoder(tokens).log_softmax(dim=-1)
        ended = torch.full_like(step, -torch.inf)
        ended[:, fill] = 0.0
        step = torch.where(done[:, None], ended, step)
        score, flat = (score[:, :, None] + step.view(batch, beams, vocab)).view(batch, -1).topk(beams, dim=-1)
        rows = (base + flat // vocab).view(-1)
        chosen = (flat % vocab).view(-1)
        decoder.reorder(rows)
        tokens = torch.cat([tokens[rows], chosen[:, None]], dim=1)
        length = length.view(-1)[rows].view(batch, beams) + (~done[rows]).view(batch, beams)
        done = done[rows] | (chosen == (-1 if eos is None else eos))
    best = (score / length**config.length_penalty).argmax(dim=-1)
    tokens = tokens.view(batch, beams, -1)[torch.arange(batch, device=prompt.device), best]
    longest = int(length.gather(1, best[:, None]).max())
    return tokens[:, : start + longest]
