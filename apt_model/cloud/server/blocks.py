"""What may be served: kinds of blocks, each made from JSON and tensors. An allow-list; nothing on the wire is code."""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_model.cloud.server.tensors import FLOATS
from apt_model.cloud.tensors import NAMES
from apt_model.core.errors import ConfigError, InputError
from apt_model.core.options import require, unknown_name

Tensors = Mapping[str, Tensor]
QUANTIZE = "quantize"
"""The option that every kind has: "nvfp4" or "mxfp4" keeps the weights in 4 bits."""
_SHOWN = 8


class Port(NamedTuple):
    """A tensor that goes in or comes out."""

    name: str
    datatypes: tuple[str, ...]
    shape: tuple[int, ...]
    """-1 is free. The first may stand for several where `spread` says so."""
    optional: bool = False
    spread: bool = False
    """Whether any number of dimensions may come before the last."""

    def refuse(self, tensor: Tensor) -> None:
        """Raise `InputError` where this is no such tensor."""
        datatype = NAMES.get(tensor.dtype, str(tensor.dtype))
        if datatype not in self.datatypes:
            raise InputError(f"{self.name}: expected {' or '.join(self.datatypes)}, got {datatype}")
        wanted, shape = self.shape, tuple(tensor.shape)
        if self.spread:
            wanted, shape = wanted[-1:], shape[-1:]
        if len(wanted) != len(shape) or any(want not in (-1, size) for want, size in zip(wanted, shape, strict=True)):
            spread = "..., " if self.spread else ""
            sizes = ", ".join("any" if want == -1 else str(want) for want in wanted)
            raise InputError(f"{self.name}: expected a shape [{spread}{sizes}], got {list(tensor.shape)}")


class Block:
    """A module with its ports: `x` goes in and `y` comes out, both of one of the float types.

    Args:
        module: called with `x` of its own type, and with its other tensors by name.
        x, y: the ports of these.
        others: further inputs.
    """

    gradient_needs_x = True
    """Whether `backward` looks at the values of `x`."""

    def __init__(self, module: nn.Module, x: Port, y: Port, others: tuple[Port, ...] = ()) -> None:
        self.module, self.x, self.y, self.others = module, x, y, others
        self.dtype = next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Of a forward."""
        return (self.x, *self.others)

    def answer_elements(self, shape: tuple[int, ...]) -> int:
        """Elements of `y` for an `x` of this shape, before it is computed."""
        return math.prod(shape[:-1]) * self.y.shape[-1]

    def refuse(self, tensors: Tensors) -> None:
        """Raise `InputError` where tensors are missing, unknown or of another shape."""
        known = {port.name: port for port in self.inputs}
        for name, tensor in tensors.items():
            if name not in known:
                raise InputError(f"expected inputs {', '.join(known)}, got {name!r}"[:300])
            known[name].refuse(tensor)
        missing = [name for name, port in known.items() if not port.optional and name not in tensors]
        if missing:
            raise InputError(f"expected inputs {', '.join(missing)}, which did not come")

    def forward(self, tensors: Tensors) -> Tensor:
        """`y` of the type that `x` has; the module computes in its own."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(tensors)
        return self._call(tensors).to(tensors["x"].dtype)

    def backward(self, tensors: Tensors, dy: Tensor) -> Tensor:
        """The gradient of `x` for that of `y`, of the type that `x` has; the forward is computed again."""
        with torch.enable_grad():
            x = tensors["x"].to(self.dtype).detach().requires_grad_()
            y = self._call({**tensors, "x": x})
            return torch.autograd.grad(y, x, dy.to(y.dtype))[0].to(tensors["x"].dtype)

    def sample(self) -> dict[str, Tensor]:
        """Inputs to try it with."""
        shape = [1 if size == -1 else size for size in self.x.shape]
        return {"x": torch.ones(shape, dtype=self.dtype)}

    def _call(self, tensors: Tensors) -> Tensor:
        found: Tensor
        if len(tensors) == 1:
            found = self.module(tensors["x"].to(self.dtype))
        else:
            others = {name: tensor for name, tensor in tensors.items() if name != "x"}
            found = self.module(tensors["x"].to(self.dtype), **others)
        return found


class Kind(NamedTuple):
    """A kind of block."""

    name: str
    make: Callable[[Mapping[str, Any], Tensors], Block]
    """From its options and all its tensors. Raises `InputError` or `ConfigError` where they are not its own."""
    options: tuple[str, ...] = ()
    """Names that its JSON may have, beside `quantize`."""
    keeps: Callable[[Mapping[str, Any], str], bool] = lambda _options, _name: True
    """Which tensors are its own, of a file of many that is served by its prefix."""


KINDS: dict[str, Kind] = {}
"""The allow-list, by name. Layers above register theirs before the server starts."""


def register(kind: Kind) -> None:
    """Put a kind on the list."""
    KINDS[kind.name] = kind


def make_block(name: str, config: Mapping[str, Any], tensors: Tensors) -> Block:
    """The block of these tensors, on the CPU and frozen."""
    kind = KINDS.get(name)
    if kind is None:
        raise ConfigError(f"expected a block of {', '.join(KINDS)}, got {name!r}"[:300])
    for option in config:
        if option not in (*kind.options, QUANTIZE):
            raise unknown_name(str(option)[:100], (*kind.options, QUANTIZE), f"block {name}")
    quantize = config.get(QUANTIZE)
    require(quantize in (None, "nvfp4", "mxfp4"), f"{name}.{QUANTIZE}", "nvfp4 or mxfp4", quantize)
    block = kind.make({key: value for key, value in config.items() if key != QUANTIZE}, tensors)
    block.module.requires_grad_(requires_grad=False).eval()
    return block


