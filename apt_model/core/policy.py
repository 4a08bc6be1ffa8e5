"""How models built from now on should run: one policy for the process, set by the facade, read by the models.

Models and the facade that sets the policy never import each other; they meet here. Imports no torch.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from apt_model.core.errors import InputError
from apt_model.core.options import check_types, require


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a model does on the device that it is on. A value that cannot be met raises `ConfigError`."""

    mode: Literal["balanced", "speed", "memory", "full"]
    """balanced: autocast to what the device computes in, weights in full precision and trainable. speed: inference,
    with weights in 16 or 4 bits, compiled blocks and CUDA graphs. memory: weights in 4 bits where they are frozen, and
    streamed where they do not fit. full: speed or memory, by whether the model trains, and streamed where needed."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the device multiplies bf16 natively, else fp32; by autocast, for speed as weights."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """auto: recompute activations in backward when their estimate exceeds the device's free memory."""
    fp4: Literal["auto", "on", "off"] = "auto"
    """Linear layers in 4 bits. auto: for speed those that are measured to be faster so, for memory those that are
    frozen, else none. on: all that can be, which freezes them."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of a model's blocks in inference. auto: for speed, on CUDA, where no layer is in 4 bits."""
    graphs: Literal["auto", "on", "off"] = "auto"
    """CUDA graphs of whole forwards in inference, a shape each. auto: for speed, on CUDA, where a replay is faster."""
    stream: Literal["auto", "on", "off"] = "auto"
    """Weights streamed from host memory and disk. auto: for memory and full, where they do not fit the device."""
    device_mb: float | None = None
    """MB (10^6 bytes) of the device's memory that weights may take; None: seven tenths of what is free."""
    host_mb: float | None = None
    """MB of host memory that streamed weights may take; None: eight tenths of what is free."""
    disk_mb: float | None = None
    """MB of disk that streamed weights may take; None: what is needed beyond host memory. 0: none."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first value that cannot be met."""
        check_types(self)
        for name in ("device_mb", "host_mb", "disk_mb"):
            value = getattr(self, name)
            good = value is None or value > 0 or (value == 0 and name == "disk_mb")
            require(good, f"Policy.{name}", "None or a number above 0", value)

    def resolve_precision(self, *, native_bf16: bool) -> Literal["fp32", "bf16"]:
        """The precision on a device that does or does not multiply bf16 natively."""
        if self.precision == "auto":
            return "bf16" if native_bf16 else "fp32"
        return self.precision

    def resolve_checkpointing(self, *, activation_bytes: int, free_bytes: int) -> bool:
        """Whether to recompute activations estimated at `activation_bytes` on a device with `free_bytes` free."""
        if self.activation_checkpointing == "auto":
            return activation_bytes > free_bytes
        return self.activation_checkpointing == "on"


@runtime_checkable
class FollowsPolicy(Protocol):
    """A model that takes a policy after it was built."""

    def apply_policy(self, policy: Policy | None) -> object:
        """Follow `policy` from now on; None goes back to plain behaviour."""


class _Process:
    policy: Policy | None = None


def current_policy() -> Policy | None:
    """The process's policy, or None."""
    return _Process.policy


def set_policy(policy: Policy | None) -> None:
    """Make `policy` the process's (one assignment, so that threads see the old one or the new one, whole)."""
    if policy is not None and not isinstance(policy, Policy):
        raise InputError(f"set_policy: expected a Policy or None, got {type(policy).__name__}")
    _Process.policy = policy
