"""Every environment variable this package reads. `docs/environment.md` lists them, and a test compares the two."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One variable: its name, what it takes, and what it does."""

    name: str
    takes: str
    does: str

    def get(self) -> str | None:
        """Its value now, or None when it is unset or empty."""
        return os.environ.get(self.name) or None


DEVICE = Variable(
    "APT_DEVICE",
    "cuda, hpu, npu, xpu, cpu or a third party's device, or one with a number",
    "the device that 'auto' means, instead of the best one found",
)
DEBUG = Variable("APT_DEBUG", "1", "the command line shows the traceback of an error instead of only its explanation")
FP4_CACHE = Variable(
    "APT_FP4_CACHE", "a folder", "where `tune` keeps what it measured, instead of ~/.cache/apt_model/fp4"
)

PLAN_CACHE = Variable(
    "APT_PLAN_CACHE", "a folder", "where `apt-model plan --measure` keeps its rates, instead of ~/.cache/apt_model/plan"
)

PREFIX = "APT_"
"""Of all of them."""

VARIABLES = (DEVICE, DEBUG, FP4_CACHE, PLAN_CACHE)


def named(name: str) -> str | None:
    """The variable that an option names, or None where it is unset or empty."""
    return os.environ.get(name) or None


def environment() -> dict[str, str]:
    """All variables of the process, ours and others', for what describes it or starts another one."""
    return dict(os.environ)
