"""Patterns for parts of a model, as options take them."""

import fnmatch


def covers(pattern: str, name: str) -> bool:
    """Whether a pattern (`*`, `?`) covers the module or tensor with this dotted name, itself or as a part of it.

    It is held against every run of whole parts of the name: "lm_head", "layers.0.mlp", "layers.*.down_proj".
    """
    parts = name.split(".")
    ends = range(1, len(parts) + 1)
    return any(fnmatch.fnmatchcase(".".join(parts[i:j]), pattern) for j in ends for i in range(j))
