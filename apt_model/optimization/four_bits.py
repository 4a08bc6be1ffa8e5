"""Which linear layers of a model a mode puts into 4 bits: asked for, or measured where the decision hangs on that."""

import re
from dataclasses import dataclass

import torch
from torch import nn

from apt_model.core.policy import Policy
from apt_model.core.system.device import Device
from apt_model.optimization.convert_plan import Candidate, make_plan
from apt_model.optimization.fp4_config import FP4Config
from apt_model.optimization.product_speed import COMPILED, DECODING, WHOLE_TEXTS, Speed, in_all, speed_of, worth


@dataclass(frozen=True)
class Group:
    """Layers of one place in the blocks, of one shape."""

    name: str
    """With * for numbers."""
    count: int
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    treatment: str
    reason: str


class FourBits:
    """Chooses them.

    Args:
        model: whose layers.
        policy: of the mode.
        device: where the model will compute.
        fast: whether layers are chosen for speed.
        dtype: that the other weights are cast to; None: each stays as it is.
    """

    def __init__(
        self, model: nn.Module, policy: Policy, device: Device, *, fast: bool, dtype: torch.dtype | None
    ) -> None:
        self.model, self.policy, self.device, self.fast, self.dtype = model, policy, device, fast, dtype
        self.rows = DECODING if _writes(model) else WHOLE_TEXTS
        self.speeds: dict[str, Speed] = {}
        """Of the layers that were measured."""
        self.why_none = ""
        """Where layers would be faster, and the model is not."""

    def choose(self, *, compiles: bool) -> tuple[list[Candidate], list[Group]]:
        """The layers, and all that could be by groups; `compiles`: blocks without 4-bit layers are compiled."""
        plan = make_plan(self.model, FP4Config())
        takes = {each.name: self._takes(each) for each in plan}
        if compiles:
            self._all_in_all(takes)
        taken: list[Candidate] = []
        groups: dict[tuple[str, str, tuple[int, ...], bool, str], list[int]] = {}
        for each in plan:
            packed, why = takes[each.name]
            if packed:
                taken.append(each)
            shape = tuple(each.module.get_parameter(each.weights[0]).shape)
            name = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", each.name)
            key = (name, type(each.module).__name__, shape, packed, why)
            groups.setdefault(key, []).append(each.skipped().size)
        return taken, [
            Group(name or "the model", len(sizes), kind, shape, sum(sizes), "nvfp4" if packed else "as it is", why)
            for (name, kind, shape, packed, why), sizes in groups.items()
        ]

    def _takes(self, each: Candidate) -> tuple[bool, str]:
        """Whether a layer is put into 4 bits, and why."""
        held = [each.module.get_parameter(name) for name in each.weights]
        if each.asked or each.fault:
            return False, each.fault or f"{each.asked} is left by default"
        if not each.name:
            return False, "it is the model itself"
        if self.policy.fp4 != "auto":
            return self.policy.fp4 == "on", "asked for"
        if self.fast:
            return self._measured(each.name, held[0])
        if self.policy.mode == "balanced":
            return False, "balanced keeps full precision"
        if any(parameter.requires_grad for parameter in held):
            return False, "it is trainable"
        return True, "it is frozen"

    def _measured(self, name: str, weight: nn.Parameter) -> tuple[bool, str]:
        if weight.is_meta or weight.dim() != 2:
            return False, "experts are not measured" if weight.dim() == 3 else "it has no values"
        speed = speed_of(self.device, self.dtype or weight.dtype, tuple(weight.shape), "nvfp4", self.rows)
        self.speeds[name] = speed
        return worth(speed.ratios), f"{_times(speed.ratios)} times as fast in 4 bits, measured at {self._rows()}"

    def _all_in_all(self, takes: dict[str, tuple[bool, str]]) -> None:
        """Leave 4 bits where they gain less than compiling the blocks does, which has to be left for them."""
        measured = {name: takes[name] for name in self.speeds}
        chosen = [name for name, (packed, _) in measured.items() if packed]
        if not chosen or self.rows == DECODING:
            return
        ratios = in_all((self.speeds[name], packed) for name, (packed, _) in measured.items())
        if min(ratios) < COMPILED:
            self.why_none = (
                f"{_times(ratios)} times as fast in all with {len(chosen)} of {len(measured)} layers, measured at "
                f"{self._rows()}, and blocks with such layers are not compiled"
            )
            takes |= {name: (False, takes[name][1]) for name in chosen}

    def _rows(self) -> str:
        return f"{', '.join(map(str, self.rows))} rows"


def _writes(model: nn.Module) -> bool:
    """Whether a model generates, and so meets few rows at a time; transformers gives `generate` to some that cannot."""
    able = getattr(model, "can_generate", None)
    return bool(able()) if callable(able) else callable(getattr(model, "generate", None))


def _times(ratios: tuple[float, ...]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)
