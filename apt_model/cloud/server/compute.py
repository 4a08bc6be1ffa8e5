"""A request's message becomes an answer's: tensors checked, moved, computed, moved back."""

import contextlib
import math
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_model.cloud import int8g64
from apt_model.cloud.server.blocks import Block, Port
from apt_model.cloud.server.models import BACKWARD, Model
from apt_model.cloud.server.refusal import Refusal
from apt_model.cloud.server.tensors import FLOATS
from apt_model.cloud.tensors import DTYPES, NAMES, as_tensor, to_wire
from apt_model.cloud.wire import Buffer, Message, WireTensor, encode_response
from apt_model.core.errors import InputError

_JSON_ELEMENTS = 1 << 18  # of an answer in JSON, whose numbers take many times their bytes
SMALL_BYTES = 2 << 20
"""Of the inputs, for a forward that is small."""


_AS_ROWS = 8


def without_gradients() -> None:
    """Record no gradients in this thread from now on; a block that computes one says so itself."""
    torch.set_grad_enabled(False)


class Ready(NamedTuple):
    """A request that was looked at, and found right; its tensors' values may still come."""

    model: Model
    message: Message
    tensors: dict[str, Tensor]
    dy: Tensor | None
    """Of a gradient."""
    wire: str


def answer(
    model: Model, message: Message, *, backward: bool, max_answer: int, deadline: float | None
) -> tuple[list[Buffer], int]:
    """The parts of the answer's body, and the length of its JSON.

    Raises:
        Refusal: the deadline (in `time.monotonic`'s seconds) has passed, or the answer would be too large.
        InputError, WireError: these are not the model's inputs.
    """
    return computed(made_ready(model, message, backward=backward, max_answer=max_answer), deadline)


def is_view(message: Message) -> bool:
    """Whether all it has is one tensor that stands in the body as it is used: whose values may come later."""
    layout = message.layout
    return (
        layout is not None and layout.is_plain and len(message.tensors) == 1 and message.tensors[0].datatype in FLOATS
    )


def made_ready(model: Model, message: Message, *, backward: bool, max_answer: int) -> Ready:
    """Look at all of a request but values. Raises as `answer`."""
    wire = message.parameters.get("wire", "exact")
    if wire not in int8g64.WIRES:
        raise InputError(f"parameter wire: expected {' or '.join(int8g64.WIRES)}, got {wire!r}"[:300])
    block = model.block
    tensors = _unpacked(message.tensors, block, wire)
    dy = tensors.pop("dy", None)
    if backward and dy is not None and "x" not in tensors and not block.gradient_needs_x:
        tensors["x"] = dy.new_zeros(()).expand(*dy.shape[:-1], block.x.shape[-1])  # takes no memory
    checked = None if message.layout is None else message.layout.checked
    check = (model.version, backward, max_answer)
    if checked is None or check not in checked:
        _check_wanted(message, "dx" if backward else "y", wire)
        block.refuse(tensors)
        _check_size(block.answer_elements(tuple(tensors["x"].shape)), tensors["x"], message, max_answer, wire)
        if backward:
            dy = _checked_gradient(dy, tensors["x"], block.y)
        elif dy is not None:
            raise InputError("expected no dy, which goes to the model's gradient")
        if checked is not None:
            checked.add(check)
    return Ready(model, message, tensors, dy, wire)


def computed(ready: Ready, deadline: float | None) -> tuple[list[Buffer], int]:
    """As `answer`, once the values are there."""
    model, message, tensors, dy, wire = ready
    block = model.block
    with model.lock or contextlib.nullcontext():
        if deadline is not None and time.monotonic() > deadline:
            raise Refusal(408, "deadline")
        there = tensors if model.device.type == "cpu" else {n: t.to(model.device) for n, t in tensors.items()}
        if dy is not None:
            found = ("dx", block.backward(there, dy.to(model.device)).cpu())
        else:
            found = ("y", block.forward(there).cpu())
    padded = wire != "exact" and any(
        each.name == "x_q" and each.shape[-1] > block.x.shape[-1] for each in message.tensors
    )
    answered = Message(
        tensors=_packed(*found, wire, padded=padded), id=message.id, binary=message.binary, version=model.version,
        model=model.name + (BACKWARD if dy is not None else ""), parameters={} if wire == "exact" else {"wire": wire},
    )  # fmt: skip
    return encode_response(answered)


def is_small(model: Model, message: Message) -> bool:
    """Whether it is done in less time than it would take to hand it to another thread and back: 0.4 ms of a core."""
    if not model.at_once or not message.tensors or not message.binary:
        return False
    first = message.tensors[0]
    # A weight that comes from memory takes as long as some products with it.
    work = (math.prod(first.shape[:-1]) + _AS_ROWS) * model.weights
    return work <= model.at_once and memoryview(first.data).nbytes <= SMALL_BYTES


