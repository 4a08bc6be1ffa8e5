"""`RemoteBlock`: a frozen block, or several in a row, computed elsewhere in one request; gradients flow through it.

One request over many layers is what makes offloading worth its round trip. The weights do not train here: what trains
stands before or behind (LoRA adapters, a head), and gets its gradient through the block's backward, a second request.
Nothing checks a block's numbers but their shape and that they are finite where x is (`CloudNPULinear` has more).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from apt_model.cloud.backend import CloudBackend
from apt_model.cloud.client import Tally
from apt_model.cloud.offload import Offload, Output, Wire, why_here
from apt_model.cloud.tensors import Weights
from apt_model.core.errors import ConfigError, IntegrityError


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
    ) -> None:
        super().__init__()
        self._offload = Offload(
            cloud_backend, who=f"RemoteBlock({kind})", fallback_local=fallback_local and local is not None, wire=wire,
            deadline_s=deadline_s, push=push,
        )  # fmt: skip
        frozen = {name: each.detach() for name, each in tensors.items()}
        self.weights = Weights(kind=kind, config=dict(config), tensors=frozen)
        self.out_features = out_features
        # In a tuple, so that it is no part of this module's state: it belongs to the caller.
        self._local = (local,)
        if local is not None and any(each.requires_grad for each in local.parameters()):
            raise ConfigError(
                "RemoteBlock: expected a local block whose parameters are frozen, got some that train",
                remedy="local.requires_grad_(False); what trains stands before or behind the block",
            )

    def forward(self, x: Tensor, **others: Tensor) -> Tensor:
        """X [rows, ..., width] to y [rows, ..., out]; `others` are further inputs of its kind, with as many rows."""
        return self._forward(x, others)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward(self, x: Tensor, others: dict[str, Tensor]) -> Tensor:
        reason = why_here(x)
        if x.dim() < 2:  # rows are what requests are cut at
            reason = "one row without a dimension of rows"

        def elsewhere(tally: Tally) -> Tensor:
            if torch.is_grad_enabled() and x.requires_grad:
                found: Tensor = _Through.apply(x, self, others, tally)  # type: ignore[no-untyped-call]
                return found
            return self._ask(x.detach(), others, tally)

        return self._offload.forward(x.numel() // max(x.shape[-1], 1), reason, elsewhere, lambda: self._here(x, others))

    def push_weights(self) -> int:
        """Give the server the weights now; bytes that were sent, 0 where it holds them."""
        backend = self._offload.tensors
        sent = backend.push(self.weights) if backend else 0
        self._offload.stats.add("bytes_pushed", sent)
        return sent

    def get_stats(self) -> dict[str, Any]:
        """As `CloudNPULinear.get_stats`."""
        backend = self._offload.tensors
        states = [each.breaker.state for each in backend.client.endpoints] if backend else []
        return {**self._offload.stats.read(), "breaker": states}

    def extra_repr(self) -> str:
        """What it is and where it is computed."""
        return f"{self.weights.kind}, cloud_backend={self._offload.backend!r}, local={self._local[0] is not None}"

    def _ask(self, x: Tensor, others: Mapping[str, Tensor], tally: Tally) -> Tensor:
        output = Output(name="y", rest=(*x.shape[1:-1], self.out_features or x.shape[-1]))
        return _sound(self._offload.ask(self.weights, {"x": x, **others}, output, tally), x, self._offload.who)

    def _here(self, x: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        local = self._local[0]
        if local is None:
            raise ConfigError(
                f"{self._offload.who}: no server takes {x.dtype} {list(x.shape)}, and there is no local block",
                remedy="give local=, the same block here",
            )
        found: Tensor = local(x, **others)
        return found

    def _gradient_here(self, x: Tensor, others: Mapping[str, Tensor], dy: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self._here(x, others), x, dy)[0]


def _sound(found: Tensor, x: Tensor, who: str) -> Tensor:
    """`IntegrityError` where what came is not finite though what was sent is."""
    if not bool(torch.isfinite(found).all()) and bool(torch.isfinite(x).all()):
        raise IntegrityError(f"{who}: finite inputs came back with numbers that are not; not used")
    return found


class _Through(torch.autograd.Function):
    """The block elsewhere, forward and backward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, block, others, tally = args
        ctx.save_for_backward(x)
        ctx.block, ctx.others = block, others
        found: Tensor = block._ask(x.detach(), others, tally)  # noqa: SLF001 - its own
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
            return _sound(offload.ask(block.weights, inputs, output, tally, suffix=".bwd"), dy, offload.who)

        def here() -> Tensor:
            return block._gradient_here(x, ctx.others, dy)  # noqa: SLF001

        return offload.backward(elsewhere, here), None, None, None
