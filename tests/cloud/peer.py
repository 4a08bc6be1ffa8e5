"""Independent implementations of the protocol, each in an environment of its own that `make peers` makes."""

import contextlib
import http.client
import os
import socket
import subprocess
import time

import pytest
from served import OPEN, ROOT


def python_of(name):
    """The Python that has the peer."""
    return ROOT / f".peers-{name}" / "bin" / "python"


def needs(name):
    """Skip where the peer is not installed."""
    return pytest.mark.skipif(not python_of(name).exists(), reason=f"there is no .peers-{name}: run `make peers`")


def free_ports(count):
    """Ports that nobody listens at now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((OPEN, 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def serving(command, port, *, folder, ready="/v2/health/ready", seconds=90):
    """A server in a process of its own, once it is ready."""
    with (folder / "peer.log").open("w+") as log:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        process = subprocess.Popen([*map(str, command)], cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            until = time.monotonic() + seconds
            while not _answers(port, ready):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    pytest.fail(f"it did not start: {log.read()[-4000:]}")
                time.sleep(0.1)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port, path):
    connection = http.client.HTTPConnection(OPEN, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
