"""What of a model is streamed together: its blocks, and the storages that their parameters lie in. Pure."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

from apt_model.vgpu.tree import Node, Stored


@dataclasses.dataclass(eq=False)
class Window:
    """A module while whose forward runs its parameters are on level 1."""

    node: Node
    stored: list[Stored]

    @property
    def name(self) -> str:
        """Of the module."""
        return self.node.name

    @property
    def module(self) -> Any:
        """The module itself, of a model in memory."""
        return self.node.module


@dataclasses.dataclass(eq=False)
class Found:
    """A model, taken apart."""

    windows: list[Window]
    stored: list[Stored]
    """All storages, in the order of the windows."""
    loose: list[Stored]
    """Of parameters that belong to modules around the windows."""
    users: Counter[Stored]
    """How many windows have each."""


def find(root: Node, limit: int, *, inner: bool = False) -> Found:
    """Take a model apart into blocks of at most `limit` bytes, where its modules allow it.

    Blocks are the elements of the outermost lists of modules, and modules that hold no list; those that are larger than
    `limit` are taken apart in turn. With `inner` blocks are the elements of the innermost lists.
    """
    windows: list[Window] = []
    loose: dict[Stored, None] = {}
    seen: set[int] = set()
    for node, around in _units(root, limit, inside=False, inner=inner):
        if around is not None:
            loose |= dict.fromkeys(around)
        elif id(node) not in seen:
            seen.add(id(node))
            # What a module around the windows holds is there all the time, whoever else holds it.
            windows.append(Window(node, node.stored))
    for window in windows:
        window.stored = [each for each in window.stored if each not in loose]
    users = Counter(each for window in windows for each in window.stored)
    return Found([window for window in windows if window.stored], list(users), list(loose), users)


def _units(node: Node, limit: int, *, inside: bool, inner: bool) -> Iterator[tuple[Node, list[Stored] | None]]:
    """Windows, with None; and modules around them, with what they hold themselves."""
    whole = not node.has_list or (inside and not inner)
    if not node.is_list and whole and (node.nbytes <= limit or not node.children):
        yield node, None
        return
    if node.own:
        yield node, [held.stored for held in node.own]
    for child in node.children:
        yield from _units(child, limit, inside=inside or node.is_list, inner=inner)
