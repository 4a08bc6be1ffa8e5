"""What torch.compile is told about a model that is streamed, so that it compiles the blocks and nothing around them.

Its guards look at parameters again only where a dictionary on the way to them has changed, and know hooks not at all:
a graph that was compiled with a parameter which was there would be used when it is away, and read its slot.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from apt_model.vgpu.parameters import StreamedParameter

_WHY = (
    "a VGPUStack brings a block's weights here, between two graphs, so that one graph holds a block at most: compile "
    "each (for block in model.layers: block.compile(fullgraph=True)), or the model without fullgraph; a block that is "
    "taken apart, as level 1 is too small for it, takes no fullgraph either"
)


def between_graphs(function: Callable[..., Any]) -> Any:
    """The function, which torch.compile does not look into."""
    return torch.compiler.disable(function, reason=_WHY)


@functools.cache
def leave_away_to_eager() -> None:
    """Let what computes with a parameter that is away do so outside of graphs, where the values are fetched.

    Done when a model is attached, as it imports torch's compiler.
    """
    torch._dynamo.config.nontraceable_tensor_subclasses.add(StreamedParameter)  # noqa: SLF001
    eager = between_graphs(StreamedParameter.__torch_function__.__func__)  # type: ignore[attr-defined]
    StreamedParameter.__torch_function__ = classmethod(eager)  # type: ignore[assignment]


class Holders:
    """The dictionaries of modules that a model's parameters are in."""

    def __init__(self, model: nn.Module) -> None:
        self._of: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():  # noqa: SLF001
                self._of.setdefault(id(parameter), []).append((module._parameters, name))  # noqa: SLF001

    def changed(self, parameter: nn.Parameter) -> None:
        """Have graphs look at a parameter whose class has changed: its dictionaries are changed, and back at once."""
        for holder, name in self._of.get(id(parameter), ()):
            if holder.get(name) is parameter:  # one call, between whose halves no other thread runs
                holder.update(((name, None), (name, parameter)))
