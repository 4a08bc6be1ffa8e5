"""Which tensors become FP4, and why the others do not: the model's word first, else rules on names.

# Shape suffix legend
#   N = output features, K = input features, E = experts
"""

import difflib
import re
from collections.abc import Mapping, Sequence

from apt_model.core import fp4_names
from apt_model.core.errors import ConfigError
from apt_model.core.fp4_names import layer_of
from apt_model.core.patterns import covers
from apt_model.core.tensor_files import FLOATS, Entry
from apt_model.integrations.fp4_plan import COMPRESSED_TENSORS, EMBEDDING, Decision
from apt_model.integrations.outline import EXPERTS, LINEAR, TRANSPOSED, Outline
from apt_model.ops.fp4.format import Format

_KEPT = ((fp4_names.HEAD, "the output projection, by its name"), (fp4_names.ROUTER, "a router, by its name"))
# Where names alone decide.
_UNLIKELY = (
    (fp4_names.EMBEDDING, f"{EMBEDDING}, by its name"),
    (fp4_names.NORM, "a norm, by its name"),
    (fp4_names.CONVOLUTION, "a convolution, by its name"),
)
_MATRICES = {LINEAR: "a linear layer", TRANSPOSED: "a Conv1D", EXPERTS: "an expert"}
# Layers that engines run as one product, and that must share a global scale for it.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
_PARTNERS = {name: names[0] for names in _FUSED for name in names}
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


def decide(
    entries: Mapping[str, Entry], outline: Outline, form: Format, *, layout: str, skip: Sequence[str] = ()
) -> list[Decision]:
    """One decision a tensor, in the order of `entries`.

    Args:
        entries: the tensors of a folder.
        outline: what the model makes of them.
        form: what they would become.
        layout: "compressed-tensors" takes whole blocks of two-dimensional weights only.
        skip: what stays as it is: patterns for tensors and for what they are part of (`core.patterns`).

    Raises:
        ConfigError: a pattern of `skip` fits nothing.
    """
    chooser = _Chooser(entries, outline, form, layout, skip)
    return [chooser.decide(name, entry) for name, entry in entries.items()]


def needs_own_layout(entries: Mapping[str, Entry], outline: Outline, form: Format) -> str | None:
    """Why compressed-tensors would not do for these tensors; None where it does."""
    own = decide(entries, outline, form, layout="apt")
    theirs = decide(entries, outline, form, layout=COMPRESSED_TENSORS)
    for mine, other in zip(own, theirs, strict=True):
        if mine.converted and not other.converted:
            return f"{other.name}: {other.reason}"
    return expert_trap(own, form)


def expert_trap(decisions: Sequence[Decision], form: Format) -> str | None:
    """What goes wrong when transformers reads compressed-tensors' nvfp4 experts; None where there are none."""
    if form.has_global_scale and any(each.packed and _ONE_EXPERT.search(each.name) for each in decisions):
        return (
            "transformers (up to 5.23 at least, its issue 48371) reads compressed-tensors' nvfp4 experts without their "
            "global scale, and says nothing"
        )
    return None


