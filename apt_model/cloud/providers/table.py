"""What each provider's documentation says of its gateway: limits, headers, paths, quirks. One table, with sources.

Taken from documentation and held by this package's fakes (`apt_model.cloud.providers.fakes`); no account has run it.
"""

from dataclasses import dataclass

MB = 10**6
_HUAWEI = "support.huaweicloud.com"


@dataclass(frozen=True, kw_only=True)
class Rules:
    """One kind of endpoint."""

    capability: str
    """"tensors": any HTTP server of ours behind it; "tokens": chat alone."""
    title: str
    headers: dict[str, tuple[str, str]]
    """Way of giving the key -> header, and what stands before the key. The first is the usual one."""
    request_bytes: int | None = None
    """The largest body that passes; None is not documented."""
    reply_bytes: int | None = None
    seconds: float | None = None
    """After which the gateway gives up waiting for the server."""
    quirks: tuple[str, ...] = ()
    source: str = ""


RULES = {
    "maas": Rules(
        capability="tokens", title="Huawei Cloud MaaS",
        headers={"bearer": ("Authorization", "Bearer ")},
        quirks=(
            "chat completions in OpenAI's form at /v1/chat/completions: it takes messages and cannot run a layer",
            "the model's exact name is in the console",
        ),
        source=f"{_HUAWEI}: maas-modelarts-0011, maas-modelarts-0078, qs-maas-0001",
    ),
    "modelarts": Rules(
        capability="tensors", title="Huawei Cloud ModelArts",
        headers={
            "bearer": ("Authorization", "Bearer "),
            "x-auth-token": ("X-Auth-Token", ""),
            "appcode": ("X-Apig-AppCode", ""),
            "apikey": ("Authorization", ""),
        },
        request_bytes=12 * MB, reply_bytes=12 * MB, seconds=40.0,
        quirks=(
            "the service's path, /v1/infers/SERVICE or /v2/infer/SERVICE, stands before the server's own",
            "a token for X-Auth-Token expires after 24 hours: give a function that returns one",
        ),
        source=f"{_HUAWEI}: modelarts_05_0025, modelarts_05_0364, modelarts_05_3136, inference-modelarts-0105",
    ),
    "runpod": Rules(
        capability="tensors", title="RunPod load balancing",
        headers={"bearer": ("Authorization", "Bearer ")},
        request_bytes=30 * MB, reply_bytes=30 * MB, seconds=330.0,
        quirks=("no queue and no second attempt of its own", "/ping: 200 ready, 204 loading"),
        source="github.com/runpod/docs, 2026-08: serverless/load-balancing",
    ),
    "runpod-queue": Rules(
        capability="tensors", title="RunPod queue",
        headers={"bearer": ("Authorization", "Bearer ")},
        request_bytes=10 * MB, reply_bytes=10 * MB,
        quirks=(
            "JSON alone: a body travels in base64, a third larger, and /run takes 10 MB of that",
            "a result is kept for 30 minutes",
            "1000 /run in 10 seconds, then 429",
        ),
        source="github.com/runpod/docs, 2026-08: serverless/endpoints/operation-reference, send-requests",
    ),
    "salad": Rules(
        capability="tensors", title="SaladCloud",
        headers={"key": ("Salad-Api-Key", "")},
        request_bytes=1000 * MB, reply_bytes=1000 * MB, seconds=100.0,
        quirks=(
            "the server must listen on IPv6 (--host ::)",
            "524 where the server takes longer than the gateway waits",
            "a node that is gone is noticed after tens of seconds",
        ),
        source="github.com/SaladTechnologies/salad-cloud-docs, 2026-06: container gateway",
    ),
    "own": Rules(
        capability="tensors", title="a server of one's own",
        headers={"bearer": ("Authorization", "Bearer ")},
        source="this package: apt-model serve",
    ),
}  # fmt: skip
"""Kind of endpoint -> its rules."""
