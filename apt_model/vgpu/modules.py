"""A model in memory as a tree (`tree.py`)."""

import torch
from torch import nn

from apt_model.core.errors import InputError
from apt_model.core.tensor_io import DTYPES
from apt_model.vgpu.tree import Held, Node, Stored

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_NAMES = {**{dtype: name for name, dtype in DTYPES.items()}, torch.complex64: "C64"}
_BY_SIZE = {1: "U8", 2: "U16", 4: "U32", 8: "U64", 16: "C128"}


def tree_of(model: nn.Module) -> Node:
    """The modules of `model` that hold parameters; storages are told apart by their memory.

    Raises:
        InputError: a parameter is on the meta device, or is no plain dense tensor.
    """
    root = _node(model, "", _storages(model), {})
    return root or Node("", [], [], is_list=False, module=model)


def buffer_bytes(model: nn.Module) -> int:
    """Of all its buffers."""
    return sum(buffer.untyped_storage().nbytes() for buffer in model.buffers())


def _node(module: nn.Module, name: str, known: dict[int, Stored], made: dict[int, Node | None]) -> Node | None:
    """None for a module without parameters."""
    if id(module) not in made:
        own = [
            Held(key, *_kind(module, key, each), known[id(each)])
            for key, each in module.named_parameters(recurse=False)
        ]
        children = [
            _node(child, f"{name}.{key}" if name else key, known, made) for key, child in module.named_children()
        ]
        node = Node(
            name, own, [each for each in children if each is not None], isinstance(module, _LISTS),
            isinstance(module, nn.Embedding), module,
        )  # fmt: skip
        made[id(module)] = node if own or node.children else None
    return made[id(module)]


def _kind(module: nn.Module, key: str, parameter: nn.Parameter) -> tuple[str, tuple[int, ...]]:
    """Type and shape as files have them: a layer may hold a weight in the order in which it computes (`order_for`)."""
    told = getattr(module, "in_files", None)
    return (told(key) if callable(told) else None) or (_dtype(parameter), tuple(parameter.shape))


def _dtype(parameter: nn.Parameter) -> str:
    return _NAMES.get(parameter.dtype) or _BY_SIZE[parameter.element_size()]


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
        stored = by_storage.setdefault(key, Stored(name, storage.nbytes()))
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
