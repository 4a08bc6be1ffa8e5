"""A mark for parameters whose memory belongs to somebody who puts their values there and takes them away again."""

from typing import Any

_MARK = "_apt_placed"


def mark_placed(parameter: Any, placed: bool) -> None:
    """Set or remove the mark; a layer leaves a marked parameter's bytes, and their order, as they are."""
    if placed:
        vars(parameter)[_MARK] = True
    else:
        vars(parameter).pop(_MARK, None)


def is_placed(parameter: Any) -> bool:
    """Whether the mark is there."""
    return getattr(parameter, _MARK, False)