def describe(model: Model, versions: list[str], *, backward: bool) -> dict[str, Any]:
    """A model's metadata, as the protocol has it; parameters are ours."""
    block, own = model.block, NAMES[model.block.dtype]
    ins, outs = [*block.inputs], [block.y]
    if backward:
        x = block.x._replace(optional=not block.gradient_needs_x)
        ins, outs = [x, *block.others, _gradient(block.y)], [block.x._replace(name="dx")]

    def shown(ports: list[Port]) -> list[dict[str, Any]]:
        return [
            {
                "name": port.name, "shape": list(port.shape), "optional": port.optional,
                "datatype": own if own in port.datatypes else port.datatypes[0],
            }
            for port in ports
        ]  # fmt: skip

    return {
        "name": model.name + (BACKWARD if backward else ""), "versions": versions, "platform": "apt_model",
        "inputs": shown(ins), "outputs": shown(outs),
        "parameters": {
            "kind": model.kind, "wire": list(int8g64.WIRES), "version": model.version, "datatypes": list(FLOATS),
        },
    }  # fmt: skip


def _unpacked(tensors: tuple[WireTensor, ...], block: Block, wire: str) -> dict[str, Tensor]:
    """The tensors by name; with int8g64 each pair `n_q` and `n_scale` is `n`."""
    found: dict[str, Tensor] = {}
    for each in tensors:
        if each.datatype not in DTYPES:
            raise InputError(f"{each.name}: expected a type of {', '.join(DTYPES)}, got {each.datatype}"[:300])
        found[each.name] = as_tensor(each)
    if wire == "exact":
        return found
    for port in (*block.inputs, _gradient(block.y)):
        name = port.name
        q, scale = found.pop(f"{name}_q", None), found.pop(f"{name}_scale", None)
        if q is None and scale is None:
            continue
        width = port.shape[-1]
        groups = -(-width // int8g64.GROUP)
        if q is None or scale is None or port.datatypes != FLOATS:
            raise InputError(f"expected both {name}_q and {name}_scale"[:300])
        if name in found:
            raise InputError(f"expected {name} once, got it quantised and exact"[:300])
        whole = NAMES[q.dtype] == "INT8" and NAMES[scale.dtype] == "FP16" and q.ndim == scale.ndim > 0
        sizes = (width, groups * int8g64.GROUP)  # padded, or as wide as the numbers are
        if not whole or q.shape[:-1] != scale.shape[:-1] or q.shape[-1] not in sizes or scale.shape[-1] != groups:
            raise InputError(
                f"expected {name}_q INT8 [..., {groups * int8g64.GROUP}] and {name}_scale FP16 [..., {groups}], got "
                f"{NAMES[q.dtype]} {list(q.shape)} and {NAMES[scale.dtype]} {list(scale.shape)}"
            )
        found[name] = int8g64.unpack(q[..., :width].contiguous(), scale, width, torch.float32)
    return found


def _packed(name: str, tensor: Tensor, wire: str, *, padded: bool) -> tuple[WireTensor, ...]:
    """The answer's tensors; with int8g64 as wide as the numbers, or padded to groups where `x_q` came so."""
    if wire == "exact":
        return (to_wire(name, tensor),)
    q, scale = int8g64.pack(tensor)
    q = F.pad(q, (0, -q.shape[-1] % int8g64.GROUP if padded else 0))
    return to_wire(f"{name}_q", q), to_wire(f"{name}_scale", scale)


def _gradient(y: Port) -> Port:
    return y._replace(name="dy")


def _checked_gradient(dy: Tensor | None, x: Tensor, y: Port) -> Tensor:
    if dy is None:
        raise InputError("expected inputs x and dy, the gradient of y; dy did not come")
    _gradient(y).refuse(dy)
    if dy.shape[:-1] != x.shape[:-1]:
        raise InputError(f"dy: expected {[*x.shape[:-1], dy.shape[-1]]}, as x is {list(x.shape)}, got {list(dy.shape)}")
    return dy


def _check_wanted(message: Message, name: str, wire: str) -> None:
    """All outputs come, whichever are asked for; one that there is not is an error."""
    known = (name,) if wire == "exact" else (f"{name}_q", f"{name}_scale")
    if not set(message.wanted) <= set(known):
        raise InputError(f"expected outputs {', '.join(known)}, got {', '.join(message.wanted)}"[:300])


def _check_size(elements: int, x: Tensor, message: Message, most: int, wire: str) -> None:
    """An answer may be far wider than what was sent."""
    elements = max(elements, x.numel())
    nbytes = elements * x.itemsize if wire == "exact" else elements + elements // 32
    if nbytes > most:
        raise Refusal(413, f"expected an answer of at most {most} bytes, it would be {nbytes}: cut x")
    if not message.binary and elements > _JSON_ELEMENTS:
        raise Refusal(
            413, f"expected at most {_JSON_ELEMENTS} elements in JSON, got {elements}: ask for binary_data_output"
        )
