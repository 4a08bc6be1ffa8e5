"""Layers of a model computed elsewhere, in place: its own forward, its state dict and its loss stay what they were.

    blocks = [offload_layers(model, (2, 3), cloud_backend=backend)]  # layers 2 and 3, in one request
    logits = model(ids)
    recall_layers(model)

The layers stay here as well, frozen: they compute whenever the cloud does not, with the very arguments that the model
gave them. What a server has no part in is computed here and counted with its reason: caches of keys and values,
autocast, dropout while training, masks that are no padding.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apt_model.cloud.backend import CloudBackend
from apt_model.cloud.remote_block import RemoteBlock
from apt_model.core.errors import ConfigError
from apt_model.optimization.wrapped import WrappedForward

CACHE = "a cache of keys and values"
DROPOUT = "dropout"
# Where transformers' models have their layers, by `model_type`: those that `apt-model serve` knows.
_HOMES = {"bert": "encoder.layer", "gpt2": "h", "llama": "layers", "qwen2": "layers"}
# Rotary frequencies that follow the length of what is read.
_MOVING = ("dynamic", "longrope")
# Dropout that is not within a layer.
_OUTSIDE = ("embd_pdrop", "summary_first_dropout", "classifier_dropout")


def offload_layers(
    model: nn.Module,
    layers: tuple[int, int],
    *,
    cloud_backend: CloudBackend | None,
    stack: str = "decoder",
    **options: Any,
) -> RemoteBlock:
    """Have layers first .. last of `model` computed elsewhere, in one request a forward.

    Args:
        model: an `APTModel`, or a transformers model of type bert, gpt2, llama or qwen2, where it is to stay.
        layers: first and last, counted from 0. Their parameters must be frozen.
        cloud_backend: one of `get_cloud_npu_manager()`.
        stack: of an `APTModel`: "decoder" or "encoder".
        options: those of `RemoteBlock`: fallback_local, wire, deadline_s, push, spot_check.

    Returns:
        The block, for its `get_stats()` and `push_weights()`.

    Raises:
        ConfigError: layers that no server can compute, that train, or that are elsewhere already.
    """
    family = _family(model, stack)
    first, last = layers
    if not 0 <= first <= last < len(family.layers):
        raise ConfigError(f"offload_layers: expected layers within (0, {len(family.layers) - 1}), got {layers}")
    if family.whole and last - first + 1 < len(family.layers):
        raise ConfigError(
            f"offload_layers: expected all layers of the {stack}, (0, {len(family.layers) - 1}), along which the left "
            f"spin of design mode hands on its state, got {layers}",
            remedy='the other stack, or left_spin_mode="trust"',
        )
    chosen = list(family.layers[first : last + 1])
    if any(isinstance(vars(each).get("forward"), _Wrapped) for each in chosen):
        raise ConfigError("offload_layers: expected layers that are here", remedy="recall_layers(model)")
    tensors = {
        f"{number}.{name}": each
        for number, layer in enumerate(chosen, first)
        for name, each in layer.named_parameters(remove_duplicate=False)
    }
    block = RemoteBlock(
        family.kind, {**family.config, "layers": [first, last]}, tensors, cloud_backend=cloud_backend,
        local=nn.ModuleList(chosen), **options,
    )  # fmt: skip
    inners = [each.forward for each in chosen]
    leader = family.leader(chosen[0], block, inners, family.dropout)
    for each in chosen[1:]:
        _Follower(each, leader)
    return block


def recall_layers(model: nn.Module) -> None:
    """Have all layers computed here again, as if none had been offloaded."""
    for module in model.modules():
        wrapped = vars(module).get("forward")
        if isinstance(wrapped, _Wrapped):
            wrapped.undo()


class _Wrapped(WrappedForward):
    pass


class _Leader(_Wrapped):
    """The first layer of a block, which stands for all of it."""

    def __init__(self, model: nn.Module, block: RemoteBlock, inners: Sequence[Any], dropout: float) -> None:
        super().__init__(model)
        self.block, self.inners, self.dropout = block, inners, dropout

    def why_here(self) -> str | None:
        return DROPOUT if self.dropout and self.model.training else None

    def is_apart(self, _: Mapping[str, Any]) -> bool:
        """Whether every layer of the block computes by itself this time."""
        return False

    def after(self, x: Any, _: Sequence[Any]) -> Any:
        """What a layer of the block that comes later returns: `x`, the first of its inputs, is done already."""
        return x


class _Follower(_Wrapped):
    """Another layer of a block: hands on what the first one made of the stream."""

    def __init__(self, model: nn.Module, leader: _Leader) -> None:
        super().__init__(model)
        self.leader = leader
        self.signature = inspect.signature(self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.signature.bind(*args, **kwargs).arguments
        if self.leader.is_apart(given):
            return self.inner(*args, **kwargs)
        x, *others = given.values()
        return self.leader.after(x, others)


class _APTLeader(_Leader):
    def __init__(self, model: nn.Module, *others: Any) -> None:
        super().__init__(model, *others)
        self.takes_memory = "memory_BSD" in inspect.signature(self.inner).parameters

    def is_apart(self, given: Mapping[str, Any]) -> bool:
        return given.get("cache") is not None  # each layer has its own

    def after(self, x: Any, others: Sequence[Any]) -> Any:
        return x, others[0]

    def __call__(  # noqa: PLR0917 - as the layers are called
        self, u: Tensor, state: Any, turn: Any, mask: Tensor | None, memory: Tensor | None = None,
        memory_mask: Tensor | None = None, cache: Any = None, cross_cache: Any = None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        if cache is not None:
            return self._alone(u, state, turn, mask, memory, memory_mask, cache, cross_cache)
        named = {"attention_mask": mask, "memory": memory, "memory_mask": memory_mask}

        def here(u: Tensor, rows: slice) -> Tensor:
            cut = [None if each is None else each[rows] for each in named.values()]
            step = state
            for inner in self.inners:
                u, step = inner(u, step, turn, *(cut if self.takes_memory else cut[:1]))
            return u

        others = {name: each for name, each in named.items() if each is not None}
        return self.block.compute(u, others, here, self.why_here()), None

    def _alone(self, u: Tensor, *inputs: Any) -> tuple[Tensor, Any]:
        left: list[Any] = []

        def here(u: Tensor, _: slice) -> Tensor:
            made, state = self.inner(u, *inputs)
            left.append(state)
            found: Tensor = made
            return found

        return self.block.compute(u, {}, here, CACHE), left[0]


class _HFLeader(_Leader):
    def __init__(self, model: nn.Module, *others: Any) -> None:
        super().__init__(model, *others)
        self.signature = inspect.signature(self.inner)
        self.causal = "bert" not in type(model).__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(self.signature.bind(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        x: Tensor = given.pop("hidden_states")
        reason, keys = _why_here(given), None
        if reason is None and given.get("attention_mask") is not None:
            keys = padding_of(given["attention_mask"], len(x), causal=self.causal)
            reason = None if keys is not None else "a mask that is no padding"

        def here(x: Tensor, rows: slice) -> Tensor:
            cut = given if rows == slice(None) else {name: _rows(each, rows, batch) for name, each in given.items()}
            for inner in self.inners:
                x = inner(x, **cut)
            return x

        batch = len(x)
        others = {} if keys is None else {"attention_mask": keys}
        return self.block.compute(x, others, here, reason or self.why_here())


def padding_of(mask: Tensor, rows: int, *, causal: bool) -> Tensor | None:
    """Which keys a mask [rows or 1, heads, T, T] leaves visible, bool [rows, T]; None where it says more than that.

    Queries that have nothing to see are padding, and may be said to see everything: nobody uses what comes of them.
    """
    if mask.dim() != 4 or mask.shape[-1] != mask.shape[-2]:
        return None
    visible = mask if mask.dtype == torch.bool else mask == 0
    seen = visible[:, 0]
    keys = seen[:, -1] if causal else seen.any(1)
    expected = keys[:, None].expand_as(seen)
    if causal:
        expected = expected.tril()
    expected = expected[:, None]
    nothing_to_see = ~expected.any(-1) & visible.all(-1)
    if not bool(((visible == expected).all(-1) | nothing_to_see).all()):
        return None
    return keys.expand(rows, -1).contiguous()


def _why_here(given: Mapping[str, Any]) -> str | None:
    """What a server has no part in, among the arguments of a layer of transformers."""
    if given.get("cache") is not None or given.get("past_key_values") is not None:
        return CACHE
    if given.get("encoder_hidden_states") is not None:
        return "cross-attention"
    if given.get("output_attentions"):
        return "weights of attention that were asked for"
    if given.get("position_embeddings") is not None:
        positions = given.get("position_ids")
        if positions is None or not bool(
            (positions == torch.arange(positions.shape[-1], device=positions.device)).all()
        ):
            return "positions that are not 0, 1, 2, ..."
    return None


def _rows(value: Any, rows: slice, batch: int) -> Any:
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and len(value) == batch else value
    return tuple(_rows(each, rows, batch) for each in value) if isinstance(value, tuple) else value


class _Family(NamedTuple):
    """What a model's layers are to a server."""

    kind: str
    config: Mapping[str, Any]
    layers: nn.ModuleList
    leader: type[_Leader]
    dropout: float
    whole: bool = False
    """Whether a stack goes as one, or not at all."""