class _Chooser:
    """What all decisions on a folder share."""

    def __init__(
        self, entries: Mapping[str, Entry], outline: Outline, form: Format, layout: str, skip: Sequence[str]
    ) -> None:
        self.entries, self.outline, self.form, self.layout, self.skip = entries, outline, form, layout, skip
        self.turned = set() if outline.kinds else fp4_names.turned_layers(entries)
        self._check_patterns()

    def decide(self, name: str, entry: Entry) -> Decision:
        """What becomes of one tensor."""
        if unfit := self._unfit(name, entry):
            return Decision(name, entry, unfit)
        kind, reason = self._kind(name, entry)
        if kind not in _MATRICES:
            return Decision(name, entry, reason)
        if kept := next((why for pattern, why in _KEPT if pattern.search(layer_of(name))), None):
            return Decision(name, entry, kept)
        turned = self._is_turned(name, entry, kind)
        if turned is None:
            return Decision(name, entry, "fused experts whose inputs and outputs cannot be told apart")
        found = Decision(name, entry, reason, converted=True, transposed=turned, group=_group(name, entry))
        objection = self._objection(found) if self.layout == COMPRESSED_TENSORS else None
        return Decision(name, entry, f"{objection} (--layout apt takes it)") if objection else found

    def _unfit(self, name: str, entry: Entry) -> str:
        """Why a tensor is out of the question, whatever it belongs to."""
        if entry.dtype not in FLOATS:
            return f"its type is {entry.dtype}"
        if len(entry.shape) < 2 or not entry.size:
            return "it is no matrix"
        if len(entry.shape) > 3:
            return f"it has {len(entry.shape)} dimensions"
        for pattern in self.skip:
            if covers(pattern, name):
                return f"asked for: --skip {pattern}"
        return ""

    def _kind(self, name: str, entry: Entry) -> tuple[str, str]:
        """What a tensor is, and who says so."""
        if self.outline.kinds:
            kind = self.outline.kinds[name]
            return kind, f"{_MATRICES[kind]} of {self.outline.source}" if kind in _MATRICES else kind
        layer = layer_of(name)
        if len(entry.shape) == 3:
            return (
                (EXPERTS, "fused experts, by their name") if fp4_names.is_experts(name) else ("", "it has 3 dimensions")
            )
        if not name.endswith(".weight"):
            return "", "it is not called weight"
        for pattern, why in _UNLIKELY:
            if pattern.search(layer.lower()):
                return "", why
        if layer.rpartition(".")[2] in self.turned:
            return "", "it may have inputs first, which only the model can tell (pip install 'apt-transformer[hf]')"
        return LINEAR, "a linear layer, by its name"

    def _is_turned(self, name: str, entry: Entry, kind: str) -> bool | None:
        """Whether inputs come first, [..., K, N]; None where that cannot be told.

        Of fused experts the model says so, or their shapes: gate and up [2 I, H] and down [H, I] fit one way only.
        """
        if len(entry.shape) == 2:
            return kind == TRANSPOSED
        if name in self.outline.turned:
            return self.outline.turned[name]
        owner = name.rpartition(".")[0]
        gate_up, down = self.entries.get(f"{owner}.gate_up_proj"), self.entries.get(f"{owner}.down_proj")
        if gate_up is None or down is None or len(gate_up.shape) != 3 or len(down.shape) != 3:
            return None
        (_, a, b), (_, c, d) = gate_up.shape, down.shape
        if (a, b) == (2 * d, c):
            return False
        return True if (a, b) == (d, 2 * c) else None

    def _objection(self, found: Decision) -> str | None:
        """Why compressed-tensors has no form for it."""
        if len(found.shape) == 3:
            return "compressed-tensors names experts one by one, and these are fused"
        if found.transposed:
            return "compressed-tensors takes linear layers, and this is a Conv1D"
        if found.shape[-1] % self.form.block:
            return f"its {found.shape[-1]} inputs are no multiple of {self.form.block}, which compressed-tensors wants"
        return None

    def _check_patterns(self) -> None:
        for pattern in self.skip:
            if not any(covers(pattern, name) for name in self.entries):
                parts = {part for name in self.entries for part in (layer_of(name), *layer_of(name).split("."))}
                near = difflib.get_close_matches(pattern, sorted(parts), n=1)
                remedy = f"did you mean {near[0]}?" if near else "--dry-run --format json lists the names"
                raise ConfigError(
                    f"--skip {pattern}: no tensor, no layer and no part of one is called so", remedy=remedy
                )


def _group(name: str, entry: Entry) -> str:
    owner, _, last = layer_of(name).rpartition(".")
    return f"{owner}.{_PARTNERS[last]} {entry.dtype}" if last in _PARTNERS and name.endswith(".weight") else name
