"""`CloudNPULinear`: an `nn.Linear` whose product is computed elsewhere, checked, and computed here where it cannot be.

The parameters live here and are those of `nn.Linear`: a state dict is plain. A server is given them once, under their
digest; a forward sends activations alone. What comes back is checked against the local weights (`freivalds`).

Weights that change are other weights. A layer that is being trained computes here from the first change on, since each
step would send all of them; otherwise changed weights are pushed again. A change through `.data` is not noticed: call
`refresh()`. Under autocast the product is that of the weights in autocast's type, which are other weights too.
"""

import contextlib
import threading
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from apt_model.cloud.backend import CloudBackend
from apt_model.cloud.client import Tally
from apt_model.cloud.freivalds import INT8_REPEATS, REPEATS, Freivalds
from apt_model.cloud.int8g64 import GROUP, pack, unpack
from apt_model.cloud.offload import Offload, Output, Wire, why_here
from apt_model.cloud.tensors import ACTIVATIONS, Weights


class _Pushed:
    """Weights as they were when they were digested, and what checks their products."""

    def __init__(self, key: tuple[Any, ...], layer: "CloudNPULinear", cast: torch.dtype | None) -> None:
        self.key, self.cast = key, cast
        # Copies: an answer in flight is checked against what was sent, whatever happens to the parameters.
        tensors = {
            name: each.detach().to("cpu", cast or each.dtype, copy=True)
            for name, each in layer.named_parameters(recurse=False)
        }
        self.weights = Weights(kind="linear", config={}, tensors=tensors)
        int8 = layer._offload.wire == "int8g64"  # noqa: SLF001 - ours
        # A fold is a group then, so that a wrong scale stands beside nobody else's rounding.
        self._fold = GROUP if int8 else None
        self._repeats = INT8_REPEATS if int8 else REPEATS
        self.check: Freivalds | None = None
        if layer.verify:
            self.check = Freivalds(tensors["weight"], tensors.get("bias"), fold=self._fold, repeats=self._repeats)
        self._layer_verify = layer.verify
        self._backward: Freivalds | None = None

    def check_backward(self) -> Freivalds | None:
        """What checks dx = dy W; made when it is needed first."""
        if self._backward is None and self._layer_verify:
            self._backward = Freivalds(self.weights.tensors["weight"].T, fold=self._fold, repeats=self._repeats)
        return self._backward


class CloudNPULinear(nn.Linear):
    """y = x W^T + b, computed by a cloud backend.

    Args:
        in_features: width of x.
        out_features: width of y.
        bias: as in `nn.Linear`.
        cloud_backend: one of `get_cloud_npu_manager()`; None computes here.
        fallback_local: compute here what the cloud does not; otherwise its error is raised.
        wire: "exact", or "int8g64": activations in 8 bits both ways, lossy.
        verify: check every token's product.
        deadline_s: seconds for a forward, all attempts included.
        push: give the server weights that it does not hold.
        device: of the parameters.
        dtype: of the parameters; fp16, bf16 and fp32 are computed elsewhere.

    Raises:
        ConfigError: a backend that cannot run a layer, without fallback_local.
        CloudError: from a forward, without fallback_local.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        cloud_backend: CloudBackend | None,
        fallback_local: bool = True,
        wire: Wire = "exact",
        verify: bool = True,
        deadline_s: float = 10.0,
        push: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.verify = verify
        self._offload = Offload(
            cloud_backend, who=f"CloudNPULinear({in_features}, {out_features})", fallback_local=fallback_local,
            wire=wire, deadline_s=deadline_s, push=push,
        )  # fmt: skip
        self._known: _Pushed | None = None
        self._guard = _Guard()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> "CloudNPULinear":
        """The same layer with the same parameters, computed elsewhere; `options` are those of the constructor."""
        weight = linear.weight
        made = cls(
            linear.in_features, linear.out_features, linear.bias is not None,
            device="meta", dtype=weight.dtype, **options,
        )  # fmt: skip
        made.weight, made.bias = weight, linear.bias
        return made.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """X [..., in] to y [..., out]."""
        return self._not_compiled(input) if torch.compiler.is_compiling() else self._forward(input)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _not_compiled(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        offload = self._offload
        cast, known = _cast_of(x), None
        sent = x if cast is None else x.to(cast)
        reason = why_here(sent, autocast=True) or self._unsuited(sent, cast)
        if reason is None and offload.tensors is not None:
            known, reason = self._current(cast)
        rows = x.numel() // self.in_features if self.in_features else 0

        def elsewhere(tally: Tally) -> Tensor:
            assert known is not None
            with _no_autocast(x.device.type):
                if torch.is_grad_enabled() and any(each.requires_grad for each in (x, *self._held())):
                    weight, bias = (each if each is None else each.to(sent.dtype) for each in (self.weight, self.bias))
                    found: Tensor = _Elsewhere.apply(sent, weight, bias, offload, known, tally)  # type: ignore[no-untyped-call]
                    return found
                return _product(sent.detach(), offload, known, tally, self.out_features)

        return offload.forward(rows, reason, elsewhere, lambda: F.linear(x, self.weight, self.bias))

    def push_weights(self) -> int:
        """Give the server the weights now; bytes that were sent, 0 where it holds them."""

        def now() -> Weights:
            known, _ = self._current(push=True)
            assert known is not None
            return known.weights

        return self._offload.give(now)

    def refresh(self) -> None:
        """Look at the weights anew: needed after a change through `.data`, which nothing else can see."""
        self._known = None

    def get_stats(self) -> dict[str, Any]:
        """What became of the forwards: cloud_calls + local_calls + raised = forwards; times in seconds."""
        return self._offload.read()

    def extra_repr(self) -> str:
        """As `nn.Linear`'s, with where it is computed."""
        return f"{super().extra_repr()}, cloud_backend={self._offload.backend!r}, wire={self._offload.wire}"

    def _unsuited(self, x: Tensor, cast: torch.dtype | None) -> str | None:
        """What F.linear refuses in its own words, and weights that no server computes with."""
        fits = x.dim() > 0 and x.shape[-1] == self.in_features and x.dtype == (cast or self.weight.dtype)
        if not fits or x.device != self.weight.device or self.weight.dtype not in ACTIVATIONS:
            return "shape, type or device"
        return None

    def _held(self) -> Iterable[Tensor]:
        """The parameters; those of a layer as it was made are found without a search."""
        if self._modules:
            return self.parameters()
        return [each for each in self._parameters.values() if each is not None]

    def _current(self, cast: torch.dtype | None = None, *, push: bool = False) -> tuple[_Pushed | None, str | None]:
        """The weights as they are now and autocast has them, as a server knows them, or why they stay here."""
        key = tuple((id(each), each._version, each.data_ptr()) for each in self._held())  # noqa: SLF001 - torch's counter of changes
        known = self._known
        if known is not None and known.key == key and known.cast == cast:
            return known, None
        trained = torch.is_grad_enabled() and any(each.requires_grad for each in self.parameters())
        if known is not None and known.key != key and trained and not push:
            return None, "weights in training"
        with self._guard.lock:
            known = self._known
            if known is None or (known.key, known.cast) != (key, cast):
                self._known = known = _Pushed(key, self, cast)
            return known, None


