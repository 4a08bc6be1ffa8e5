"""How to continue a text. Imports no torch."""

from dataclasses import dataclass

from apt_model.core.options import check_types, require


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Greedy by default; `do_sample` draws, `num_beams` searches."""

    max_new_tokens: int = 64
    """Tokens to add at most."""
    do_sample: bool = False
    """Draw from the distribution instead of taking the likeliest token."""
    temperature: float = 1.0
    """Sampling: divides the logits; below 1 is more certain."""
    top_k: int = 0
    """Sampling: keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Sampling: keep the likeliest tokens whose probability adds up to p."""
    num_beams: int = 1
    """Beam search over so many hypotheses; 1 is none."""
    length_penalty: float = 1.0
    """Beam search: a hypothesis is ranked by its log-probability over its length to this power."""
    seed: int | None = None
    """Sampling: seed of the draws; None takes torch's global generator."""
    use_cache: bool = True
    """Keep keys and values instead of computing them again for every token."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first value that cannot be met, or that would have no effect."""
        check_types(self)
        name = type(self).__name__
        require(self.max_new_tokens >= 1, f"{name}.max_new_tokens", "at least 1", self.max_new_tokens)
        require(self.temperature > 0, f"{name}.temperature", "above 0", self.temperature, "greedy is do_sample=False")
        require(self.top_k >= 0, f"{name}.top_k", "0 or more", self.top_k)
        require(0 < self.top_p <= 1, f"{name}.top_p", "0 < top_p <= 1", self.top_p)
        require(self.num_beams >= 1, f"{name}.num_beams", "at least 1", self.num_beams)
        require(not (self.do_sample and self.num_beams > 1), f"{name}.num_beams", "1 with do_sample", self.num_beams)
        if not self.do_sample:
            for field, neutral in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("seed", None)):
                value = getattr(self, field)
                require(value == neutral, f"{name}.{field}", f"{neutral} without do_sample (no effect)", value)
        if self.num_beams == 1:
            require(self.length_penalty == 1, f"{name}.length_penalty", "1.0 without beams", self.length_penalty)
