"""One line to enable: `import apt_model.optimization.vb_global as vb; vb.enable()`.

Enabling sets a policy for the process, which APT models built afterwards follow, and which `vb.optimize(model)` applies
to any module. It changes no setting of torch and no model that is not passed. Importing this loads no torch; `enable`
loads it for the banner and `status`.
"""

import weakref
from typing import Any, TypeVar

from apt_model.core.errors import ConfigError, InputError
from apt_model.core.options import from_dict
from apt_model.core.policy import FollowsPolicy, Policy, current_policy, set_policy

M = TypeVar("M")
# By the id of a model; an entry goes with its model, whose forward holds it.
_optimized: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def enable(verbose: bool = True, *, calibrate: bool = False, **options: Any) -> None:
    """Enable the balanced mode."""
    enable_balanced_mode(verbose, calibrate=calibrate, **options)


def enable_balanced_mode(verbose: bool = True, *, calibrate: bool = False, **options: Any) -> None:
    """Train at full quality in less memory and time, by what this machine has.

    bf16 autocast where the device multiplies bf16 natively, full-precision trainable weights, activations recomputed
    in backward when they would not fit.

    Args:
        verbose: write to stderr what is and what is not in force on this machine.
        calibrate: measure the speed of 4-bit products, the link and the disk in about a second, for the banner and
            `status`.
        options: fields of `apt_model.core.policy.Policy`, such as `precision="fp32"`.
    """
    _enable("balanced", verbose, calibrate, options)


def enable_speed_mode(verbose: bool = True, *, calibrate: bool = False, **options: Any) -> None:
    """Run models that are passed to `optimize` as fast as this machine can: for inference.

    Weights in bf16 where that is native, in 4 bits where a layer is measured to be faster so, compiled blocks, CUDA
    graphs. Arguments as those of `enable_balanced_mode`.
    """
    _enable("speed", verbose, calibrate, options)


def enable_memory_mode(verbose: bool = True, *, calibrate: bool = False, **options: Any) -> None:
    """Fit models that are passed to `optimize` into this machine, for inference and training.

    Frozen linear layers in 4 bits; weights streamed from host memory and disk where they do not fit the device;
    activations recomputed where they would not fit. Arguments as those of `enable_balanced_mode`; `device_mb`,
    `host_mb` and `disk_mb` are capacities.
    """
    _enable("memory", verbose, calibrate, options)


def enable_full_optimization(verbose: bool = True, *, calibrate: bool = False, **options: Any) -> None:
    """All that applies: the speed mode for a model that does not train, else the memory mode; streamed where needed.

    Arguments as those of `enable_balanced_mode`.
    """
    _enable("full", verbose, calibrate, options)


def disable() -> None:
    """Clear the policy, and give every model that was passed to `optimize` back as it was.

    Models built from now on are plain; APT models that were built while a mode was enabled go on following it.
    """
    set_policy(None)
    for key in list(_optimized):
        _forget(key)


def is_enabled() -> bool:
    """Whether a mode is enabled in this process."""
    return current_policy() is not None


def status() -> dict[str, Any]:
    """The facts behind the banner's rows, as plain data, and the mode; works whether enabled or not."""
    from apt_model.optimization import facts  # noqa: PLC0415 - importing this module loads no torch

    return facts.gather()


def stats() -> dict[str, Any]:
    """What has happened since `optimize`, by model: graphs and their replays, recomputed shapes, the stack's levels."""
    return {"models": [each.stats() for each in list(_optimized.values())]}


def optimize(model: M, *, restorable: bool = True) -> M:
    """Apply the policy in force to a model, in place, and return it. What is done, and why: `explain`.

    A model that was optimised before is first given back as it was.

    Args:
        model: any `nn.Module`, of Hugging Face too, or another model that follows a policy (`apply_policy`).
        restorable: whether `disable` gives back every bit of weights that were cast or put into 4 bits, which are kept
            in host memory for that.

    Raises:
        ConfigError: nothing is enabled.
        CapacityError: the weights do not fit and may not be streamed, or a level is too small; the model is as it was.
        InputError: it is no model.
    """
    policy = _policy("optimize")
    from torch import nn  # noqa: PLC0415 - importing this module loads no torch

    if isinstance(model, nn.Module):
        _optimize(model, policy, restorable)
    elif isinstance(model, FollowsPolicy):
        model.apply_policy(policy)
    else:
        raise InputError(
            f"vb.optimize: expected an nn.Module, or a model with a method apply_policy(policy), got "
            f"{type(model).__name__}"
        )
    return model


def explain(model: Any) -> Any:
    """Print what `optimize` does to `model`, or has done, layer group by layer group, with reasons; returns that.

    Raises:
        ConfigError: nothing is enabled, and the model is not optimised.
    """
    held = _optimized.get(id(model))
    if held is None:
        from apt_model.core.system.manager import get_device_manager  # noqa: PLC0415 - importing this loads no torch
        from apt_model.optimization.decision import decide  # noqa: PLC0415

        found = decide(model, _policy("explain"), get_device_manager())
    else:
        found = held.decision
    print(found)
    return found


def _enable(mode: str, verbose: bool, calibrate: bool, options: dict[str, Any]) -> None:
    policy = from_dict(Policy, {"mode": mode, **options})
    if calibrate:
        from apt_model.optimization import calibration  # noqa: PLC0415 - it measures

        calibration.calibrate()
    set_policy(policy)
    if verbose:
        from apt_model.optimization import banner  # noqa: PLC0415 - the quiet call loads no torch

        banner.show(status())


def _policy(caller: str) -> Policy:
    policy = current_policy()
    if policy is None:
        raise ConfigError(f"vb.{caller}: expected an enabled mode, got none", remedy="call vb.enable() first")
    return policy


def _optimize(model: Any, policy: Policy, restorable: bool) -> None:
    from apt_model.core.system.manager import get_device_manager  # noqa: PLC0415 - importing this module loads no torch
    from apt_model.optimization.decision import decide  # noqa: PLC0415
    from apt_model.optimization.optimized import Optimized  # noqa: PLC0415

    _forget(id(model))
    device = get_device_manager()
    decision = decide(model, policy, device)
    _optimized[id(model)] = Optimized(model, policy, decision, device, restorable=restorable)


def _forget(key: int) -> None:
    held = _optimized.pop(key, None)
    if held is not None:
        held.undo()
