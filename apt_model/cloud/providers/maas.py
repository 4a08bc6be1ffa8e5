"""Huawei Cloud MaaS: chat, through OpenAI's client. It cannot run a layer, and says so."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from apt_model.cloud.backend import CloudBackend, Health
from apt_model.cloud.deadline import Clock
from apt_model.cloud.providers.table import RULES
from apt_model.cloud.secret import Secret
from apt_model.cloud.transport import Request, Transport
from apt_model.core.errors import CloudError, MissingExtraError, RefusedError

CHAT = "/chat/completions"
_HEALTHY_FOR = 30.0
_PROBE = 5.0
_MOST = 1 << 22  # bytes of a list of models


class MaaSBackend(CloudBackend):
    """A chat model.

    Args:
        url: of the API, up to /v1.
        secret: the key.
        model: its exact name.
        transport: to `url`, for the probe.
        client: makes the client that chats, from `base_url`, `api_key`, `timeout` and `max_retries`; None is OpenAI's.
        name: as `get_backend` takes it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        url: str,
        secret: Secret,
        model: str,
        transport: Transport,
        *,
        client: Callable[..., Any] | None = None,
        name: str = "huawei",
        clock: Clock = time.monotonic,
    ) -> None:
        self.name, self.rules, self.model = name, RULES["maas"], model
        self._url, self._secret, self._transport, self._client = url, secret, transport, client
        self._clock = clock
        self._health: tuple[float, Health] | None = None

    def health(self, *, fresh: bool = False) -> Health:
        """As `CloudBackend.health`: whether it answers and takes the key; whether the model is there a chat shows."""
        known = self._health
        if known is None or fresh or self._clock() - known[0] > _HEALTHY_FOR:
            known = self._health = (self._clock(), self._probed())
        return known[1]

    def chat(self, messages: str | Sequence[dict[str, str]], *, deadline_s: float = 60.0, **options: Any) -> str:
        """The model's answer.

        Args:
            messages: a text of the user's, or messages in OpenAI's form.
            deadline_s: seconds.
            options: of the API, such as `max_tokens` and `temperature`.

        Raises:
            MissingExtraError: the package openai is not installed.
            CloudError: no answer.
        """
        made = self._client or _openai()
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        client = made(base_url=self._url, api_key=self._secret.reveal(), timeout=deadline_s, max_retries=2)
        try:
            found = client.chat.completions.create(model=self.model, messages=asked, **options)
            return str(found.choices[0].message.content)
        except Exception as error:  # noqa: BLE001 - whatever the client raises is mapped
            raise self._mapped(error) from None  # a foreign error may quote the request, and the key with it
        finally:
            client.close()

    def describe(self) -> dict[str, Any]:
        """As `CloudBackend.describe`."""
        return {
            "name": self.name, "provider": self.rules.title, "capabilities": sorted(self.capabilities),
            "endpoints": [self._transport.name], "model": self.model,
        }  # fmt: skip

    def close(self) -> None:
        """As `CloudBackend.close`."""
        self._transport.close()

    def _mapped(self, error: Exception) -> CloudError:
        status = getattr(error, "status_code", None)
        words = self._secret.redact(" ".join(str(error).split()))[:300]
        if isinstance(status, int) and 400 <= status < 500 and status != 429:
            return RefusedError(
                f"{self._transport.name} answers {status}: {words}",
                remedy="HUAWEI_CLOUD_MODEL is the name as the console spells it; the key belongs to one region",
            )
        return CloudError(f"{self._transport.name}: no answer: {type(error).__name__}: {words}")

    def _probed(self) -> Health:
        started = time.perf_counter()
        try:
            found = self._transport.send(Request(method="GET", path="/models", most=_MOST), timeout=_PROBE)
        except CloudError as error:
            return Health(ok=False, why=error.message)
        if found.status in (401, 403):
            return Health(ok=False, why=f"it does not take the key ({found.status})")
        if found.status >= 500:
            return Health(ok=False, why=f"it answers {found.status}")
        return Health(ok=True, why=f"answers; chat with {self.model}", seconds=time.perf_counter() - started)


def _openai() -> Callable[..., Any]:
    try:
        from openai import OpenAI  # noqa: PLC0415 - an extra
    except ImportError:
        raise MissingExtraError("chat with MaaS", "openai", "cloud") from None
    found: Callable[..., Any] = OpenAI
    return found
