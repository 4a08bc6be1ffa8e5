"""Configuration dataclasses: types checked when made, unknown names refused, plain dictionaries both ways."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from apt_model.core.errors import ConfigError

T = TypeVar("T")


def require(condition: bool, where: str, expected: str, got: object, remedy: str | None = None) -> None:
    """Raise `ConfigError` that says what `where` takes and what came, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{where}: expected {expected}, got {got!r}", remedy=remedy)


def unknown_name(name: str, known: Iterable[str], where: str) -> ConfigError:
    """The error for a name that `where` does not have, with the nearest one it has."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(known)}"
    return ConfigError(f"{where} has no option {name!r}", remedy=remedy)


def _fits(value: object, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arm) for arm in typing.get_args(hint))
    if origin is tuple:  # of any length: tuple[str, ...]
        return isinstance(value, tuple) and all(_fits(each, typing.get_args(hint)[0]) for each in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spell(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(arm) for arm in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(arm) for arm in typing.get_args(hint))
    if origin is tuple:
        return f"a tuple of {_spell(typing.get_args(hint)[0])}"
    return "None" if hint is types.NoneType else str(hint.__name__)


def check_types(config: Any) -> None:
    """Raise `ConfigError` for the first field of the dataclass `config` whose value does not fit its annotation."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        require(_fits(value, hint), f"{type(config).__name__}.{field.name}", _spell(hint), value)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make the dataclass `cls` from plain values, nested dataclasses included; an unknown name raises `ConfigError`."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{cls.__name__}: expected a mapping of options, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    made = {}
    for name, value in values.items():
        if name not in names:
            raise unknown_name(name, names, cls.__name__)
        hint = hints[name]
        made[name] = from_dict(hint, value) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else value
    return cls(**made)
