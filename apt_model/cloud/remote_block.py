"""`RemoteBlock`: a frozen block, or several in a row, computed elsewhere in one request; gradients flow through it.

One request over many layers is what makes offloading worth its round trip. The weights do not train here: what trains
stands before or behind (LoRA adapters, a head), and gets its gradient through the block's backward, a second request.
Of a block's numbers the shape is checked, that they are finite where x is, and by `spot_check` a sample of them
(`CloudNPULinear` checks every one).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from apt_model.cloud.backend import CloudBackend
from apt_model.cloud.client import Tally
from apt_model.cloud.offload import Offload, Output, Wire, why_here
from apt_model.cloud.spot_check import SpotCheck
from apt_model.cloud.tensors import Weights
from apt_model.core.errors import ConfigError, IntegrityError

Here = Callable[[Tensor, slice], Tensor]
"""The block here: of some rows of x, and of the further inputs that belong to them."""
ALL = slice(None)


class RemoteBlock(nn.Module):
    """A block that a server knows by its kind, with these weights.

    Args:
        kind: such as "linear" or "mlp"; "apt_block" and "hf_block" are several layers of a model in a row.
        config: the kind's options, of JSON's types.
        tensors: its weights, by name. They are not parameters of this module, and are not in its state dict.
        cloud_backend: one of `get_cloud_npu_manager()`; None computes here.
        local: the same block here, for the fallback; None has none.
        out_features: the last dimension of what comes out; None is that of x.
        fallback_local: compute here what the cloud does not, where there is `local`.
        wire: "exact", or "int8g64": activations in 8 bits both ways, lossy.
        deadline_s: seconds for a forward, all attempts included.
        push: give the server weights that it does not hold.
        spot_check: the share of answers of which one row, drawn by chance, is computed here as well; needs `local`.

    Raises:
        ConfigError: nothing that could compute it.
        CloudError: from a forward, without a fallback.
    """

    def __init__(
        self,
        kind: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        cloud_backend: CloudBackend | None,
        local: nn.Module | None = None,
        out_features: int | None = None,
        fallback_local: bool = True,
        wire: Wire = "exact",
        deadline_s: float = 30.0,
        push: bool = True,
        spot_check: float = 0.0,
    ) -> None:
        super().__init__()
        self._offload = Offload(
            cloud_backend, who=f"RemoteBlock({kind})", fallback_local=fallback_local and local is not None, wire=wire,
            deadline_s=deadline_s, push=push,
        )  # fmt: skip
        self._check = SpotCheck(spot_check, int8=wire == "int8g64")
        if spot_check and local is None:
            raise ConfigError(
                "RemoteBlock: spot_check computes rows here, and there is no local block", remedy="local="
            )
        frozen = {name: each.detach() for name, each in tensors.items()}
        self._about = (kind, dict(config), frozen)
        self._known: tuple[tuple[int, ...], Weights] | None = None
        self.out_features = out_features
        # In a tuple, so that it is no part of this module's state: it belongs to the caller.
        self._local = (local,)
        if local is not None and any(each.requires_grad for each in local.parameters()):
            raise ConfigError(
                "RemoteBlock: expected a local block whose parameters are frozen, got some that train",
                remedy="local.requires_grad_(False); what trains stands before or behind the block",
            )

    @property
    def weights(self) -> Weights:
        """As they are now: those that were changed in place are other weights, and are pushed again."""
        kind, config, tensors = self._about
        key = tuple(each._version for each in tensors.values())  # noqa: SLF001 - torch's counter of changes
        known = self._known
        if known is None or known[0] != key:
            self._known = known = (key, Weights(kind=kind, config=config, tensors=tensors))
        return known[1]

    def forward(self, x: Tensor, **others: Tensor) -> Tensor:
        """X [rows, ..., width] to y [rows, ..., out]; `others` are further inputs of its kind, with as many rows."""

        def here(x: Tensor, rows: slice) -> Tensor:
            return self._here(x, {name: each[rows] for name, each in others.items()})

        return self.compute(x, others, here)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compute(self, x: Tensor, others: Mapping[str, Tensor], here: Here, why_local: str | None = None) -> Tensor:
        """As `forward`, for a caller that knows how to compute the block here.

        Args:
            x: [rows, ..., width].
            others: what is sent beside it.
            here: the block here.
            why_local: a reason not to send this one.
        """
        reason = why_local or why_here(x)
        if x.dim() < 2:  # rows are what requests are cut at
            reason = "one row without a dimension of rows"
        elif torch.is_grad_enabled() and any(each.requires_grad for each in others.values()):
            reason = "a further input that wants a gradient"  # a server gives that of x alone

        def elsewhere(tally: Tally) -> Tensor:
            if torch.is_grad_enabled() and x.requires_grad:
                found: Tensor = _Through.apply(x, self, others, here, tally)  # type: ignore[no-untyped-call]
                return found
            return self._ask(self.weights, x.detach(), others, here, tally)

        return self._offload.forward(x.numel() // max(x.shape[-1], 1), reason, elsewhere, lambda: here(x, ALL))

    def push_weights(self) -> int:
        """Give the server the weights now; bytes that were sent, 0 where it holds them."""
        return self._offload.give(lambda: self.weights)

    def get_stats(self) -> dict[str, Any]:
        """As `CloudNPULinear.get_stats`; `spot_checks` are rows that were computed here to compare them."""
        return self._offload.read()

    def extra_repr(self) -> str:
        """What it is and where it is computed."""
        return f"{self._about[0]}, cloud_backend={self._offload.backend!r}, local={self._local[0] is not None}"

    def _ask(self, weights: Weights, x: Tensor, others: Mapping[str, Tensor], here: Here, tally: Tally) -> Tensor:
        output = Output(name="y", rest=(*x.shape[1:-1], self.out_features or x.shape[-1]))
        who = self._offload.who
        found = _sound(self._offload.ask(weights, {"x": x, **others}, output, tally), x, who)
        self._compare(found, lambda row: here(x[row], row))
        return found

    @torch.no_grad()
    def _compare(self, found: Tensor, here: Callable[[slice], Tensor]) -> None:
        """Now and then, one row with the same row computed here."""
        row = self._check.row(len(found))
        if row is not None:
            self._offload.stats.add("spot_checks")
            self._check.check(found[row], here(row), self._offload.who)

    def _here(self, x: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        local = self._local[0]
        if local is None:
            raise ConfigError(
                f"{self._offload.who}: no server takes {x.dtype} {list(x.shape)}, and there is no local block",
                remedy="give local=, the same block here",
            )
        found: Tensor = local(x, **others)
        return found


def _sound(found: Tensor, x: Tensor, who: str) -> Tensor:
    """`IntegrityError` where what came is not finite though what was sent is."""
    if not bool(torch.isfinite(found).all()) and bool(torch.isfinite(x).all()):
        raise IntegrityError(f"{who}: finite inputs came back with numbers that are not; not used")
    return found


def _gradient(here: Here, x: Tensor, dy: Tensor, rows: slice) -> Tensor:
    with torch.enable_grad():
        x = x[rows].detach().requires_grad_()
        return torch.autograd.grad(here(x, rows), x, dy[rows])[0]


class _Through(torch.autograd.Function):
    """The block elsewhere, forward and backward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, block, others, here, tally = args
        ctx.save_for_backward(x)
        ctx.block, ctx.others, ctx.here, ctx.weights = block, others, here, block.weights
        found: Tensor = block._ask(ctx.weights, x.detach(), others, here, tally)  # noqa: SLF001 - its own
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        block: RemoteBlock = ctx.block
        dy = grads[0].contiguous()
        offload = block._offload  # noqa: SLF001

        def elsewhere(tally: Tally) -> Tensor:
            inputs = {"x": x, **ctx.others, "dy": dy}
            output = Output(name="dx", rest=tuple(x.shape[1:]))
            found = _sound(offload.ask(ctx.weights, inputs, output, tally, suffix=".bwd"), dy, offload.who)
            block._compare(found, lambda row: _gradient(ctx.here, x, dy, row))  # noqa: SLF001
            return found

        return offload.backward(elsewhere, lambda: _gradient(ctx.here, x, dy, ALL)), None, None, None, None
