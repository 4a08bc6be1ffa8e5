"""The blocks of a model: what repeats in it, and is compiled or recomputed by itself."""

from collections.abc import Iterator

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The elements of the outermost lists of two and more modules, each once; the model itself where it has none."""
    found = list({id(block): block for block in _blocks(model)}.values())
    return found or [model]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.ModuleList) and len(module) > 1:
        yield from module
        return
    for child in module.children():
        yield from _blocks(child)
