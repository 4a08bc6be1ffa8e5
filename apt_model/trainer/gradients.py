"""What happens to gradients between backward and the optimizer: finite check, clipping, low-rank compression.

Nothing here waits for the device: what depends on a gradient's value is chosen there, with `torch.where`. A step whose
gradients are not finite changes no state; an optimizer that is given `found_inf` (fused AdamW) skips it by itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apt_model.core.errors import CheckpointError, InputError
from apt_model.ops.low_rank import compress, random_basis, refresh_basis
from apt_model.trainer.clipping import AdaGC, Clipper, GlobalClip, State, ZClip, gradient_norms, scale_gradients
from apt_model.trainer.config import GradientConfig

CLIPPERS: dict[str, type[GlobalClip | AdaGC | ZClip]] = {"global": GlobalClip, "adagc": AdaGC, "zclip": ZClip}


class GradientReport(NamedTuple):
    """Two fp32 scalars, left on the device; reading them waits for it."""

    norm: Tensor
    """Norm of all gradients together, before anything was done to them."""
    found_inf: Tensor
    """1 where that norm is not finite, so that the step must be skipped; else 0."""


@torch.no_grad()
def untreated(model: nn.Module) -> GradientReport:
    """Report the norm and leave everything as it is: `found_inf` is 0, so no step is skipped.

    Raises:
        InputError: the model trains nothing.
    """
    _, norm = gradient_norms(list(_trainable(model).values()))
    return GradientReport(norm, torch.zeros_like(norm))


class GradientTreatment:
    """Makes a model's gradients ready for the optimizer; call it once a step, after the last micro-batch's backward.

    Clipping comes before compression, because error feedback would keep an outlier and send it on, step after step.
    A gradient whose norm overflows fp32 counts as not finite.

    Args:
        model: on the device that it stays on; its parameters that require gradients are treated.
        config: which clipping, and how much compression.
        seed: with a matrix's place in `hidden` and the step, what the noise of a projection follows from.
        hidden: the 2-D weights that compression applies to; leave out embeddings, the output head and norms.

    Raises:
        InputError: the model trains nothing, or `hidden` holds something that is not a matrix of the model.
    """

    def __init__(
        self, model: nn.Module, config: GradientConfig, *, seed: int, hidden: Sequence[tuple[str, nn.Parameter]]
    ) -> None:
        _check_hidden(model, hidden)
        trainable = _trainable(model)
        self._names, self._parameters = list(trainable), list(trainable.values())
        self._method = config.clipping
        self._clipper: Clipper = CLIPPERS[config.clipping](config.max_norm)
        self._clip_state = self._clipper.initial(len(self._parameters), self._parameters[0].device)
        self._low_rank = _LowRank(hidden if config.rank_ratio else (), config, seed)

    @torch.no_grad()
    def __call__(self, step: int) -> GradientReport:
        """Treat every `.grad` in place; `step` counts optimizer steps, and decides when projections restart."""
        norms_P, norm = gradient_norms(self._parameters)
        skip = ~norm.isfinite()
        factor, state = self._clipper(self._clip_state, norms_P, norm)
        for key, old in self._clip_state.items():
            _update(old, state[key], skip)
        scale_gradients(self._parameters, factor)
        self._low_rank(step, skip)
        return GradientReport(norm, skip.float())

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the whole state on the host, flat: each parameter's entries carry its name."""
        return {key: value.to("cpu", copy=True) for key, value in self._entries().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`, bit for bit.

        Raises:
            CheckpointError: an entry is missing, unexpected or of another shape; nothing was changed.
        """
        entries = self._entries()
        faults = [f"missing {key}" for key in sorted(entries.keys() - state.keys())]
        faults += [f"unexpected {key}" for key in sorted(state.keys() - entries.keys())]
        faults += [
            f"{key} has shape {list(state[key].shape)}, expected {list(value.shape)}"
            for key, value in entries.items()
            if key in state and state[key].shape != value.shape
        ]
        if faults:
            raise CheckpointError(
                f"the gradient treatment's state does not fit this run: {'; '.join(faults)}",
                state="nothing was loaded",
                remedy="resume with the model and the gradient options that the run was started with",
            )
        for key, value in entries.items():
            value.copy_(state[key])

    def _entries(self) -> dict[str, Tensor]:
        """The live state by name; numbers kept in one tensor for all parameters appear as views of it."""
        entries = dict(self._low_rank.state)
        for key, value in self._clip_state.items():
            if key.endswith("_P"):
                views = zip(self._names, value.unbind(), strict=True)
                entries |= {f"{self._method}.{key[:-2]}.{name}": view for name, view in views}
            else:
                entries[f"{self._method}.{key}"] = value
        return entries


class _LowRank:
    """Replaces the gradients of `hidden` by low-rank ones, and keeps each matrix's error and basis."""

    def __init__(self, hidden: Iterable[tuple[str, nn.Parameter]], config: GradientConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._matrices: list[tuple[int, str, nn.Parameter]] = []
        self.state: State = {}
        for index, (name, parameter) in enumerate(hidden):
            rank = max(1, round(config.rank_ratio * min(parameter.shape)))
            if not parameter.requires_grad or rank >= min(parameter.shape):
                continue  # sent whole: there is nothing to remember
            self._matrices.append((index, name, parameter))
            self.state[f"low_rank.basis.{name}"] = random_basis(
                parameter.shape[1], rank, seed=seed, index=index, step=-1, device=parameter.device
            )
            if config.error_feedback:
                self.state[f"low_rank.error.{name}"] = torch.zeros(parameter.shape, device=parameter.device)

    def __call__(self, step: int, skip: Tensor) -> None:
        """One step for every matrix that has a gradient; where `skip`, the state stays."""
        for index, name, parameter in self._matrices:
            if parameter.grad is None:
                continue
            old, error = self.state[f"low_rank.basis.{name}"], self.state.get(f"low_rank.error.{name}")
            basis = old
            if step % self._config.refresh_steps == 0:
                target = parameter.grad if error is None else parameter.grad + error
                basis = refresh_basis(target, old.shape[1], seed=self._seed, index=index, step=step)
            made = compress(parameter.grad, error, basis, row_balance=self._config.row_balance)
            parameter.grad.copy_(made.sent)
            _update(old, made.basis, skip)
            if error is not None:
                _update(error, made.error, skip)


def _update(old: Tensor, new: Tensor, skip: Tensor) -> None:
    """Write `new` into `old` unless `skip`, decided on the device."""
    old.copy_(torch.where(skip.to(old.device), old, new))


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise InputError(f"expected a model with parameters that require gradients, {type(model).__name__} has none")
    return parameters


def _check_hidden(model: nn.Module, hidden: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Raise `InputError` unless `hidden` holds distinct matrices of the model."""
    unseen = {id(parameter) for parameter in model.parameters()}
    for name, parameter in hidden:
        if parameter.ndim != 2:
            raise InputError(f"hidden[{name!r}]: expected a matrix, got shape {list(parameter.shape)}")
        if id(parameter) not in unseen:
            raise InputError(
                f"hidden[{name!r}]: expected a parameter of the model, each once; it is not, or came before"
            )
        unseen.remove(id(parameter))
