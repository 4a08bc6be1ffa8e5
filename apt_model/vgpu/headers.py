"""A saved model as a tree (`tree.py`), from the headers of its files and its configuration: nothing else is read. Pure.

What is not in them is not known: modules are told by dotted names (one whose children all have numbers is a list),
their order and their ties by what transformers calls them (`saved_names.py`).
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from apt_model.core import fp4_names
from apt_model.core.errors import ConfigError
from apt_model.core.fp4_storage import PACKED, SCALES, packed_parts
from apt_model.core.patterns import covers
from apt_model.core.tensor_files import FLOATS, tensor_bytes
from apt_model.vgpu import saved_names
from apt_model.vgpu.saved_names import Saved
from apt_model.vgpu.tree import Held, Node, Stored

# As `quantize` skips them unless told otherwise.
_SKIPPED = ("lm_head",)


class Outline(NamedTuple):
    """A saved model, as it would be in memory."""

    root: Node
    buffers: int
    """Bytes, as far as they are known."""
    dtype: str
    """In which most of its weights are, those in 4 bits not counted."""
    fp4: bool
    """Whether it has weights in 4 bits."""


def outline(
    tensors: Mapping[str, Saved], config: Mapping[str, Any], *, quantize: str | None = None, dtype: str | None = None
) -> Outline:
    """What a model would be in memory.

    Args:
        tensors: by their names in the files.
        config: what config.json holds.
        quantize: "nvfp4" or "mxfp4": linear layers as `quantize` makes them; None: as they are.
        dtype: the type that floats are loaded in ("BF16" and the like); None: as they are.

    Raises:
        ConfigError: `quantize` for a model that has 4-bit weights already.
    """
    buffers = saved_names.made_buffers(config)
    kept: dict[str, Saved] = {}
    for name, tensor in saved_names.fused(tensors).items():
        if saved_names.is_buffer(name):
            buffers += tensor_bytes(*tensor)
        elif not saved_names.left_over(name, tensor):
            kept[name] = _cast(name, tensor, dtype)
    tied = dict(saved_names.ties(kept, config))
    kept = {name: tensor for name, tensor in kept.items() if name not in tied}
    if quantize is not None:
        if any(name.endswith(PACKED) for name in kept):
            raise ConfigError("--quantize: the model has 4-bit weights already", remedy="leave --quantize out")
        kept = _quantized(kept, quantize, set(tied.values()))
    return Outline(_tree(kept, tied), buffers, _majority(kept), any(name.endswith(PACKED) for name in kept))


def _cast(name: str, tensor: Saved, dtype: str | None) -> Saved:
    scale = name.endswith(SCALES)
    return tensor if dtype is None or tensor.dtype not in FLOATS or scale else Saved(dtype, tensor.shape)


def _majority(tensors: Mapping[str, Saved]) -> str:
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATS and not name.endswith(SCALES):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor_bytes(*tensor)
    return max(sizes, key=lambda each: sizes[each], default="BF16")


def _quantized(tensors: Mapping[str, Saved], form: str, tied: set[str]) -> dict[str, Saved]:
    """The tensors, with those that `quantize` would take as it stores them."""
    turned = fp4_names.turned_layers(tensors)
    found: dict[str, Saved] = {}
    for name, tensor in tensors.items():
        if name in tied or not _is_linear(name, tensor):
            found[name] = tensor
            continue
        *lead, rows, columns = tensor.shape
        swapped = fp4_names.layer_of(name).rpartition(".")[2] in turned
        shape = (*lead, columns, rows) if swapped else tensor.shape
        found |= {name + part: Saved(*each) for part, each in packed_parts(shape, form).items()}
    return found


def _is_linear(name: str, tensor: Saved) -> bool:
    layer = fp4_names.layer_of(name)
    if tensor.dtype not in FLOATS or any(covers(pattern, name) for pattern in _SKIPPED):
        return False
    if len(tensor.shape) == 3:
        return fp4_names.is_experts(name)
    if len(tensor.shape) != 2 or not name.endswith(".weight"):
        return False
    kept = fp4_names.HEAD.search(layer) or fp4_names.ROUTER.search(layer)
    others = (fp4_names.EMBEDDING, fp4_names.NORM, fp4_names.CONVOLUTION)
    return not kept and not any(each.search(layer.lower()) for each in others)


def _tree(tensors: Mapping[str, Saved], tied: Mapping[str, str]) -> Node:
    """Modules by the dots in the names, in the order of `saved_names.rank`."""
    modules: dict[str, dict[str, tuple[Saved, Stored]]] = {"": {}}
    stored = {name: Stored(name, tensor_bytes(*tensor)) for name, tensor in tensors.items()}
    for name in (*tensors, *tied):
        target = tied.get(name, name)
        owner, _, last = name.rpartition(".")
        modules.setdefault(owner, {})[last] = (tensors[target], stored[target])
        while owner := owner.rpartition(".")[0]:
            modules.setdefault(owner, {})
    below: dict[str, list[str]] = {name: [] for name in modules}
    for name in modules:
        if name:
            below[name.rpartition(".")[0]].append(name)

    def node(name: str) -> Node:
        own = [
            Held(key, tensor.dtype, tensor.shape, at)
            for key, (tensor, at) in sorted(modules[name].items(), key=lambda item: (item[0] != "weight", item[0]))
        ]
        children = sorted(below[name], key=lambda child: saved_names.rank(child.rpartition(".")[2]))
        numbered = bool(children) and all(child.rpartition(".")[2].isdigit() for child in children)
        table = bool(fp4_names.EMBEDDING.search(name.lower())) and not re.search(r"norm|proj|dense", name.lower())
        return Node(name, own, [node(child) for child in children], numbered, looked_up=table and not children)

    return node("")
