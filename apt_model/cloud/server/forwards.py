"""Forwards: a body is read, its message computed, here where that is short and else in a thread, and answered."""

import asyncio
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from apt_model.cloud.server.again import keep
from apt_model.cloud.server.answers import Answer, Answers
from apt_model.cloud.server.compute import Ready, answer, computed, is_small, is_view, made_ready, without_gradients
from apt_model.cloud.server.config import ServerConfig
from apt_model.cloud.server.exchange import Exchange
from apt_model.cloud.server.heads import DEADLINE, JSON_LENGTH, Headers, admit, asked
from apt_model.cloud.server.metrics import Metrics
from apt_model.cloud.server.models import BACKWARD, Model, Models
from apt_model.cloud.server.reading import Readings
from apt_model.cloud.server.refusal import busy
from apt_model.cloud.server.tensors import body_buffer
from apt_model.cloud.wire import Message, decode_request, recognised

_MODELS = "/v2/models/"


class Forwards:
    """All that run.

    Args:
        config: the bounds.
        models: what computes.
        metrics: what is counted.
        readings: bodies on their way.
    """

    def __init__(self, config: ServerConfig, models: Models, metrics: Metrics, readings: Readings) -> None:
        self._config, self._models, self._metrics, self._readings = config, models, metrics, readings
        self._limits = config.limits
        self._answers = Answers(config.max_cached)
        self._pool = ThreadPoolExecutor(config.workers, "apt-serve", without_gradients)

    def close(self) -> None:
        """Wait for what runs."""
        self._pool.shutdown()

    async def in_thread(self, work: Callable[[], Any]) -> Any:
        """What it returns."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def at_once(
        self, path: str, headers: Headers, client: str | None, body: bytes, send: Callable[[Answer], object]
    ) -> bool:
        """As `Application.at_once`: all that `infer` does, without a wait."""
        began, config = time.monotonic(), self._config
        try:
            json_length = headers.number(JSON_LENGTH)
            is_full = self._metrics.inflight >= config.max_inflight
            if not path.startswith(_MODELS) or json_length is None or headers.number(DEADLINE) == 0 or is_full:
                return False
            headers.length(config.max_body)
            admit(config, headers, client)
            name, version, call = asked(path[len(_MODELS) :].split("/"))
            backward = name.endswith(BACKWARD)
            model = self._models.find(name.removesuffix(BACKWARD) if backward else name, version)
            found = self._short(model, body, json_length, backward=backward) if call == "infer" else None
        except Exception:  # noqa: BLE001 - it is asked again, and told then
            return False
        if found is None:
            return False
        send(found)
        self._metrics.received += len(body)
        self._metrics.sent += sum([len(part) for part in found[0]])
        self._metrics.answered(name, 200, time.monotonic() - began)
        return True

    def _short(self, model: Model, body: bytes, json_length: int, *, backward: bool) -> Answer | None:
        """The answer where it is computed soon. It must be sent before the next one is asked for."""
        known = None if backward else recognised(body, json_length, self._limits)
        again = None if known is None else model.again.get(known[0])
        if known is not None and again is not None:
            return again.answer(*known[1:])
        message = decode_request(body, json_length, self._limits)
        if not is_small(model, message):
            return None
        found = answer(model, message, backward=backward, max_answer=self._config.max_body, deadline=None)
        if not backward:
            keep(model, message, found)
        return found

    async def infer(self, exchange: Exchange, model: Model, *, backward: bool) -> None:
        """Answer a forward, or a gradient."""
        config, headers = self._config, exchange.headers
        json_length = headers.number(JSON_LENGTH)
        length = headers.length(config.max_body if json_length is not None else min(config.max_body, config.max_json))
        left = headers.number(DEADLINE)
        deadline = None if left is None else time.monotonic() + left / 1000
        self._refuse_when_full()
        begun: list[Ready] = []

        def begin(buffer: memoryview, come: int) -> None:
            """The request's head is looked at while the rest of its body comes."""
            if json_length is not None and json_length <= come:
                message = decode_request(buffer, json_length, self._limits)
                if is_view(message):
                    begun.append(made_ready(model, message, backward=backward, max_answer=config.max_body))

        body = await self._body(exchange, length, json_length or 0, begin)
        if begun:
            message, work = begun[0].message, functools.partial(computed, begun[0], deadline)
        else:
            decode = functools.partial(decode_request, body, json_length, self._limits)
            message = decode() if json_length is not None else await self.in_thread(decode)
            work = functools.partial(
                answer, model, message, backward=backward, max_answer=config.max_body, deadline=deadline
            )
        if is_small(model, message):
            parts, head = work()
        else:
            key = (model.name, model.version, str(backward), message.id or "")
            parts, head = await self._once(work, key, message, body)
        binary = [(JSON_LENGTH, b"%d" % head)] if message.binary else []
        kind = b"application/octet-stream" if message.binary else b"application/json"
        await exchange.respond(200, parts, kind, binary)

    async def _once(
        self, work: Callable[[], Answer], key: tuple[str, ...], message: Message, body: memoryview
    ) -> Answer:  # fmt: skip
        """Compute in a thread, once for all who ask the same; a client that leaves does not stop it."""
        known = self._answers.find(key, body) if message.id else None
        if known is not None:
            self._metrics.repeated += 1
            return await asyncio.shield(known)
        self._refuse_when_full()
        self._metrics.inflight += 1
        future: asyncio.Future[Answer] = asyncio.ensure_future(self.in_thread(work))
        future.add_done_callback(self._done)
        if message.id:
            self._answers.begin(key, body, future)
        return await asyncio.shield(future)

    def _done(self, future: "asyncio.Future[Answer]") -> None:
        self._metrics.inflight -= 1
        if not future.cancelled():
            future.exception()  # the client may have gone: nobody else looks at it

    def _refuse_when_full(self) -> None:
        if self._metrics.inflight >= self._config.max_inflight:
            raise busy(f"{self._config.max_inflight} forwards wait or run already")

    async def _body(
        self, exchange: Exchange, length: int, json_length: int, begin: Callable[[memoryview, int], None]
    ) -> memoryview:
        """The whole body in one buffer; `begin` is told of it, and how much has come, where it is long."""
        reading = self._readings.begin(length)
        try:
            buffer = body_buffer(length, json_length)
            await exchange.read_into(reading, buffer, functools.partial(begin, buffer))
        finally:
            self._readings.end(reading)
        self._metrics.received += length
        return buffer