def _cast_of(x: Tensor) -> torch.dtype | None:
    """The type that autocast computes a product of `x` in; None outside of it."""
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return cast if x.dtype in ACTIVATIONS else None


def _no_autocast(kind: str) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


class _Guard:
    """A lock that a copy of a layer does not share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: object) -> "_Guard":
        return _Guard()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Guard, ()


def _product(x: Tensor, offload: Offload, known: _Pushed, tally: Tally, out: int) -> Tensor:
    """X [..., in] to y [..., out], elsewhere and checked."""
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = offload.ask(known.weights, {"x": flat}, Output(name="y", rest=(out,)), tally)
    if known.check is not None:
        known.check.check(_as_read(flat, offload), y.cpu(), offload.who, int8=offload.wire == "int8g64")
    return y.view(*x.shape[:-1], out)


def _as_read(x: Tensor, offload: Offload) -> Tensor:
    """What the server read of what was sent."""
    x = x.cpu()
    return unpack(*pack(x), x.shape[-1], x.dtype) if offload.wire == "int8g64" else x


class _Elsewhere(torch.autograd.Function):
    """The product elsewhere; its gradient to x elsewhere, those to the parameters here."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, bias, offload, known, tally = args
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.offload, ctx.known, ctx.shape = offload, known, x.shape
        ctx.has_bias = bias is not None
        return _product(x.detach(), offload, known, tally, weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0])
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dx = _input_gradient(ctx, dy, weight).view(ctx.shape) if wants_x else None
        dw = dy.T @ x.reshape(-1, weight.shape[1]) if wants_weight else None
        db = dy.sum(0) if ctx.has_bias and wants_bias else None
        return dx, dw, db, None, None, None


def _input_gradient(ctx: Any, dy: Tensor, weight: Tensor) -> Tensor:
    offload, known = ctx.offload, ctx.known

    def elsewhere(tally: Tally) -> Tensor:
        output = Output(name="dx", rest=(weight.shape[1],))
        # x is not sent: a product's gradient does not depend on it.
        dx: Tensor = offload.ask(known.weights, {"dy": dy}, output, tally, suffix=".bwd")
        check = known.check_backward()
        if check is not None:
            check.check(_as_read(dy, offload), dx.cpu(), offload.who, int8=offload.wire == "int8g64")
        return dx

    return offload.backward(elsewhere, lambda: dy @ weight)
