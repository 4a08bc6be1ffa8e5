"""From what the environment says to backends: each provider's endpoints, classified, with what is missing said."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

from apt_model.cloud.backend import CloudBackend, OIPBackend
from apt_model.cloud.http_transport import HttpTransport
from apt_model.cloud.providers.maas import CHAT, MaaSBackend
from apt_model.cloud.providers.queue import QueueTransport
from apt_model.cloud.providers.table import RULES
from apt_model.cloud.secret import Auth, Secret
from apt_model.cloud.transport import Request, Transport
from apt_model.core import env
from apt_model.core.errors import CloudError, ConfigError

NAMES = ("huawei", "runpod", "salad", "own")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}")
_PROBE = 5.0


class Connected(NamedTuple):
    """What became of one provider's settings."""

    backend: CloudBackend | None
    why: str
    """What is missing or wrong, where there is no backend."""


def over_http(url: str, auth: Auth | None) -> Transport:
    """The connector of real life."""
    return HttpTransport(url, auth=auth)


Connector = Callable[[str, Auth | None], Transport]


def connect(name: str, connector: Connector) -> Connected:
    """The backend that the environment describes under a name of `NAMES`; raises nothing for what is wrong in it."""
    try:
        return {"huawei": _huawei, "runpod": _runpod, "salad": _salad, "own": _own}[name](connector)
    except ConfigError as error:
        return Connected(None, str(error))


def tensors(
    kind: str, urls: str, secret: Secret | None, connector: Connector, *, name: str, way: str | None = None
) -> OIPBackend:
    """A backend of the protocol.

    Args:
        kind: of `RULES`.
        urls: the address; replicas follow, each after a comma.
        secret: the key, or none.
        connector: from an address to a transport.
        name: as `get_backend` takes it.
        way: which of the kind's headers carries the key; None is the usual one.
    """
    rules = RULES[kind]
    way = way or next(iter(rules.headers))
    if way not in rules.headers:
        raise ConfigError(f"expected one of {', '.join(rules.headers)} as the way of giving the key, got {way!r}"[:200])
    auth = Auth(rules.headers[way][0], secret, rules.headers[way][1]) if secret else None
    transports = [connector(url.strip(), auth) for url in urls.split(",") if url.strip()]
    return OIPBackend(transports, name=name, rules=rules)


def is_chat(url: str) -> bool:
    """Whether an address is one of MaaS, which takes messages: by its host, or by its path."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    host, path = parts.hostname or "", parts.path.rstrip("/")
    return host.endswith(".modelarts-maas.com") or path.endswith((CHAT, "/openai/v1"))


def _missing(*variables: env.Variable) -> str:
    lacking = [each.name for each in variables if each.get() is None]
    return f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not set" if lacking else ""


def _huawei(connector: Connector) -> Connected:
    key, url = env.HUAWEI_API_KEY.get(), env.HUAWEI_ENDPOINT.get()
    if key is None or url is None:
        return Connected(None, _missing(env.HUAWEI_API_KEY, env.HUAWEI_ENDPOINT))
    secret = Secret(key)
    if not is_chat(url):
        way = (env.HUAWEI_AUTH.get() or "bearer").lower()
        return Connected(tensors("modelarts", url, secret, connector, name="huawei", way=way), "")
    model = env.HUAWEI_MODEL.get()
    if model is None:
        return Connected(None, _missing(env.HUAWEI_MODEL))
    base = url.rstrip("/").removesuffix(CHAT)
    if not urlsplit(base).path:
        base += "/v1"
    transport = connector(base, Auth("Authorization", secret, "Bearer "))
    return Connected(MaaSBackend(base, secret, model, transport), "")


def _runpod(connector: Connector) -> Connected:
    key, endpoint = env.RUNPOD_API_KEY.get(), env.RUNPOD_ENDPOINT.get()
    if key is None or endpoint is None:
        return Connected(None, _missing(env.RUNPOD_API_KEY, env.RUNPOD_ENDPOINT))
    if not _ID.fullmatch(endpoint):
        raise ConfigError(f"{env.RUNPOD_ENDPOINT.name}: expected an endpoint's id, letters, digits and dashes")
    secret = Secret(key)
    balanced = tensors("runpod", f"https://{endpoint}.api.runpod.ai", secret, connector, name="runpod")
    if balanced.is_available():
        return Connected(balanced, "")
    direct = connector(f"https://api.runpod.ai/v2/{endpoint}", Auth("Authorization", secret, "Bearer "))
    try:
        is_queue = direct.send(Request(method="GET", path="/health"), timeout=_PROBE).status == 200
    except CloudError:
        is_queue = False
    if not is_queue:
        direct.close()
        return Connected(balanced, "")
    balanced.close()
    return Connected(OIPBackend([QueueTransport(direct)], name="runpod", rules=RULES["runpod-queue"]), "")


def _salad(connector: Connector) -> Connected:
    url, key = env.SALAD_ENDPOINT.get(), env.SALAD_API_KEY.get()
    if url is None:
        return Connected(None, _missing(env.SALAD_ENDPOINT))
    return Connected(tensors("salad", url, Secret(key) if key else None, connector, name="salad"), "")


def _own(connector: Connector) -> Connected:
    url, key = env.CLOUD_ENDPOINT.get(), env.CLOUD_API_KEY.get()
    if url is None:
        return Connected(None, _missing(env.CLOUD_ENDPOINT))
    return Connected(tensors("own", url, Secret(key) if key else None, connector, name="own"), "")


def settings(name: str) -> Iterator[str]:
    """The values that a backend is made of, to see whether they changed; never shown."""
    wanted = {"own": env.PREFIX + "CLOUD_"}.get(name, name.upper())
    for variable in (*env.CLOUDS, *env.VARIABLES):
        if variable.name.startswith(wanted):
            yield variable.get() or ""
