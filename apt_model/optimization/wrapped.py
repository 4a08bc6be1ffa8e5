"""A model's forward, replaced on the instance alone: classes, hooks and `state_dict` stay, and it can be undone."""

import functools
import types
from typing import Any

from torch import nn


class WrappedForward:
    """Stands where `model.forward` is looked up, with its name, documentation and signature.

    A copy of the model made by `copy.deepcopy` gets its class's own forward: what is wrapped belongs to this one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before = model, vars(model).get("forward")
        self.inner = model.forward
        functools.update_wrapper(self, self.inner)
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the forward gives."""
        return self.inner(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self.model)]
        return types.MethodType(type(copied).forward, copied)

    def undo(self) -> None:
        """Put back what was there, unless somebody has replaced it since: then from now on this only hands on."""
        if vars(self.model).get("forward") is not self:
            return
        if self.before is None:
            del self.model.forward
        else:
            self.model.forward = self.before
