"""Many `apt-model serve` processes, each there in a tenth of a second: children of one process that has loaded torch."""

import contextlib
import http.client
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
_START = 30.0
# What a server would load itself.
_LOADED = (
    "apt_model.cli.serving.apt_block", "apt_model.cli.serving.hf_block", "apt_model.cli.serving.placing",
    "apt_model.cloud.server.app", "apt_model.cloud.server.run", "uvicorn.protocols.http.httptools_impl",
)  # fmt: skip


class Nursery:
    """The process that forks servers; they end with it."""

    def __init__(self):
        self._process = subprocess.Popen(  # noqa: S603 - this file
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self._process.stdout.readline() == "there\n"

    def fork(self, port):
        """The id of a new server's process, which listens at `port` soon."""
        self._process.stdin.write(f"{port}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Server:
    """One server at one port, that is killed and started again; what it held is gone then.

    Without a nursery it is the command, in a process that loads everything itself and takes seconds for it.
    """

    def __init__(self, nursery=None):
        self._nursery = nursery
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.starts = self.kills = 0
        self.alive = False
        self.start()

    def start(self):
        # Either knows the process from another that gets its number later.
        self.process = psutil.Process(self._nursery.fork(self.port)) if self._nursery else self._command()
        until = time.monotonic() + _START
        while not self._is_ready():
            assert time.monotonic() < until, "the server does not start"
            time.sleep(0.005)
        self.alive = True
        self.starts += 1

    def kill(self):
        """SIGKILL; the moment before it is returned."""
        self.alive = False
        self.kills += 1
        moment = time.perf_counter()
        self.process.kill()
        return moment

    def close(self):
        if self.alive:
            self.kill()
        self.process.wait()

    def _command(self):
        words = [sys.executable, "-m", "apt_model", "serve", "--device", "cpu", "--allow-upload", "--port"]
        return psutil.Popen([*words, str(self.port)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _is_ready(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/v2/health/ready")
            found = connection.getresponse().status == 200
            connection.close()
            return found
        connection.close()
        return False


def _nurse():
    from apt_model.cli import serve

    for name in _LOADED:
        importlib.import_module(name)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    sys.stdout.write("there\n")
    sys.stdout.flush()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            quiet = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1):
                os.dup2(quiet, number)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            serve.run(["--port", line.strip(), "--device", "cpu", "--allow-upload"])
            os._exit(0)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
    for child in psutil.Process().children():
        child.kill()


if __name__ == "__main__":
    _nurse()
