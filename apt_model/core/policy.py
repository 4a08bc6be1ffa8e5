"""How models built from now on should run: one policy for the process, set by the facade, read by the models.

Models and the facade that sets the policy never import each other; they meet here. Imports no torch.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from apt_model.core.errors import InputError
from apt_model.core.options import check_types


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a model does on the device that it is on. A value that cannot be met raises `ConfigError`."""

    mode: Literal["balanced"]
    """balanced: autocast to what the device computes in, weights in full precision and trainable."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast where the device multiplies bf16 natively, else fp32."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """auto: recompute activations in backward when their estimate exceeds the device's free memory."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first value that cannot be met."""
        check_types(self)

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
