"""A server is killed or hangs in the middle of a call: how long until the local result is there. Run by chaos.py."""

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

WIDE = 1024
SIZES = {"short": (48, 120), "long": (2048, 40)}  # rows of a call, and calls of that size that were made before


def halted(server, how, size, halts, seed):
    """Milliseconds from SIGKILL or SIGSTOP in the middle of a call to the local result, its computation taken off.

    The client has made calls of that size before, as one has that is in use: so it knows when an answer is late, and
    computes it here in the meantime. Of a short call that is before the sockets of a killed server are closed. The
    kernel frees a killed process's memory before it closes them: a second connection says when they are closed, and
    what comes after that is ours. A long call is not late by then, and closed sockets end it.
    """
    rows, calls = SIZES[size]
    numbers, took, ours, limits, too_late, sound = random.Random(seed), [], [], [], 0, True
    torch.manual_seed(seed)
    base, x = torch.nn.Linear(WIDE, WIDE), torch.randn(rows, WIDE)
    backend, seconds = OIPBackend([HttpTransport(server.url)]), []
    with torch.no_grad():
        expected = base(x)
    while len(took) < halts:
        layer, stamps = CloudNPULinear.from_linear(base, cloud_backend=backend), {}
        with torch.no_grad():
            before = [_seconds(layer, x) for _ in range(calls)][1:]  # the first one gives it the weights
            seconds += before
            counted = layer.get_stats()
            limits.append(_limit(backend, x))
            _stamp(layer, stamps)
            end = _during(server, how, layer, x, stamps, statistics.median(before) * (0.1 + 0.6 * numbers.random()))
        stats = layer.get_stats()
        outcome = [stats[name] - counted[name] for name in ("cloud_calls", "local_calls", "raised")]
        if outcome == [1, 0, 0]:
            too_late += 1  # the answer was there before
        else:
            compute = stamps["there"] - stamps["here"]
            took.append(1e3 * (end - stamps["halt"] - compute))
            ours.append(1e3 * max(end - max(stamps["closed"], stamps["halt"]) - compute, 0))
            sound &= outcome == [0, 1, 0] and torch.equal(stamps["y"], expected)
        if how == "kill":
            server.close()
            server.start()
    backend.close()
    found = {
        "signal": {"kill": "SIGKILL", "stop": "SIGSTOP"}[how], "call": size, "halts": halts, "seed": seed,
        "too_late_and_left_out": too_late, "right": halts if sound else 0, "counts_exact": sound,
        "call_ms": round(1e3 * statistics.median(seconds), 1), "late_after_ms": _spread(limits),
        "ms_from_the_signal": _spread(took), "goal_ms": 10, "above_goal": sum(each > 10 for each in took),
    }  # fmt: skip
    if how == "kill":
        found |= {
            "ms_from_closed_sockets": _spread(ours),
            "above_goal_from_closed_sockets": sum(each > 10 for each in ours),
        }
    return found


def _during(server, how, layer, x, stamps, after):
    """One call, and the signal to the server so many seconds after it began; the moment of its result."""
    with socket.create_connection(("127.0.0.1", server.port)) as second:
        watcher = threading.Thread(target=_watch, args=(second, stamps))
        signal = threading.Timer(after, _kill if how == "kill" else _stop, (server, stamps))
        watcher.start()
        signal.start()
        stamps["y"] = layer(x)
        end = time.perf_counter()
        signal.join()
        if how == "stop":
            server.process.resume()
            second.shutdown(socket.SHUT_RDWR)
        watcher.join()
    return end


def _spread(values):
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {
        "p50": round(cuts[49], 2), "p95": round(cuts[94], 2), "max": round(max(values), 2), "min": round(min(values), 2)
    }  # fmt: skip


def _seconds(layer, x):
    began = time.perf_counter()
    layer(x)
    return time.perf_counter() - began


def _limit(backend, x):
    """Milliseconds after which an answer to `x` is late: of the kinds of request, that which is as long."""
    endpoint, length = backend.client.endpoints[0], 4 * x.numel()
    kinds = [kind for kind in endpoint._times if kind[0].endswith("/infer") and kind[1] == length.bit_length()]
    return 1e3 * max(endpoint.late_after(kind, 1.5) or 0 for kind in kinds)


def _kill(server, stamps):
    stamps["halt"] = server.kill()


def _stop(server, stamps):
    stamps["halt"] = time.perf_counter()
    server.process.suspend()


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
