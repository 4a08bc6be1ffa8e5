"""The ASGI application: the Open Inference Protocol v2, uploads, health and metrics, within bounds."""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from apt_model import __version__
from apt_model.cloud.server.answers import Answer
from apt_model.cloud.server.compute import describe
from apt_model.cloud.server.config import ServerConfig
from apt_model.cloud.server.exchange import Exchange, Gone, Receive, Scope, Send
from apt_model.cloud.server.forwards import Forwards
from apt_model.cloud.server.heads import Headers, admit, asked
from apt_model.cloud.server.metrics import Metrics
from apt_model.cloud.server.models import BACKWARD, NAME, VERSION, Models
from apt_model.cloud.server.reading import Readings
from apt_model.cloud.server.refusal import BUSY_SECONDS, Refusal, refusal_of
from apt_model.cloud.server.store import Store
from apt_model.core.errors import AptError

LOG = logging.getLogger(__name__)
_OPEN = ("/health", "/ping", "/v2/health/live", "/v2/health/ready")
"""Paths that need no key: platforms ask them, and they tell nothing."""


class Application:
    """Serves `models`.

    Args:
        config: the bounds, and the key.
        models: what is held.
        store: where uploads go; None takes none.
        load: brings the models; runs in a thread once the server is up, which is not ready until it is done.
    """

    def __init__(
        self, config: ServerConfig, models: Models, store: Store | None = None, load: Callable[[], None] | None = None
    ) -> None:
        self.config, self.models, self.store = config, models, store
        self.metrics = Metrics()
        self.draining = False
        self._load = load
        self._started = load is None
        self.failed: BaseException | None = None
        """Why the models could not be brought."""
        self._readings = Readings(config)
        self.forwards = Forwards(config, models, self.metrics, self._readings)
        self._loading: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether forwards are taken: every model has computed something."""
        return self._started and self.models.ready and not self.draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request, or the server's life."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._serve(Exchange(scope, receive, send, lambda: self.draining))

    def at_once(
        self, path: str, headers: Headers, client: str | None, body: bytes, send: Callable[[Answer], object]
    ) -> bool:
        """Whether a POST that came whole was a forward that is computed sooner than it could wait: `send` was called.

        False for all others, for what is refused and for what fails: these are asked again, the usual way.
        """
        return not self.draining and self.forwards.at_once(path, headers, client, body, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        with torch.no_grad():  # of this thread, for as long as it serves
            while True:
                message = await receive()
                if message["type"] == "lifespan.startup":
                    if self._load is not None:
                        self._loading = asyncio.create_task(self._bring(self._load))
                    await send({"type": "lifespan.startup.complete"})
                else:
                    self.draining = True
                    await asyncio.to_thread(self.forwards.close)
                    await send({"type": "lifespan.shutdown.complete"})
                    return

    async def _bring(self, load: Callable[[], None]) -> None:
        try:
            await asyncio.to_thread(load)
            self._started = True
        except BaseException as error:  # noqa: BLE001 - told by whoever runs the server
            self.failed = error

    async def _serve(self, exchange: Exchange) -> None:
        began = time.monotonic()
        model = ""
        try:
            try:
                model = await self._route(exchange)
            except Refusal as refusal:
                await exchange.refuse(refusal)
            except AptError as error:
                await exchange.refuse(refusal_of(error))
            except Gone:
                raise
            except Exception as error:  # whatever a foreign layer raises
                LOG.exception("%s while computing", type(error).__name__)
                await exchange.refuse(_of_torch(error))
        except Gone:
            exchange.status = 499  # as nginx counts them
        finally:
            self.metrics.answered(model or self._named(exchange), exchange.status, time.monotonic() - began)
            self.metrics.sent += exchange.sent

    def _named(self, exchange: Exchange) -> str:
        """The model that a refused request named, where it is held: nothing else becomes a label."""
        parts = exchange.path.split("/")
        name = parts[3] if exchange.path.startswith("/v2/models/") else ""
        return name if self.models.versions(name.removesuffix(BACKWARD)) else ""

    async def _route(self, exchange: Exchange) -> str:
        """Answer it; the name of the model that computed, or ""."""
        path = exchange.path
        if path in _OPEN:
            _only(exchange, "GET", "HEAD")
            await self._health(exchange, path)
            return ""
        admit(self.config, exchange.headers, exchange.client)
        parts = path.split("/")[1:]
        if parts[:2] == ["v2", "models"] and len(parts) > 2:
            return await self._model(exchange, parts[2:])
        if path in ("/v2", "/v2/"):
            _only(exchange, "GET")
            await exchange.respond_json(self._about())
        elif path == "/metrics":
            _only(exchange, "GET")
            self.metrics.reading = len(self._readings)
            await exchange.respond(200, [self.metrics.text().encode()], self.metrics.content_type.encode())
        elif parts[:3] == ["v2", "repository", "models"] and len(parts) == 6 and parts[4] == "versions":
            await self._repository(exchange, parts[3], parts[5])
        else:
            raise Refusal(404, "there is no such path")
        return ""

    async def _health(self, exchange: Exchange, path: str) -> None:
        if path == "/ping":
            await exchange.respond(200 if self.ready else 503 if self.draining else 204)
        elif path == "/v2/health/live":
            await exchange.respond_json({"live": True})
        else:
            # The protocol's text says "live" here, and KServe's client reads "ready".
            await self._whether(exchange, self.ready, {"live": True, "ready": True})

    async def _whether(self, exchange: Exchange, ready: bool, said: dict[str, Any]) -> None:
        """200 with what is `said`, or 503."""
        if not ready:
            raise Refusal(503, "draining" if self.draining else "loading", retry_after=BUSY_SECONDS)
        await exchange.respond_json(said)

    def _about(self) -> dict[str, Any]:
        config = self.config
        return {
            "name": "apt_model", "version": __version__, "extensions": ["binary_tensor_data"],
            "limits": {
                "max_body": config.max_body, "max_inflight": config.max_inflight, "max_json": config.max_json,
                "max_upload": self.store.most if self.store else 0,
            },
        }  # fmt: skip

    async def _model(self, exchange: Exchange, parts: Sequence[str]) -> str:
        """/v2/models/NAME[/versions/VERSION][/ready|/infer]."""
        name, version, call = asked(parts)
        _only(exchange, "POST" if call == "infer" else "GET")
        backward = name.endswith(BACKWARD)
        base = name.removesuffix(BACKWARD)
        if call == "infer" and self.draining:
            raise Refusal(503, "draining", retry_after=BUSY_SECONDS)
        model = self.models.find(base, version)
        if call == "infer":
            await self.forwards.infer(exchange, model, backward=backward)
        elif call == "ready":
            await self._whether(exchange, not self.draining, {"name": name, "ready": True})
        else:
            await exchange.respond_json(describe(model, self.models.versions(base), backward=backward))
        return name

    async def _repository(self, exchange: Exchange, name: str, version: str) -> None:
        _only(exchange, "GET", "PUT", "DELETE")
        if not NAME.fullmatch(name) or name.endswith(BACKWARD) or not VERSION.fullmatch(version):
            raise Refusal(400, "expected a name of letters, digits, '.', '_' and '-', and 16 hexadecimal digits")
        held = version in self.models.versions(name)
        if exchange.method == "GET":
            if not held:
                raise Refusal(404, "there is no such version of this model")
            await exchange.respond_json({"name": name, "version": version})
            return
        if self.store is None:
            raise Refusal(403, "this server takes no uploads: start it with --allow-upload")
        if exchange.method == "DELETE":
            if not held:
                raise Refusal(404, "there is no such version of this model")
            await self.forwards.in_thread(functools.partial(self.models.drop, name, version))
            self.store.remove(name, version)
            await exchange.respond_json({"name": name, "version": version})
            return
        length = exchange.headers.length(self.store.most)
        if not held:
            await self._upload(exchange, self.store, name, version, length)
        await exchange.respond_json({"name": name, "version": version}, 200 if held else 201)

    async def _upload(self, exchange: Exchange, store: Store, name: str, version: str, length: int) -> None:
        if self.draining:
            raise Refusal(503, "draining", retry_after=BUSY_SECONDS)
        try:
            with store.receive(name, version, length) as upload:
                reading = self._readings.begin(0 if length > self.config.max_body else length)
                reading.extend(length / self.config.pace)
                try:
                    await exchange.pieces(reading, upload.take, length)
                finally:
                    self._readings.end(reading)
                self.metrics.received += length
                path = await self.forwards.in_thread(functools.partial(store.keep, upload, name, version))
        except OSError as error:
            raise Refusal(503, f"the store cannot be written: {error.strerror}", retry_after=BUSY_SECONDS) from error
        try:
            await self.forwards.in_thread(functools.partial(self.models.load, name, path))
        except BaseException:
            store.remove(name, version)
            raise


def _only(exchange: Exchange, *methods: str) -> None:
    if exchange.method not in methods:
        raise Refusal(405, f"expected {' or '.join(methods)}", allow=", ".join(methods))


def _of_torch(error: BaseException) -> Refusal:
    """For want of memory it is worth asking again; anything else is our mistake."""
    words = f"{type(error).__name__} {error}".lower()
    if "memory" in words or "allocate" in words:
        return Refusal(503, "not enough memory for this forward now", retry_after=BUSY_SECONDS)
    return Refusal(500, f"{type(error).__name__} while computing, which is our mistake")
