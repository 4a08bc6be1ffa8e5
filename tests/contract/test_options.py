"""No option without an effect: each field of each class of options changes something that can be observed."""

import dataclasses
import typing
from typing import Literal

import pytest
from effects import BASE, EFFECTS, TOO_LARGE, Effect
from probes import RUNS

from apt_model.core.errors import ConfigError
from apt_model.core.options import check_types
from apt_model.trainer.config import TrainConfig

ENTRIES = [
    (cls, name, effect) for cls, table in EFFECTS.items() for name, effects in table.items() for effect in effects
]


def name_of(value):
    return value.__name__ if isinstance(value, type) else "" if isinstance(value, Effect) else str(value)


def faults(table):
    """What the table lacks or has too much, as 'Class.option: what'."""
    return [f"{cls.__name__}.{fault}" for cls, entries in table.items() for fault in _faults(cls, entries)]


def _faults(cls, entries):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    yield from (f"{name}: no effect is shown" for name in fields if not entries.get(name))
    yield from (f"{name}: there is no such option" for name in entries if name not in fields)
    for name, field in fields.items():
        shown = [effect.value() for effect in entries.get(name, [])]
        yield from (f"{name}: {value!r} is its default" for value in shown if value == field.default)
        left = [value for value in _values(typing.get_type_hints(cls)[name]) if value not in [*shown, field.default]]
        yield from (f"{name}: no effect of {value!r} is shown" for value in left if shown)


def _values(hint):
    """All values of an option that has only a few."""
    if hint is bool:
        return [False, True]
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else []


def sides(cls, name, effect):
    """The options with the default (or what stands in for it), and with the other value."""
    shared = {**BASE[cls], **effect.base}
    if name not in TOO_LARGE.get(cls, set()):
        shared.pop(name, None)
    return shared, {**shared, name: effect.value()}


def test_every_option_of_every_class_has_an_entry():
    assert faults(EFFECTS) == []


def test_classes_of_options_inside_others_are_walked_too():
    nested = {hint for hint in typing.get_type_hints(TrainConfig).values() if dataclasses.is_dataclass(hint)}
    assert nested <= EFFECTS.keys()
    assert BASE.keys() == EFFECTS.keys()


@pytest.mark.parametrize(("cls", "name", "effect"), ENTRIES, ids=name_of)
def test_an_option_changes_what_is_observed(cls, name, effect):
    default, other = sides(cls, name, effect)
    assert effect.probe(default) != effect.probe(other), f"{cls.__name__}.{name} = {effect.value()!r} changes nothing"


def test_what_is_observed_follows_from_the_options_alone():
    """Otherwise a difference would say nothing. Each probe twice on each base that some entry has."""
    bases = {(entry[2].probe, repr(sides(*entry)[0])): sides(*entry)[0] for entry in ENTRIES}
    for (probe, _), options in bases.items():
        seen = probe(options)
        RUNS.clear()
        assert probe(options) == seen, probe.__name__


@pytest.mark.parametrize("cls", EFFECTS, ids=name_of)
def test_a_wrong_type_is_refused_by_name(cls):
    for field in dataclasses.fields(cls):
        with pytest.raises(ConfigError, match=rf"^{cls.__name__}\.{field.name}: expected .*, got "):
            cls(**{**({"mode": "balanced"} if cls.__name__ == "Policy" else {}), field.name: object()})


# --- it can fail


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic:
    used: int = 1
    kind: Literal["a", "b", "c"] = "a"
    idle: bool = False

    def __post_init__(self):
        check_types(self)


def probe(options):
    options = Synthetic(**options)
    return options.used, options.kind


FULL = {"used": [Effect(2, probe)], "kind": [Effect("b", probe), Effect("c", probe)], "idle": [Effect(True, probe)]}


def test_a_full_table_has_no_fault():
    assert faults({Synthetic: FULL}) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"used": []}, "Synthetic.used: no effect is shown"),
        ({"more": [Effect(1, probe)]}, "Synthetic.more: there is no such option"),
        ({"used": [Effect(1, probe)]}, "Synthetic.used: 1 is its default"),
        ({"kind": [Effect("b", probe)]}, "Synthetic.kind: no effect of 'c' is shown"),
    ],
)
def test_a_gap_in_the_table_is_named(change, fault):
    assert faults({Synthetic: {**FULL, **change}}) == [fault]


def test_an_option_that_does_nothing_is_found(monkeypatch):
    monkeypatch.setitem(BASE, Synthetic, {})
    test_an_option_changes_what_is_observed(Synthetic, "used", FULL["used"][0])
    with pytest.raises(AssertionError, match=r"Synthetic\.idle = True changes nothing"):
        test_an_option_changes_what_is_observed(Synthetic, "idle", FULL["idle"][0])
