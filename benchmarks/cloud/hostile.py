"""10 000 wrong requests at once against `apt-model serve`: statuses, memory, and what good ones take meanwhile.

    python benchmarks/cloud/hostile.py [--count 10000] [--together 1000]

Prints a row of JSON; exits with 1 where a request was accepted, or was the server's fault.
"""

import argparse
import asyncio
import collections
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "cloud"), str(ROOT / "benchmarks")]

import psutil  # noqa: E402
import torch  # noqa: E402
from hostile import hostile  # noqa: E402
from record import machine  # noqa: E402
from served import OPEN, linear_file, request, running  # noqa: E402

WAIT = 60.0


async def status(port, number):
    """What a wrong request gets: a status, "closed", or "nothing"."""
    sent, _ = hostile(number)
    try:
        reader, writer = await asyncio.open_connection(OPEN, port)
    except OSError:
        return "closed"
    try:
        writer.write(sent)
        line = await asyncio.wait_for(reader.readline(), WAIT)
        return line.split()[1].decode() if line else "closed"
    except (OSError, asyncio.IncompleteReadError):
        return "closed"
    except asyncio.TimeoutError:
        return "nothing"
    finally:
        writer.transport.abort()


async def good(port, message, seconds, stop):
    """Good requests, one after the other on one connection: what each took, in ms, and how many were sent away."""
    body, headers = message
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    sent = (
        f"POST /v2/models/model/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode()
        + body
    )
    took, away, writer = [], 0, None
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stop.is_set():
        began = time.perf_counter()
        if writer is None:
            reader, writer = await asyncio.open_connection(OPEN, port)
        writer.write(sent)
        try:
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(answer.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            writer, away = None, away + 1
            continue
        if b" 200 " in answer[:20]:
            took.append((time.perf_counter() - began) * 1e3)
        else:
            away += 1
            await asyncio.sleep(0.01)
        if b"connection: close" in answer:
            writer.close()
            writer = None
    return took, away


async def flood(port, count, together):
    gate, found = asyncio.Semaphore(together), collections.Counter()

    async def one(number):
        async with gate:
            found[await status(port, number)] += 1

    await asyncio.gather(*(one(number) for number in range(count)))
    return found


async def peak(process, stop):
    most = 0
    while not stop.is_set():
        most = max(most, process.memory_info().rss)
        await asyncio.sleep(0.05)
    return most


async def measure(process, port, count, together):
    message = request({"x": torch.ones(1, 16)})
    await flood(port, 200, 50)
    idle, _ = await good(port, message, 3, asyncio.Event())
    before, stop = process.memory_info().rss, asyncio.Event()
    beside = [asyncio.create_task(good(port, message, 600, stop)), asyncio.create_task(peak(process, stop))]
    began = time.perf_counter()
    found = await flood(port, count, together)
    seconds = time.perf_counter() - began
    stop.set()
    (took, away), most = await asyncio.gather(*beside)

    def p99(values):
        return round(statistics.quantiles(values, n=100)[98], 3) if len(values) > 100 else None

    return {
        "count": count, "together": together, "seconds": round(seconds, 1), "statuses": dict(sorted(found.items())),
        "rss_growth_mib": round((most - before) / 2**20, 1),
        "rss_growth_after_mib": round((process.memory_info().rss - before) / 2**20, 1),
        "good": len(took), "good_sent_away": away, "good_idle_ms": [round(statistics.median(idle), 3), p99(idle)],
        "good_in_flood_ms": [round(statistics.median(took), 3) if took else None, p99(took)],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--together", type=int, default=1000)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with tempfile.TemporaryDirectory() as folder:
        linear_file(Path(folder) / "a.safetensors")
        with running("--weights", Path(folder) / "a.safetensors") as (process, port):
            row = asyncio.run(measure(psutil.Process(process.pid), port, options.count, options.together))
    print(json.dumps({**row, "machine": machine()}))
    return int(any(code.startswith(("2", "5")) or code == "nothing" for code in row["statuses"]))


if __name__ == "__main__":
    sys.exit(main())
