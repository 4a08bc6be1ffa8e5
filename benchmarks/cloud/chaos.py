"""Forwards while servers are killed, stopped and restarted, and the way to them cuts, corrupts, hangs and refuses.

    python benchmarks/cloud/chaos.py [--forwards 10000] [--seed 0] [--kills 100] [--folder amd-epyc-2-cores]

Rows: one server and one thread, whose outcomes follow from the seed, as no answer is late there before the deadline;
two replicas and four threads; one server and four threads; and servers that are killed by SIGKILL or stopped by SIGSTOP
in the middle of a call, with the time from the signal to the local result, the local computation itself taken off:
forked ones, and `apt-model serve` itself, with short calls and long ones. Leaves with 1 where an answer is wrong, a count is off, or
something is left open.
"""

import argparse
import collections
import hashlib
import http.client
import json
import logging
import random
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(Path(__file__).parent)]

import record  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from kills import SIZES, halted  # noqa: E402
from servers import Nursery, Server  # noqa: E402

from apt_model.cloud import freivalds  # noqa: E402
from apt_model.cloud.backend import OIPBackend  # noqa: E402
from apt_model.cloud.breaker import Breaker  # noqa: E402
from apt_model.cloud.client import Client, Retry  # noqa: E402
from apt_model.cloud.endpoint import LATE  # noqa: E402
from apt_model.cloud.fake import Answer, refusal  # noqa: E402
from apt_model.cloud.fake_http import Served  # noqa: E402
from apt_model.cloud.http_transport import HttpTransport  # noqa: E402
from apt_model.optimization import CloudNPULinear  # noqa: E402

WIDE_IN, WIDE_OUT, DEADLINE = 256, 384, 0.25
# What may happen to a request, in a thousand.
FAULTS = {"truncate": 50, "flip": 50, "flip request": 30, "refuse": 40, "fail": 20, "stale": 10, "busy": 20, "hang": 8,
          "stop": 4, "kill": 6}  # fmt: skip
DOWN = 15  # forwards for which a killed server stays away
# Of a token's length. A flipped bit of an input or an answer that changes less than rounding may is seen by no check of
# the product, and one that changes more passes the less often, the more it changes.
RIGHT, NEAR = 1e-3, 5e-5


class Way:
    """Stands before a server and does to requests what the seed says."""

    def __init__(self, server, numbers, lock):
        self.server, self.numbers, self.lock = server, numbers, lock
        self.drawn = collections.Counter()
        self.due = self.stopped = None  # the number of forwards after which it is there again
        self.forwards, self.pause = lambda: 0, 1

    def answer(self, method, path, headers, body):
        with self.lock:
            number, place = self.numbers.random() * 1000, self.numbers.random()
        fault = None
        for name, share in FAULTS.items():
            if number < share:
                fault = name
                break
            number -= share
        if path.startswith(("/v2/health", "/v2/repository")) or path == "/v2":
            fault = fault if fault in ("refuse", "truncate", "fail") else None
        self.drawn[fault or "none"] += 1
        if fault in ("fail", "stale", "busy"):
            status, more = {"fail": (500, {}), "stale": (404, {}), "busy": (429, {"retry_after": "0.01"})}[fault]
            return refusal(status, "as the seed says", **more)
        if fault in ("hang", "refuse"):
            return Answer(0, fault=fault)
        if fault == "flip request":
            body = _flipped(body, place)
        if fault in ("stop", "kill"):
            return self._halted(fault, method, path, headers, body)
        found = self._asked(method, path, headers, body, 5.0)
        return found._replace(body=_flipped(found.body, place)) if fault == "flip" else found._replace(fault=fault)

    def _halted(self, fault, method, path, headers, body):
        """The server has the request, and is killed before it can answer, or stopped until some forwards later."""
        with self.lock:
            if not self.server.alive or self.stopped is not None:
                return Answer(0, fault="refuse")
            self.server.process.suspend()
            if fault == "stop":
                self.stopped = self.forwards() + self.pause
            else:
                threading.Timer(0.002, self._kill).start()
        return self._asked(method, path, headers, body, 5.0)._replace(fault="refuse")

    def _kill(self):
        self.server.kill()
        self.due = self.forwards() + DOWN

    def recover(self, done):
        """Before a forward: go on with a server that is stopped, start one that was killed."""
        if self.stopped is not None and done >= self.stopped:
            self.stopped = None
            if self.server.alive:
                self.server.process.resume()
        if self.due is not None and done >= self.due:
            self.due = None
            self.server.close()
            self.server.start()

    def _asked(self, method, path, headers, body, seconds):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=seconds)
        try:
            kept = {name: value for name, value in headers.items() if name not in ("host", "connection")}
            connection.request(method, path, body or None, kept)
            found = connection.getresponse()
            named = {name: value for name, value in found.getheaders() if name.lower() != "content-length"}
            return Answer(found.status, found.read(), named)
        except (OSError, http.client.HTTPException):
            return Answer(0, fault="refuse")
        finally:
            connection.close()


