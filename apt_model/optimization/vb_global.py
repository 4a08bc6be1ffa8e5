"""One line to enable: `import apt_model.optimization.vb_global as vb; vb.enable()`.

Enabling sets a policy for the process, which APT models built afterwards follow. It changes no setting of torch and no
model that exists. Importing this loads no torch; `enable` loads it for the banner and `status`.
"""

from typing import Any, TypeVar

from apt_model.core.errors import ConfigError, InputError
from apt_model.core.policy import FollowsPolicy, Policy, current_policy, set_policy

M = TypeVar("M")


def enable(verbose: bool = True) -> None:
    """Enable the balanced mode."""
    enable_balanced_mode(verbose=verbose)


def enable_balanced_mode(verbose: bool = True) -> None:
    """Train at full quality in less memory and time, by what this machine has.

    bf16 autocast where the device multiplies bf16 natively, full-precision trainable weights, activations recomputed
    in backward when they would not fit.

    Args:
        verbose: write to stderr what is and what is not in force on this machine.
    """
    set_policy(Policy(mode="balanced"))
    if verbose:
        from apt_model.optimization import banner  # noqa: PLC0415 - the quiet call loads no torch

        banner.show(status())


def disable() -> None:
    """Clear the policy: models built from now on are plain. Those that follow one already keep it."""
    set_policy(None)


def is_enabled() -> bool:
    """Whether a mode is enabled in this process."""
    return current_policy() is not None


def status() -> dict[str, Any]:
    """The facts behind the banner's rows, as plain data, and the mode; works whether enabled or not."""
    from apt_model.optimization import facts  # noqa: PLC0415 - importing this module loads no torch

    return facts.gather()


def optimize(model: M) -> M:
    """Give a model that exists already the policy in force, and return it.

    Raises:
        ConfigError: nothing is enabled.
        InputError: the model is not one that follows a policy.
    """
    policy = current_policy()
    if policy is None:
        raise ConfigError("vb.optimize: expected an enabled mode, got none", remedy="call vb.enable() first")
    if not isinstance(model, FollowsPolicy):
        raise InputError(
            f"vb.optimize: expected an APTModel, or a model with a method apply_policy(policy), got "
            f"{type(model).__name__}; this version optimizes no other module",
            remedy="run another module under torch.autocast(device.type, torch.bfloat16) yourself",
        )
    model.apply_policy(policy)
    return model
