"""AdamW, its schedule, and its state as named tensors."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apt_model.core.errors import CheckpointError
from apt_model.trainer.config import OptimizerConfig

_STATES = ("step", "exp_avg", "exp_avg_sq")


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up to the peak, then a cosine to its share."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps - 1, 1)
    share = config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.lr * share


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices but the embedding decay, vectors and the embedding do not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim >= 2 and not name.startswith("embedding.")].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, for a checkpoint."""
    return {
        f"optimizer.{kind}.{name}": optimizer.state[parameter][kind]
        for name, parameter in model.named_parameters()
        for kind in _STATES
        if parameter in optimizer.state
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer the state of a checkpoint; `CheckpointError` when it is another model's.

    A parameter that never had a gradient has no state: an encoder's, where only the decoder is trained.
    """
    names = {f"optimizer.{kind}.{name}" for name, _ in model.named_parameters() for kind in _STATES}
    if unknown := sorted(name for name in tensors if name.startswith("optimizer.") and name not in names):
        raise CheckpointError(f"optimizer state of what this model does not have: {', '.join(unknown[:4])}")
    for name, parameter in model.named_parameters():
        found = {kind: tensors.get(f"optimizer.{kind}.{name}") for kind in _STATES}
        if all(tensor is None for tensor in found.values()):
            continue
        state = {}
        for kind, tensor in found.items():
            shape = torch.Size([]) if kind == "step" else parameter.shape
            if tensor is None or tensor.shape != shape:
                got = "nothing" if tensor is None else list(tensor.shape)
                raise CheckpointError(f"optimizer state {kind} of {name}: expected {list(shape)}, got {got}")
            state[kind] = tensor.to(device=parameter.device, dtype=torch.float32)
        optimizer.state[parameter] = state
