"""Activations of a model's blocks recomputed in backward where they would not fit: measured on the first block.

A forward that trains runs its first block with everything that is saved for backward counted. Times the number of
blocks, that is what the model would hold. Where it is more than what the device has free the forward begins anew, from
the same random state, with every block recomputed. It is decided once for each shape of inputs.
"""

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from apt_model.core.policy import Policy
from apt_model.core.system.device import Device
from apt_model.optimization.wrapped import WrappedForward

LOG = logging.getLogger(__name__)


class _Again(Exception):  # noqa: N818 - not a fault: the forward is to begin anew
    pass


class Recompute:
    """Decides for a model, and carries it out.

    Args:
        model: whose blocks are recomputed; a model of Hugging Face by its own `gradient_checkpointing_enable`, which
            knows of caches.
        blocks: its blocks.
        policy: says whether always, never, or by `device`'s free memory.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], policy: Policy, device: Device) -> None:
        self.model, self.policy, self.device = model, policy, device
        self.decided: dict[Hashable, bool] = {}
        """Whether blocks are recomputed, by the shapes of the model's inputs."""
        self.saved_bytes: dict[Hashable, int] = {}
        """What a forward would hold for backward, estimated from its first block."""
        self._own = bool(getattr(model, "supports_gradient_checkpointing", False))
        self._was = self._own and any(getattr(each, "gradient_checkpointing", False) for each in model.modules())
        self._on = self._was
        self._measures: Hashable | None = None
        self._recomputes = False
        self._blocks = [_Block(block, self) for block in blocks]

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `forward` gives, its blocks recomputed or not."""
        if not (self.model.training and torch.is_grad_enabled()) or self.policy.activation_checkpointing == "off":
            return forward(*args, **kwargs)
        key = tuple(tuple(leaf.shape) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if self.policy.activation_checkpointing == "on":
            self.decided[key] = True
        if key not in self.decided:
            before = _random_state(self.device)
            self._measures = key
            try:
                return self._run(forward, args, kwargs, recompute=False)
            except _Again:
                _set_random_state(self.device, before)
            finally:
                self._measures = None
        return self._run(forward, args, kwargs, recompute=self.decided[key])

    def undo(self) -> None:
        """Leave the blocks as they were."""
        for block in self._blocks:
            block.undo()
        self._switch(self._was)

    def _run(self, forward: Callable[..., Any], args: Any, kwargs: Any, *, recompute: bool) -> Any:
        self._switch(recompute or self._was)
        self._recomputes = recompute and not self._own
        try:
            return forward(*args, **kwargs)
        finally:
            self._recomputes = False

    def _switch(self, on: bool) -> None:
        if self._own and on != self._on:
            which = "enable" if on else "disable"
            switch = getattr(self.model, f"activation_checkpointing_{which}", None)  # transformers, from 5.23 on
            (switch or getattr(self.model, f"gradient_checkpointing_{which}"))()
            self._on = on

    def block(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One block's forward."""
        if self._measures is not None:
            return self._measured(run, args, kwargs)
        if self._recomputes:
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        return run(*args, **kwargs)

    def _measured(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first block's forward, counted; then the decision."""
        key, self._measures = self._measures, None
        weights = {each.untyped_storage().data_ptr() for each in self.model.parameters()}
        found: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out = run(*args, **kwargs)
        need, free = sum(found.values()) * len(self._blocks), self.device.free_memory() - _to_come(self.model)
        assert key is not None
        self.saved_bytes[key] = need
        self.decided[key] = self.policy.resolve_checkpointing(activation_bytes=need, free_bytes=free)
        if self.decided[key]:
            LOG.info("activations would take %d bytes of %d free: blocks are recomputed in backward", need, free)
            raise _Again
        return out


class _Block(WrappedForward):
    """A block's forward, by way of its model's `Recompute`."""

    def __init__(self, block: nn.Module, owner: Recompute) -> None:
        super().__init__(block)
        self.owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the forward gives."""
        return self.owner.block(self.inner, args, kwargs)


def _to_come(model: nn.Module) -> int:
    """Bytes of gradients that are not there yet, and of two moments for each of them."""
    return 3 * sum(each.nbytes for each in model.parameters() if each.requires_grad and each.grad is None)


def _random_state(device: Device) -> tuple[Tensor, Tensor | None]:
    """Of the CPU's generator, and the device's own."""
    return torch.get_rng_state(), device.random_state()


def _set_random_state(device: Device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        device.set_random_state(state[1])
