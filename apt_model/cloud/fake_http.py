"""A fake behind a socket of this machine, for what only a socket shows: hangs, cuts, connections that are closed."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from apt_model.cloud.fake import Answer, Answers


class Served:
    """A fake that listens.

    Attributes:
        url: where.
    """

    def __init__(self, fake: Answers) -> None:
        self.released = threading.Event()
        """What hangs ends when this is set."""
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                with contextlib.suppress(OSError, ValueError):  # the other side went away, or `close` cut it
                    super().handle_one_request()
                    return
                self.close_connection = True

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", "0")))
                headers = {name.lower(): value for name, value in self.headers.items()}
                served.write(self, fake.answer(self.command, self.path, headers, body))

            do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - http.server names them

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            daemon_threads = False
            block_on_close = True
            request_queue_size = 64

            def get_request(self) -> Any:
                found = super().get_request()
                served.sockets.add(found[0])
                return found

            def shutdown_request(self, request: Any) -> None:
                served.sockets.discard(request)
                super().shutdown_request(request)

            def handle_error(self, *_: Any) -> None:
                """Say nothing."""

        self.sockets: set[socket.socket] = set()
        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="fake-http")
        self._thread.start()

    def write(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        """Answer, or do what the fault is."""
        if answer.fault == "hang":
            self.released.wait(60)
        if answer.fault in ("refuse", "hang"):
            handler.close_connection = True
            return
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        if answer.status != 204:
            handler.send_header("Content-Length", str(len(answer.body)))
        handler.end_headers()
        if answer.fault == "truncate":
            handler.wfile.write(answer.body[: len(answer.body) // 2])
            handler.close_connection = True
        elif answer.status != 204:
            handler.wfile.write(answer.body)

    def close(self) -> None:
        """Stop listening and cut every connection, as a killed server does."""
        if self.released.is_set():
            return
        self.released.set()
        self._server.shutdown()
        for each in list(self.sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def serving(fake: Answers) -> Iterator[Served]:
    """A fake that listens while the block runs."""
    served = Served(fake)
    try:
        yield served
    finally:
        served.close()
