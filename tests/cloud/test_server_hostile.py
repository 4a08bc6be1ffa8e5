"""Wrong requests, many at once: none is accepted, none is the server's fault, and good ones are served meanwhile."""

import asyncio
import collections
import time

import psutil
import pytest
import torch
import torch.nn.functional as F
from hostile import KINDS, hostile
from served import OPEN, answered, linear_file, over_http, request, running
from small_models import noise

COUNT, TOGETHER = 1000, 100
"""benchmarks/cloud/hostile.py sends 10 000, all at once."""


async def send(port, number, wait):
    """The status that a request gets; 0 where the connection is closed without one, -1 where nothing comes."""
    sent, _ = hostile(number)
    reader, writer = await asyncio.open_connection(OPEN, port)
    try:
        writer.write(sent)
        line = await asyncio.wait_for(reader.readline(), wait)
        return int(line.split()[1]) if line else 0
    except (ConnectionError, OSError):
        return 0
    except asyncio.TimeoutError:
        return -1
    finally:
        writer.transport.abort()


async def flood(port, count, together, wait=30.0):
    """How often each status came, by kind."""
    gate, found = asyncio.Semaphore(together), collections.Counter()

    async def one(number):
        async with gate:
            found[hostile(number)[1], await send(port, number, wait)] += 1

    await asyncio.gather(*(one(number) for number in range(count)))
    return found


@pytest.fixture
def server(tmp_path):
    tensors = linear_file(tmp_path / "a.safetensors")
    with (tmp_path / "log").open("w+") as log:
        with running("--weights", tmp_path / "a.safetensors", log=log) as (process, port):
            yield psutil.Process(process.pid), port, tensors
        log.seek(0)
        assert not log.read()


@pytest.mark.timeout(200)
def test_none_is_accepted_and_none_is_our_fault(server):
    process, port, tensors = server
    asyncio.run(flood(port, 100, 20))
    before = process.memory_info().rss
    found = asyncio.run(flood(port, COUNT, TOGETHER))
    grown = process.memory_info().rss - before
    codes = collections.Counter()
    for (_, code), count in found.items():
        codes[code] += count
    assert {kind for kind, _ in found} == set(KINDS)
    assert all(code == 0 or 400 <= code < 500 for code in codes), codes
    assert sum(codes.values()) == COUNT
    assert grown < 16 << 20, grown
    x = noise(3, 16)
    body, headers = request({"x": x})
    code, answer_headers, answer = over_http(port, "POST", "/v2/models/model/infer", body, headers)
    assert code == 200
    assert torch.equal(answered(answer_headers, answer)["y"], F.linear(x, **tensors))


@pytest.mark.timeout(100)
def test_good_requests_are_served_meanwhile(server):
    _, port, tensors = server
    x = noise(3, 16)
    body, headers = request({"x": x})
    expected = F.linear(x, **tensors)

    async def scene():
        storm = asyncio.create_task(flood(port, 400, 50))
        served = 0
        until = time.monotonic() + 60
        while not storm.done() and time.monotonic() < until:
            code, found, answer = await asyncio.to_thread(
                over_http, port, "POST", "/v2/models/model/infer", body, headers
            )
            if code == 200:
                assert torch.equal(answered(found, answer)["y"], expected)
                served += 1
            else:
                assert code == 429
        await storm
        return served

    assert asyncio.run(scene()) > 5
