"""SIGKILL in the middle of a call: how long until the local result is there. Run by chaos.py."""

import contextlib
import random
import socket
import statistics
import threading
import time

import torch

from apt_model.cloud.backend import OIPBackend
from apt_model.cloud.http_transport import HttpTransport
from apt_model.optimization import CloudNPULinear


def killed(server, kills, seed):
    """Milliseconds from a kill in the middle of a call to the local result, without the local computation.

    The kernel frees a killed process's memory before it closes its sockets: a second connection says when those are
    closed, and what comes after that is ours.
    """
    numbers, took, ours, late, sound = random.Random(seed), [], [], 0, True
    torch.manual_seed(seed)
    base, x = torch.nn.Linear(1024, 1024), torch.randn(2048, 1024)
    with torch.no_grad():
        expected = base(x)
        call = _seconds_of_a_call(server, base, x)
    while len(took) < kills:
        backend, stamps = OIPBackend([HttpTransport(server.url)]), {}
        layer = CloudNPULinear.from_linear(base, cloud_backend=backend)
        _stamp(layer, stamps)
        with torch.no_grad(), socket.create_connection(("127.0.0.1", server.port)) as second:
            layer(x[:2])  # the weights are there
            watcher = threading.Thread(target=_watch, args=(second, stamps))
            killer = threading.Timer(0.001 + 0.8 * call * numbers.random(), _kill, (server, stamps))
            watcher.start()
            killer.start()
            y = layer(x)
            end = time.perf_counter()
            killer.join()
            watcher.join()
        stats = layer.get_stats()
        outcome = stats["cloud_calls"], stats["local_calls"], stats["raised"]
        if outcome == (2, 0, 0):
            late += 1  # the answer was there before the kill
        else:
            compute = stamps["there"] - stamps["here"]
            took.append(1e3 * (end - stamps["kill"] - compute))
            ours.append(1e3 * max(end - max(stamps["closed"], stamps["kill"]) - compute, 0))
            sound &= outcome == (1, 1, 0)
            sound &= torch.equal(y, expected)
        backend.close()
        server.close()
        server.start()
    return {
        "kills": kills, "seed": seed, "too_late_and_left_out": late, "right": kills if sound else 0,
        "counts_exact": sound, "call_ms": round(1e3 * call, 1), "ms_from_the_kill": _spread(took),
        "ms_from_closed_sockets": _spread(ours), "goal_ms": 10, "kills_above_goal": sum(each > 10 for each in took),
        "above_goal_from_closed_sockets": sum(each > 10 for each in ours),
    }  # fmt: skip


def _spread(values):
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {
        "p50": round(cuts[49], 2), "p95": round(cuts[94], 2), "max": round(max(values), 2), "min": round(min(values), 2)
    }  # fmt: skip


def _seconds_of_a_call(server, base, x):
    backend = OIPBackend([HttpTransport(server.url)])
    layer = CloudNPULinear.from_linear(base, cloud_backend=backend)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        layer(x)
        took.append(time.perf_counter() - began)
    backend.close()
    return statistics.median(took)


def _kill(server, stamps):
    stamps["kill"] = server.kill()


def _watch(connection, stamps):
    with contextlib.suppress(OSError):
        connection.recv(1)
    stamps["closed"] = time.perf_counter()


def _stamp(layer, stamps):
    """Note when the local computation begins and ends."""
    forward = layer._offload.forward

    def stamped(rows, reason, elsewhere, here):
        def timed():
            stamps["here"] = time.perf_counter()
            found = here()
            stamps["there"] = time.perf_counter()
            return found

        return forward(rows, reason, elsewhere, timed)

    layer._offload.forward = stamped