def fill(module: nn.Module, tensors: Tensors, where: str) -> None:
    """Give a module on meta its parameters, of one float type; `InputError` where names or shapes differ."""
    held = dict(module.named_parameters(remove_duplicate=False))
    missing, strange = sorted(held.keys() - tensors), sorted(tensors.keys() - held)
    if missing or strange:
        raise InputError(
            f"{where}: expected tensors as the configuration says; missing {missing[:_SHOWN]}, unknown "
            f"{[name[:100] for name in strange[:_SHOWN]]}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != held[name].shape:
            raise InputError(f"{where}: expected {name} {list(held[name].shape)}, got {list(tensor.shape)}")
        check_float(name, tensor)
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        raise InputError(f"{where}: expected weights of one type, got several")
    module.load_state_dict(dict(tensors), strict=False, assign=True)


def check_float(name: str, tensor: Tensor) -> None:
    """Raise `InputError` unless it is of a type that a forward takes."""
    if NAMES.get(tensor.dtype) not in FLOATS:
        raise InputError(f"{name}: expected {', '.join(FLOATS)}, got {tensor.dtype}")


def two_ports(wide_in: int, wide_out: int) -> tuple[Port, Port]:
    """`x` [..., wide_in] and `y` [..., wide_out]."""
    return (
        Port("x", FLOATS, (-1, wide_in), spread=True),
        Port("y", FLOATS, (-1, wide_out), spread=True),
    )


class _Linear(Block):
    """x W^T + b; its backward needs no forward."""

    gradient_needs_x = False

    @cached_property
    def _plain(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias where the module is nothing but these: short products are found sooner without it."""
        module = self.module
        if type(module) is not nn.Linear:
            return None
        return module.weight.detach(), None if module.bias is None else module.bias.detach()

    def _call(self, tensors: Tensors) -> Tensor:
        if self._plain is None:
            return super()._call(tensors)
        return F.linear(tensors["x"].to(self.dtype), *self._plain)

    @torch.no_grad()
    def backward(self, tensors: Tensors, dy: Tensor) -> Tensor:
        if type(self.module) is not nn.Linear:  # in 4 bits it knows its own
            return super().backward(tensors, dy)
        x = tensors["x"]
        weight = self.module.weight
        return (dy.to(self.dtype).reshape(-1, dy.shape[-1]) @ weight).view(x.shape).to(x.dtype)


def _linear(_: Mapping[str, Any], tensors: Tensors) -> Block:
    """A weight [out, in], and a bias [out] or none."""
    weight = tensors.get("weight")
    if weight is None or weight.ndim != 2 or 0 in weight.shape:
        raise InputError(f"linear: expected a weight [out, in], got {_shapes(tensors)}")
    wide_out, wide_in = weight.shape
    module = nn.Linear(wide_in, wide_out, bias="bias" in tensors, device="meta", dtype=weight.dtype)
    fill(module, tensors, "linear")
    return _Linear(module, *two_ports(wide_in, wide_out))


class _MLP(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x) where there is a gate."""

    def __init__(self, activation: str, *, gated: bool) -> None:
        super().__init__()
        self.activation, self.gated = activation, gated
        self.gate: nn.Module = nn.Identity()
        self.up: nn.Module = nn.Identity()
        self.down: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        act = _ACTIVATIONS[self.activation]
        inner = act(self.gate(x)) * self.up(x) if self.gated else act(self.up(x))
        found: Tensor = self.down(inner)
        return found


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def _mlp(config: Mapping[str, Any], tensors: Tensors) -> Block:
    """Matrices up.weight [hidden, in], down.weight [out, hidden], gate.weight or none, and their biases or none."""
    activation = config.get("activation", "gelu")
    known = isinstance(activation, str) and activation in _ACTIVATIONS
    require(known, "mlp.activation", " or ".join(_ACTIVATIONS), activation)
    gated = "gate.weight" in tensors
    module = _MLP(activation, gated=gated)
    for name in ("gate", "up", "down") if gated else ("up", "down"):
        weight = tensors.get(f"{name}.weight")
        if weight is None or weight.ndim != 2 or 0 in weight.shape:
            raise InputError(f"mlp: expected {name}.weight [out, in], got {_shapes(tensors)}")
        layer = nn.Linear(
            weight.shape[1], weight.shape[0], bias=f"{name}.bias" in tensors, device="meta", dtype=weight.dtype
        )
        setattr(module, name, layer)
    fill(module, tensors, "mlp")
    hidden, wide_in = tensors["up.weight"].shape
    wide_out, inner = tensors["down.weight"].shape
    if inner != hidden or (gated and tensors["gate.weight"].shape != (hidden, wide_in)):
        raise InputError(f"mlp: expected matrices that follow each other, got {_shapes(tensors)}")
    return Block(module, *two_ports(wide_in, wide_out))


def _shapes(tensors: Tensors) -> str:
    shown = list(tensors.items())[:_SHOWN]
    return ", ".join(f"{name[:100]} {list(tensor.shape)}" for name, tensor in shown) or "no tensors"


register(Kind("linear", _linear))
register(Kind("mlp", _mlp, ("activation",)))