def _flipped(body, place):
    changed = bytearray(body)
    if changed:
        bit = int(place * 8 * len(changed))
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class Run:
    """A layer before servers, and what became of its forwards."""

    def __init__(self, nursery, seed, forwards, replicas, threads):
        self.total, self.threads, self.seed = forwards, threads, seed
        lock = threading.Lock()
        numbers = random.Random(seed)
        self.ways = [Way(Server(nursery), numbers, lock) for _ in range(replicas)]
        self.served = [Served(way) for way in self.ways]
        self.done, self.lock = 0, threading.Lock()
        for way in self.ways:
            way.forwards, way.pause = lambda: self.done, threads
        # The breaker's seconds are forwards, so that one thread's outcomes follow from the seed.
        breaker = lambda: Breaker(first=4.0, longest=16.0, clock=lambda: float(self.done))  # noqa: E731
        transports = [HttpTransport(each.url) for each in self.served]
        late = LATE if threads > 1 else None  # what is late does not follow from a seed
        client = Client(transports, retry=Retry(first=0.002, longest=0.01), breaker=breaker, late=late)
        self.backend = OIPBackend(transports, client=client)
        torch.manual_seed(seed)
        freivalds.secrets.randbits = random.Random(seed).getrandbits  # what the check draws follows from the seed too
        self.layer = CloudNPULinear(WIDE_IN, WIDE_OUT, cloud_backend=self.backend, deadline_s=DEADLINE)
        self.outcomes, self.wrong, self.equal, self.far, self.worst = [""] * forwards, [], 0, 0, 0.0

    def row(self):
        began = time.perf_counter()
        threads = [threading.Thread(target=self._work, args=(number,)) for number in range(self.threads)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        stats = self.layer.get_stats()
        seconds = time.perf_counter() - began
        self.backend.close()
        kills = sum(way.server.kills for way in self.ways)
        open_connections = sum(each.transport.open_connections for each in self.backend.client.endpoints)
        for each in self.served:
            each.close()
        for way in self.ways:
            way.server.close()
        drawn = sum((way.drawn for way in self.ways), collections.Counter())
        counted = stats["cloud_calls"] + stats["local_calls"] + stats["raised"]
        return {
            "forwards": self.total, "threads": self.threads, "replicas": len(self.ways), "seed": self.seed,
            "seconds": round(seconds, 1), "right": self.total - len(self.wrong), "bit_equal": self.equal,
            "off_by_more_than_5e-5": self.far, "worst_relative_error": self.worst, "cloud_calls": stats["cloud_calls"],
            "local_calls": stats["local_calls"], "raised": stats["raised"],
            "counts_exact": counted == stats["forwards"] == self.total
            and stats["cloud_errors"] == stats["local_calls"] + stats["backward_local"], "retries": stats["retries"],
            "errors": stats["errors"], "requests": dict(sorted(drawn.items())),
            "kills": kills,
            "restarts": sum(way.server.starts - 1 for way in self.ways),
            "outcomes": hashlib.sha256("".join(self.outcomes).encode()).hexdigest()[:16] if self.threads == 1 else None,
            "connections_left": open_connections,
        }  # fmt: skip

    def _work(self, thread):
        for number in range(thread, self.total, self.threads):
            self._recover()
            x = torch.randn(1 + number % 16, WIDE_IN, generator=torch.Generator().manual_seed(number))
            x.requires_grad_(number % 10 == 0)
            before = self.layer.get_stats()["cloud_calls"] if self.threads == 1 else 0
            y = self.layer(x)
            if x.requires_grad:
                y.backward(torch.ones_like(y))
            with self.lock:
                self.done += 1
                self._judge(number, x, y.detach())
            if self.threads == 1:
                self.outcomes[number] = "c" if self.layer.get_stats()["cloud_calls"] > before else "l"

    @torch.no_grad()
    def _judge(self, number, x, y):
        expected = F.linear(x, self.layer.weight, self.layer.bias)
        off = float(((y - expected).norm(dim=1) / expected.norm(dim=1)).max())
        if x.grad is not None:
            gradient = torch.ones_like(y) @ self.layer.weight
            off = max(off, float(((x.grad - gradient).norm(dim=1) / gradient.norm(dim=1)).max()))
        self.equal += torch.equal(y, expected)
        self.worst = max(self.worst, off)
        self.far += off > NEAR
        if not off <= RIGHT:
            self.wrong.append(number)

    def _recover(self):
        with self.lock:
            for way in self.ways:
                way.recover(self.done)


def again(nursery, options, row):
    """Whether a second run with the same seed computes the same forwards elsewhere."""
    return Run(nursery, options.seed, options.forwards, 1, 1).row()["outcomes"] == row["outcomes"]


def held():
    """What this process has open: files and sockets, and threads."""
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forwards", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="of benchmarks/results, to write cloud_chaos.json there")
    options = parser.parse_args()
    logging.getLogger("apt_model.cloud").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    above, rows = record.header(), []
    nursery = Nursery()
    try:
        for replicas, threads in ((1, 1), (2, 4), (1, 4)):
            before = held()
            rows.append(Run(nursery, options.seed, options.forwards, replicas, threads).row())
            rows[-1]["files_and_threads_left"] = [now - then for now, then in zip(held(), before, strict=True)]
            if threads == 1:
                rows[-1]["the_same_again"] = again(nursery, options, rows[-1])
            print(json.dumps(rows[-1]), flush=True)
        ways = (("forked", lambda: Server(nursery)), ("apt-model serve", Server)) if options.kills else ()
        for name, make in ways:
            server = make()
            try:
                for size, how in ((size, how) for size in SIZES for how in ("kill", "stop")):
                    rows.append({"server": name, **halted(server, how, size, options.kills, options.seed)})
                    print(json.dumps(rows[-1]), flush=True)
            finally:
                server.close()
    finally:
        nursery.close()
    if options.folder:
        above["machine"]["device"] = record.processor()
        above["command"] = " ".join(["python", "benchmarks/cloud/chaos.py", *sys.argv[1:]])
        print(record.write("cloud_chaos", rows, folder=ROOT / "benchmarks" / "results" / options.folder, above=above))
    sound = all(row["right"] == row.get("forwards", row.get("halts")) and row["counts_exact"] for row in rows)
    left = any(row.get("connections_left") or any(row.get("files_and_threads_left", ())) for row in rows)
    return int(not sound or left)


if __name__ == "__main__":
    sys.exit(main())
