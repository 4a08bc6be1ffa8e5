"""A model as modules and the parameters that they hold, by names, shapes and bytes alone: without torch.

A model in memory (`modules.py`) and the headers of a saved one (`headers.py`) both become such a tree, and what is made
of it is the same for both.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from apt_model.core.tensor_files import BITS, FLOATS


@dataclasses.dataclass(eq=False)
class Stored:
    """Parameters that share one storage: tied weights are one of these."""

    name: str
    """Of the first of its parameters."""
    nbytes: int
    parameters: list[Any] = dataclasses.field(default_factory=list)
    """Those of a model in memory."""


class Held(NamedTuple):
    """A parameter of a module."""

    name: str
    """In its module."""
    dtype: str
    """By safetensors' names."""
    shape: tuple[int, ...]
    stored: Stored

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """Of an element."""
        return BITS.get(self.dtype, 128)  # the format has no complex128

    @property
    def packed(self) -> bool:
        """Whether it holds 4-bit codes."""
        return self.name.endswith("_packed")

    @property
    def floats(self) -> bool:
        """Whether its elements are numbers that a product takes as they are."""
        return self.dtype in FLOATS


@dataclasses.dataclass(eq=False)
class Node:
    """A module that holds parameters, itself or in its children."""

    name: str
    """From the model on, dotted; '' for the model."""
    own: list[Held]
    children: list["Node"]
    is_list: bool
    """Whether it is a list of modules, which has no forward of its own."""
    looked_up: bool = False
    """Whether its parameters are a table of which rows are taken."""
    module: Any = None
    """Of a model in memory."""

    def walk(self) -> Iterator["Node"]:
        """This one and those below it, each once, the outer first."""
        seen: set[int] = set()
        waiting = [self]
        while waiting:
            node = waiting.pop()
            if id(node) not in seen:
                seen.add(id(node))
                yield node
                waiting += reversed(node.children)

    @functools.cached_property
    def stored(self) -> list[Stored]:
        """Its storages, and those below it, in order."""
        return list(dict.fromkeys(held.stored for node in self.walk() for held in node.own))

    @functools.cached_property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(each.nbytes for each in self.stored)

    @functools.cached_property
    def has_list(self) -> bool:
        """Whether it is a list, or one is below it."""
        return any(node.is_list for node in self.walk())
