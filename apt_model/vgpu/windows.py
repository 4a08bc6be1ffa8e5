"""What of a model is streamed together: its blocks, and the storages that their parameters lie in."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from apt_model.core.errors import InputError

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclasses.dataclass(eq=False)
class Stored:
    """Parameters that share one storage: tied weights are one of these."""

    name: str
    """Of the first of its parameters."""
    parameters: list[nn.Parameter]
    nbytes: int
    windows: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(eq=False)
class Window:
    """A module while whose forward runs its parameters are on level 1."""

    name: str
    module: nn.Module
    stored: list[Stored]


@dataclasses.dataclass(eq=False)
class Found:
    """A model, taken apart."""

    windows: list[Window]
    stored: list[Stored]
    """All storages, in the order of the windows."""
    loose: list[Stored]
    """Of parameters that belong to modules around the windows."""


def find(model: nn.Module, limit: int) -> Found:
    """Take `model` apart into blocks of at most `limit` bytes, where its modules allow it.

    Blocks are the elements of the outermost lists of modules, and modules that hold no list; those that are larger than
    `limit` are taken apart in turn.
    """
    known = _storages(model)
    windows: list[Window] = []
    loose: list[Stored] = []
    seen: set[int] = set()
    for name, module, own in _units(model, "", limit, known, inside=False):
        if module is None:
            loose += [each for each in own if each not in loose]
        elif id(module) not in seen:
            seen.add(id(module))
            windows.append(Window(name, module, own))
    # What a module around the windows holds is there all the time, whoever else holds it.
    stored: list[Stored] = []
    for i, window in enumerate(windows):
        window.stored = [each for each in window.stored if each not in loose]
        for each in window.stored:
            each.windows.add(i)
            if each not in stored:
                stored.append(each)
    return Found([window for window in windows if window.stored], stored, loose)


def _storages(model: nn.Module) -> dict[int, Stored]:
    """By the id of a parameter."""
    by_storage: dict[object, Stored] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in found:
            continue
        _check(name, parameter)
        storage = parameter.untyped_storage()
        # Without bytes there is no address to tell storages apart by.
        key: object = storage.data_ptr() if storage.nbytes() else id(parameter)
        stored = by_storage.setdefault(key, Stored(name, [], storage.nbytes()))
        stored.parameters.append(parameter)
        found[id(parameter)] = stored
    return found


def _check(name: str, parameter: nn.Parameter) -> None:
    if parameter.device.type == "meta":
        raise InputError(
            f"{name} is on the meta device: it has no values to be streamed",
            remedy="load the model's weights first",
        )
    if type(parameter.data) is not torch.Tensor or parameter.layout != torch.strided:
        raise InputError(
            f"{name} is a {type(parameter.data).__name__}, {parameter.layout}: expected a plain dense tensor",
            remedy="quantise with apt_model.optimization.quantize, whose weights are plain tensors",
        )


def _units(
    module: nn.Module, name: str, limit: int, known: dict[int, Stored], *, inside: bool
) -> Iterator[tuple[str, nn.Module | None, list[Stored]]]:
    """Windows, and with None for the module what lies around them."""
    held = _of(module.parameters(), known)
    if not held:
        return
    children = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
    has_list = any(isinstance(each, _LISTS) for each in module.modules())
    whole = inside or not has_list
    if not isinstance(module, _LISTS) and whole and (sum(each.nbytes for each in held) <= limit or not children):
        yield name, module, held
        return
    own = _of(module.parameters(recurse=False), known)
    if own:
        yield name, None, own
    for key, child in children:
        yield from _units(child, key, limit, known, inside=inside or isinstance(module, _LISTS))


def _of(parameters: Iterator[nn.Parameter], known: dict[int, Stored]) -> list[Stored]:
    found: list[Stored] = []
    for parameter in parameters:
        if known[id(parameter)] not in found:
            found.append(known[id(parameter)])
    return found
