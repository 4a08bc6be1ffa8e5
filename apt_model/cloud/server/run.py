"""The application on a socket, by uvicorn, and an end that loses nothing."""

import asyncio
import contextlib
import ctypes
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from apt_model.cloud.server.app import Application
from apt_model.cloud.server.connection import HEADER_SECONDS, imported, protocol

KEEP_ALIVE_SECONDS = 75
SEND_SECONDS = 30.0
"""How long an answer may wait for a client that does not read it."""
DRAIN_SECONDS = 0.5
"""Between the signal and the end of idle connections, in which their next request is still answered, with 503."""
_BACKLOG = 2048
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_BYTES = 8 << 20
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(
    app: Application, host: str, port: int, *, on_start: Callable[[int], None] | None = None,
    on_tick: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """Serve until SIGTERM or SIGINT, then answer what is in flight and return.

    Args:
        app: what answers.
        host: an address or a name; "::" is every address, of IPv4 too.
        port: 0 takes a free one.
        on_start: called with the port once it is open.
        on_tick: called twice a second; an exception from it ends the server and is raised.

    Raises:
        MissingExtraError: uvicorn is not installed.
    """
    _keep_memory()
    server = make_server(app, host, port, on_start, on_tick)
    server.run(sockets=_both_families(port) if host == "::" else None)
    if server.error is not None:
        raise server.error


def make_server(
    app: Application, host: str, port: int, on_start: Callable[[int], None] | None = None,
    on_tick: Callable[[], None] | None = None,
) -> Any:  # fmt: skip
    """A `uvicorn.Server`, with `error`: what ended it."""
    uvicorn = imported("uvicorn")

    base: Any = uvicorn.Server  # imported here, as it is optional

    class Server(base):  # type: ignore[misc]
        error: BaseException | None = None
        _ticks = 0

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """As uvicorn's, but the process ends well after a signal that it obeyed."""
            loop = asyncio.get_running_loop()
            with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: its owner calls `drain`
                for each in _SIGNALS:
                    loop.add_signal_handler(each, self.drain)
            try:
                yield
            finally:
                with contextlib.suppress(ValueError, RuntimeError):
                    for each in _SIGNALS:
                        loop.remove_signal_handler(each)

        def drain(self) -> None:
            """Take no more connections and no more work; end once what is in flight is answered."""
            if app.draining:
                self.force_exit = True  # asked twice
                self.should_exit = True
                return
            app.draining = True
            for each in self.servers:
                each.close()
            asyncio.get_running_loop().call_later(DRAIN_SECONDS, self._leave)

        def _leave(self) -> None:
            self.should_exit = True

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started and on_start is not None:
                on_start(self.servers[0].sockets[0].getsockname()[1])

        async def on_tick(self, counter: int) -> bool:
            self._ticks += 1
            if self._ticks % 5 == 0:  # uvicorn ticks ten times a second
                _sweep(self.server_state.connections)
                try:
                    if on_tick is not None:
                        on_tick()
                except BaseException as error:  # noqa: BLE001 - raised again where the server was started
                    self.error = error
                    self.should_exit = True
            return bool(await super().on_tick(counter))

    config = uvicorn.Config(
        app, host=host, port=port, http=protocol(app), ws="none", lifespan="on", log_config=None, log_level="error",
        access_log=False, server_header=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, backlog=_BACKLOG,
    )  # fmt: skip
    return Server(config)


def _keep_memory() -> None:
    """Let glibc keep what a forward gives back, up to 8 MiB: pages taken anew take longer than a short product."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES // 2)


def _both_families(port: int) -> list[socket.socket] | None:
    """A socket for IPv6 and IPv4, as asyncio's for "::" takes IPv6 alone; None where the system has none."""
    if not socket.has_dualstack_ipv6():
        return None
    return [socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)]


def _sweep(connections: Any) -> None:
    """End connections whose request's head does not come, and those that do not read their answer."""
    now = time.monotonic()
    for each in list(connections):
        if each.heard and now - each.heard > HEADER_SECONDS:
            each.close_with(b"408 Request Timeout")
        if each.flow.write_paused:
            since = each.__dict__.setdefault("stuck", now)
            if now - since > SEND_SECONDS:
                each.transport.abort()
        else:
            each.__dict__.pop("stuck", None)
