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

CLOUD_ENDPOINT = Variable("APT_CLOUD_ENDPOINT", "https://HOST/PATH", "the address of an `apt-model serve` of one's own")
CLOUD_API_KEY = Variable("APT_CLOUD_API_KEY", "a key", "what that server takes as Authorization: Bearer")

PREFIX = "APT_"
"""Of all of them."""

VARIABLES = (DEVICE, DEBUG, FP4_CACHE, PLAN_CACHE, CLOUD_ENDPOINT, CLOUD_API_KEY)

HUAWEI_API_KEY = Variable("HUAWEI_CLOUD_API_KEY", "a key or token", "the key of the Huawei Cloud endpoint")
HUAWEI_ENDPOINT = Variable(
    "HUAWEI_CLOUD_ENDPOINT", "https://HOST/PATH", "a ModelArts service (layers), or MaaS (chat alone)"
)
HUAWEI_MODEL = Variable("HUAWEI_CLOUD_MODEL", "a name", "the model that MaaS chats with, as its console spells it")
HUAWEI_AUTH = Variable(
    "HUAWEI_CLOUD_AUTH", "bearer, x-auth-token, appcode or apikey", "the header that the key travels in; else bearer"
)
RUNPOD_API_KEY = Variable("RUNPOD_API_KEY", "a key", "the key of the RunPod endpoint")
RUNPOD_ENDPOINT = Variable("RUNPOD_ENDPOINT_ID", "an id", "a RunPod endpoint, load balancing or queue")
SALAD_API_KEY = Variable("SALAD_API_KEY", "a key", "the key of the SaladCloud gateway")
SALAD_ENDPOINT = Variable("SALAD_ENDPOINT", "https://HOST", "the access domain of a SaladCloud container group")

CLOUDS = (
    HUAWEI_API_KEY, HUAWEI_ENDPOINT, HUAWEI_MODEL, HUAWEI_AUTH, RUNPOD_API_KEY, RUNPOD_ENDPOINT, SALAD_API_KEY,
    SALAD_ENDPOINT,
)  # fmt: skip
"""Those of clouds, whose names are theirs."""


def named(name: str) -> str | None:
    """The variable that an option names, or None where it is unset or empty."""
    return os.environ.get(name) or None


def environment() -> dict[str, str]:
    """All variables of the process, ours and others', for what describes it or starts another one."""
    return dict(os.environ)