def _family(model: nn.Module, stack: str) -> _Family:
    config: Any = getattr(model, "config", None)
    name = getattr(config, "model_type", None)
    if name in _HOMES:
        about = json.loads(config.to_json_string())
        dropout = max(
            (value for key, value in about.items() if "drop" in key and key not in _OUTSIDE and value), default=0.0
        )
        base: Any = model.base_model
        layers = base.get_submodule(_HOMES[name])
        return _Family("hf_block", {"model": about, **_rotary(base)}, layers, _HFLeader, dropout)
    layers = getattr(model, f"{stack}_layers", None)
    if (
        stack not in ("decoder", "encoder")
        or not isinstance(layers, nn.ModuleList)
        or not hasattr(config, "left_spin_mode")
    ):
        raise ConfigError(
            f"offload_layers: expected an APT model with that stack, decoder or encoder, or a transformers model of "
            f"type {', '.join(_HOMES)}, got {type(model).__name__} and {stack!r}"
        )
    whole = config.use_left_spin and config.left_spin_mode == "design"
    about = {"model": config.to_dict(), "stack": stack}
    return _Family("apt_block", about, layers, _APTLeader, config.dropout, whole)


def _rotary(base: Any) -> dict[str, str]:
    """What a server must know of a model's rotary frequencies, beside its configuration.

    `model.bfloat16()` rounds them, as they are a buffer; a model that was loaded in that type has them in fp32.
    """
    rotary: Any = getattr(base, "rotary_emb", None)
    held = getattr(rotary, "inv_freq", None)
    if held is None or getattr(rotary, "rope_type", "default") in _MOVING:
        return {}
    made, held = type(rotary)(base.config).inv_freq.cpu(), held.cpu()
    if not torch.equal(held, made.to(held.dtype)):
        raise ConfigError(
            "offload_layers: expected the rotary frequencies that the model's configuration gives, got others",
            remedy="load the model in the type it is to have: from_pretrained(..., dtype=torch.bfloat16)",
        )
    return {} if held.dtype == made.dtype else {"rotary": str(held.dtype).removeprefix("torch.")}
