"""What is shown of a stack while it runs: a fresh table on a terminal, lines elsewhere, and no thread afterwards."""

import io
import logging
import threading
import time

import pytest
import torch
from rich.console import Console
from rich.live import Live
from torch import nn

from apt_model.core.errors import ConfigError, InputError
from apt_model.optimization import VGPUStack
from apt_model.vgpu.top import Top

LEVELS = {"levels": [{"capacity_mb": 0.11, "device": "cpu"}, {"capacity_mb": 12.5, "device": "cpu"}]}


def console(terminal, file=None):
    return Console(file=file or io.StringIO(), force_terminal=terminal, width=120, color_system=None)


def shown(said):
    return said.file.getvalue()


def running():
    return [thread for thread in threading.enumerate() if thread.name == "apt-vgpu-top"]


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def streamed(stack):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))).eval()
    stack.attach(model)
    return model


@pytest.mark.parametrize("terminal", [True, False])
def test_it_shows_what_stats_say(terminal):
    said = console(terminal)
    with VGPUStack(LEVELS) as stack, torch.no_grad():
        model = streamed(stack)
        with stack.top(every=0.01, console=said):
            assert len(running()) == 1
            looks = shown(said).count("12.5")
            assert looks >= 1
            model(torch.ones(1, 64))
            until(lambda: shown(said).count("12.5") > looks + 2)
        assert not running()
        hit_rate = stack.stats()["hit_rate"]
    last = shown(said)[-2500:]
    assert "1 cpu" in last
    assert "2 cpu" in last
    assert f"{hit_rate:.3f}" in last
    for word in ("capacity MB", "used MB", "peak MB", "hit rate", "GB/s", "stall ms"):
        assert word in last
    assert ("\x1b[" in shown(said)) == terminal  # only a terminal's cursor is moved
    assert ("┃" in shown(said)) == terminal


def stats_of(*came, stall_ms=12.0, hit_rate=0.5):
    level = {"device": "cpu", "capacity_mb": 2000.0, "used_mb": 1.5, "peak_mb": 3.0}
    levels = [{**level, "bytes_in": each, "hit_rate": hit_rate} for each in came]
    return {"levels": levels, "stall_ms": stall_ms}


def test_the_rate_is_that_of_the_last_interval(monkeypatch):
    from apt_model.vgpu import top

    now, given = [100.0], [stats_of(10**9, 0)]
    monkeypatch.setattr(top.time, "perf_counter", lambda: now[0])
    said = console(terminal=False)
    made = Top(lambda: given[-1], 1000, said)
    with made:
        now[0] += 2
        given.append(stats_of(7 * 10**9, 10**9))
        made._look()
        now[0] += 4
        given.append(stats_of(7 * 10**9, 2 * 10**9, stall_ms=1500, hit_rate=None))
    lines = shown(said).splitlines()
    assert [line.partition("GB/s in ")[2].partition(",")[0] for line in lines] == [
        "0.00", "0.00", "3.00", "0.50", "0.00", "0.25",
    ]  # fmt: skip
    assert lines[2] == (
        "level 1 cpu, capacity MB 2,000.0, used MB 1.5, peak MB 3.0, hit rate 0.500, GB/s in 3.00, stall ms 12"
    )
    assert lines[4].endswith("hit rate -, GB/s in 0.00, stall ms 1,500")
    assert "stall" not in lines[5]  # it is whoever computes that waits, on level 1


@pytest.mark.parametrize(("terminal", "every"), [(True, 0.25), (False, 10.0)])
def test_how_often_it_looks_where_nobody_says(terminal, every):
    assert Top(dict, None, console(terminal))._every == every
    assert Top(dict, 3, console(terminal))._every == 3


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_exception_it_is_over_and_the_exception_goes_on(terminal, error):
    said = console(terminal)
    with VGPUStack(LEVELS) as stack:
        with pytest.raises(error), stack.top(every=0.01, console=said):
            raise error
        assert not running()
        with stack.top(every=0.01, console=said):  # the console is free again
            pass
    if terminal:
        assert shown(said).count("\x1b[?25h") == shown(said).count("\x1b[?25l")  # the cursor is there again


def test_a_stack_that_is_closed_within_or_before():
    said = console(terminal=False)
    stack = VGPUStack(LEVELS)
    with stack.top(every=0.01, console=said):
        stack.close()
        count = shown(said).count("level 1")
        until(lambda: shown(said).count("level 1") > count + 2)
    with pytest.raises(InputError, match="closed"), stack.top():
        pytest.fail("it began")


@pytest.mark.parametrize("every", [0, -1.0])
def test_a_time_that_is_none(every):
    with VGPUStack(LEVELS) as stack, pytest.raises(ConfigError, match="every"), stack.top(every=every):
        pytest.fail("it began")


def test_a_console_that_is_gone_ends_the_showing_and_not_the_run(caplog):
    file = io.StringIO()
    said = console(terminal=False, file=file)
    with VGPUStack(LEVELS) as stack, caplog.at_level(logging.WARNING), stack.top(every=0.01, console=said):
        file.close()
        until(lambda: not running())
    assert caplog.text.count("shows no more") == 1


def test_a_console_that_shows_something_else(monkeypatch):
    from rich.errors import LiveError

    def busy(_self, *_args, **_kwargs):
        raise LiveError("Only one live display may be active at once")

    monkeypatch.setattr(Live, "start", busy)
    with (
        VGPUStack(LEVELS) as stack,
        pytest.raises(InputError, match="something else"),
        stack.top(console=console(terminal=True)),
    ):
        pytest.fail("it began")
    assert not running()


def test_what_fails_at_the_start_leaves_the_console_free():
    said = console(terminal=True)

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Top(fails, 1, said):
        pytest.fail("it began")
    with Live("free", console=said):
        pass
    assert not running()
