"""The benchmark's parts: no speed without right numbers, ceilings that bound, and nothing left on the disk."""

import dataclasses
import errno
import itertools
import json
import math
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from apt_model.cli import bench_plot, bench_text, output
from apt_model.core.errors import MissingExtraError, StorageError
from apt_model.core.system import get_device_manager
from apt_model.core.system.cpu import CpuDevice
from apt_model.core.system.device import Device
from apt_model.core.system.timing import Stopwatch
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.optimization import calibration
from apt_model.optimization.bench import attention, disk, link, products
from apt_model.optimization.bench import run as bench_run
from apt_model.optimization.bench.rows import MEMORY, Ceiling, Course, Row, beside, beside_peer, checked, random_bytes

CPU = get_device_manager("cpu")
CEILINGS = {
    MEMORY: Ceiling(unit="GB/s", how="copies", rate=10.0),
    **{f"product {name}": Ceiling(unit="TFLOP/s", how="products", rate=1.0) for name in ("bf16", "fp16", "fp32")},
}


class FixedWatch:
    """Says the same time for everything, and remembers what was timed."""

    def __init__(self, seconds=1e-3, device=CPU):
        self.device, self.seconds, self.timed = device, seconds, []

    def gpu(self, works):
        self.timed += works
        return self.seconds

    def wall(self, work):
        self.timed.append(work)
        return self.seconds


def course(watch=None):
    return Course(watch or FixedWatch())


# Clocks.


class Ticking(Device):
    """A device on which work takes a known time of a clock that only moves with it."""

    kind = "ticking"
    device = torch.device("cpu")
    presence = name = total_memory = free_memory = memory_allocated = peak_memory = lambda _: 0
    reset_peak_memory = empty_cache = synchronize = supports_bf16 = lambda _: None

    def __init__(self, tells=None):
        super().__init__()
        self.now, self.tells = 0.0, tells
        self.stand_ins = frozenset() if tells else frozenset({"seconds"})

    def seconds(self, work):
        work()
        return self.tells


def spend(device, seconds):
    device.now += seconds


def test_a_call_takes_what_the_clock_says():
    device = Ticking()
    watch = Stopwatch(device, 1.0, clock=lambda: device.now)
    assert watch.wall(lambda: spend(device, 0.01)) == pytest.approx(0.01)
    assert device.now == pytest.approx(0.01 * (2 + 5 * 20))


def test_calls_that_take_turns_are_each_called():
    device, calls = Ticking(), []
    watch = Stopwatch(device, 0.1, clock=lambda: device.now)
    works = [lambda n=n: (calls.append(n), spend(device, 0.01)) for n in range(3)]
    assert watch.gpu(works) == pytest.approx(0.01)
    assert calls[:6] == [0, 1, 2, 0, 1, 2]


def test_where_a_device_tells_its_own_time_that_counts():
    device, calls = Ticking(tells=0.5), []
    watch = Stopwatch(device, 0.1, clock=lambda: device.now)
    assert watch.gpu([lambda: (calls.append(0), spend(device, 0.0005))] * 2) == pytest.approx(0.5 / 4)
    assert len(calls) == 2 + 2 + 4  # once each to compile, once each to see how long it takes, two turns of both


# Rows.


def test_a_row_stands_beside_the_ceiling_that_takes_longest():
    row = Row(part="linear", what="x", seconds=1.0, work={MEMORY: 5e9, "product bf16": 1e11})
    few = beside(row, CEILINGS)
    assert (few.ceiling, few.rate, few.unit, few.share) == (MEMORY, 5.0, "GB/s", 0.5)
    many = beside(dataclasses.replace(row, work={MEMORY: 5e9, "product bf16": 8e11}), CEILINGS)
    assert (many.ceiling, many.unit) == ("product bf16", "TFLOP/s")
    assert (many.rate, many.share) == (pytest.approx(0.8), pytest.approx(0.8))


def test_without_a_ceiling_or_a_time_there_is_no_share():
    row = Row(part="linear", what="x", seconds=1.0, work={MEMORY: 5e9, "product bf16": 1e11})
    unknown = {MEMORY: Ceiling(unit="GB/s", how="copies", why="no memory")}
    assert beside(row, unknown) == row
    untimed = dataclasses.replace(row, seconds=None)
    assert beside(untimed, CEILINGS) == untimed
    assert beside_peer(row, untimed) == row
    assert beside_peer(row, dataclasses.replace(row, what="peer", seconds=3.0)).speed_up == 3


@pytest.mark.parametrize("error", [0.02, math.inf, math.nan])
def test_wrong_numbers_are_not_timed(error):
    row = checked(Row(part="linear", what="x"), lambda: error, 0.01, lambda: pytest.fail("it was timed"))
    assert (row.status, row.seconds, row.rate) == ("wrong", None, None)
    assert "off what was expected" in row.why


def test_what_fails_is_a_row_that_says_why():
    def fails():
        raise RuntimeError("out of something\nand more")

    row = checked(Row(part="linear", what="x"), fails, 0.01, lambda: 1.0)
    assert (row.status, row.why, row.seconds) == ("not measured", "RuntimeError: out of something", None)


def test_bytes_are_of_all_values():
    assert len(random_bytes(1 << 16).unique()) == 256
    assert random_bytes(13).shape == (13,)


# Linear layers.


def test_layers_are_compared_with_the_faster_peer():
    rows = list(products.layer_rows(course(), (32, 64), (1, 3), 0))
    assert [row.rows for row in rows] == [1] * 4 + [3] * 4
    assert all(row.status == "measured" and beside(row, CEILINGS).share > 0 for row in rows)
    packed = [row for row in rows if row.what in products.FORMATS]
    assert [row.speed_up for row in packed] == [1.0] * 4
    assert all(row.peer.startswith("nn.Linear") for row in packed)
    assert {row.peer for row in rows} - {row.peer for row in packed} == {None}
    assert all(0 < row.error < 0.01 for row in packed)


def test_the_faster_peer_counts(monkeypatch):
    class ByType(FixedWatch):
        def gpu(self, works):
            layer = works[0].func
            return 4.0 if isinstance(layer, FusedFP4Linear) else 2.0 if layer.weight.dtype == torch.float32 else 3.0

    monkeypatch.setattr(CpuDevice, "supports_bf16", lambda _: True)
    rows = list(products.layer_rows(course(ByType()), (32, 64), (1,), 0, ("nvfp4",)))
    assert [row.what for row in rows] == ["nn.Linear bf16", "nn.Linear fp32", "nvfp4"]
    assert (rows[-1].peer, rows[-1].speed_up) == ("nn.Linear fp32", 0.5)


def test_a_wrong_layer_has_no_speed(monkeypatch):
    forward = FusedFP4Linear.forward

    def off_in_one_row(self, x):
        out = forward(self, x)
        if self.format == "nvfp4":
            out[-1] *= 1.5
        return out

    monkeypatch.setattr(FusedFP4Linear, "forward", off_in_one_row)
    watch = FixedWatch()
    rows = {row.what: row for row in products.layer_rows(course(watch), (32, 64), (300,), 0)}
    wrong = rows["nvfp4"]
    assert (wrong.status, wrong.seconds, wrong.rate, wrong.share, wrong.speed_up) == ("wrong", *[None] * 4)
    assert rows["mxfp4"].status == "measured"
    assert not any(getattr(work.func, "format", "") == "nvfp4" for work in watch.timed)


def test_a_layer_that_cannot_be_made_is_a_row(monkeypatch):
    def full(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(products, "_packed", full)
    (row,) = products.layer_rows(course(), (32, 64), (1,), 0)
    assert (row.status, row.why) == ("not measured", "RuntimeError: out of memory")


def test_weights_take_turns():
    watch = FixedWatch()
    list(products.layer_rows(course(watch), (32, 64), (1,), 32 * 64 * 4 * 3, ("nvfp4",)))
    layers = {work.func for work in watch.timed}
    copies = [layer for layer in layers if getattr(layer.weight, "dtype", None) == torch.float32]
    assert len({layer.weight.data_ptr() for layer in copies if not isinstance(layer, FusedFP4Linear)}) == 4


def test_layers_fit_the_memory():
    shapes = ((14336, 4096), (4096, 4096), (256, 256))
    assert products.fitting(shapes, 4096, 0, 10**10) == shapes
    assert products.fitting(shapes, 4096, 0, 10**9) == shapes[1:]
    assert products.fitting(shapes, 4096, 10**9, 10**9) == shapes[-1:]


# Attention.


def test_attention_is_compared_with_its_definition():
    rows = list(attention.attention_rows(course(), 40, (2, 16), torch.float32, 10**9))
    assert [row.what for row in rows] == ["SDPA", "scores written out"]
    assert all(row.status == "measured" and row.error < 1e-5 for row in rows)
    assert (rows[0].speed_up, rows[1].speed_up) == (1.0, None)


def test_more_queries_than_are_compared_at_a_time(monkeypatch):
    monkeypatch.setattr(attention, "_PIECE", 16)
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    assert attention.error_of(attention.fused(q, k, v), q, k, v) < 1e-5
    late = attention.fused(q, k, v)
    late[0, 1, 39] += 1
    assert attention.error_of(late, q, k, v) > 0.1


def test_attention_that_looks_ahead_has_no_speed(monkeypatch):
    def ahead(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setitem(attention._WAYS, "SDPA", ahead)
    first, second = attention.attention_rows(course(), 40, (2, 16), torch.float32, 10**9)
    assert (first.status, first.seconds, first.speed_up, second.status) == ("wrong", None, None, "measured")


def test_scores_that_do_not_fit_are_not_written_out():
    first, second = attention.attention_rows(course(), 40, (2, 16), torch.float32, 1000)
    assert (first.status, first.speed_up) == ("measured", None)
    assert (second.status, second.seconds) == ("not measured", None)
    assert "the scores would take" in second.why


# The link.


def test_a_cpu_has_no_link():
    assert link.ceilings(FixedWatch(), 100) == {}
    (row,) = link.link_rows(course(), 100)
    assert (row.status, row.why) == ("not measured", link.NO_LINK)


def test_a_device_that_pins_nothing_says_so_and_pageable_memory_is_measured():
    limits = {link.TO: Ceiling(unit="GB/s", how="pinned", rate=1.0)}
    rows = [beside(row, limits) for row in link.link_rows(course(FixedWatch(device=Ticking())), 10**6)]
    assert ["pins no memory" in (row.why or "") for row in rows] == [True, True, False, False]
    assert [row.status for row in rows[2:]] == ["measured"] * 2
    assert (rows[2].rate, rows[2].share, rows[3].share) == (1.0, 1.0, None)


def test_without_pinned_memory_a_link_has_no_ceiling():
    limits = link.ceilings(FixedWatch(device=Ticking()), 1000)
    assert [(each.rate, "pins no memory" in each.why) for each in limits.values()] == [(None, True)] * 2


def test_a_copy_that_loses_a_byte_has_no_speed(monkeypatch):
    copy = torch.Tensor.copy_

    def lossy(target, source, *args, **options):
        copy(target, source, *args, **options)
        target.view(-1)[7] += 1
        return target

    monkeypatch.setattr(torch.Tensor, "copy_", lossy)
    rows = list(link.link_rows(course(FixedWatch(device=Ticking())), 1000))[2:]
    assert [(row.status, row.seconds) for row in rows] == [("wrong", None)] * 2


# The disk.


def left_in(folder):
    return [path.name for path in Path(folder).rglob("*")]


@pytest.fixture
def scratch(tmp_path):
    with disk.Scratch(tmp_path, 3 << 20, 0.2) as found:
        yield found


@pytest.mark.usefixtures("quiet_vgpu")
def test_the_store_is_measured_beside_plain_files(scratch):
    limits, rows = disk.measured(scratch)
    rows = [beside(row, limits) for row in rows]
    assert [row.ceiling for row in rows] == [disk.WRITE, disk.READ]
    assert all(row.status == "measured" and row.share > 0 for row in rows)


@pytest.mark.usefixtures("quiet_vgpu")
@pytest.mark.parametrize("stop", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_on_the_disk(tmp_path, stop):
    with pytest.raises(stop) if stop else pytest.MonkeyPatch.context(), disk.Scratch(tmp_path, 1 << 20, 0.1) as found:
        assert left_in(tmp_path)
        disk.measured(found)
        if stop:
            raise stop
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_when_the_first_write_stops(tmp_path, monkeypatch, stop):
    def stopping(path, size):
        path.write_bytes(b"half")
        raise stop

    monkeypatch.setattr(disk, "allocate", stopping)
    expected = StorageError if isinstance(stop, OSError) else KeyboardInterrupt
    with pytest.raises(expected), disk.Scratch(tmp_path, 1 << 20, 0.1):
        pass
    assert left_in(tmp_path) == []


@pytest.mark.usefixtures("quiet_vgpu")
def test_a_slow_disk_gets_a_small_file(tmp_path):
    clock = itertools.count(0.0, 1.0)  # every look is a second later: the first 4 MiB take one
    with disk.Scratch(tmp_path, 64 << 20, 2.0, clock=lambda: next(clock)) as found:
        assert found.size == 8 << 20
    with disk.Scratch(tmp_path, 64 << 20, 0.001, clock=lambda: next(clock)) as found:
        assert found.size == 4 << 20


def stored(folder):
    return bench_run._stored(course(), bench_run.sizes_of(CPU, small=True), folder)[1]


def test_a_full_disk_is_a_row_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    (row,) = stored(tmp_path)
    assert (row.status, "too few" in row.why) == ("not measured", True)
    assert left_in(tmp_path) == []


def test_a_disk_that_fills_up_in_between_is_a_row(tmp_path, monkeypatch):
    allocate, count = disk.allocate, itertools.count()

    def fills_up(path, size):
        if next(count):
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(path, size)

    monkeypatch.setattr(disk, "allocate", fills_up)
    (row,) = stored(tmp_path)
    assert (row.status, "No space left" in row.why) == ("not measured", True)
    assert left_in(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can write")
def test_a_read_only_folder_is_a_row():
    (row,) = stored(Path("/proc"))
    assert row.status == "not measured"
    assert row.why.startswith("/proc: the disk cannot be measured: ")


@pytest.mark.usefixtures("quiet_vgpu")
def test_a_disk_that_changes_bytes_is_no_ceiling(scratch, monkeypatch):
    read = disk.Scratch.read
    monkeypatch.setattr(disk.Scratch, "read", lambda self, out: (read(self, out), out[:9].add_(1))[0])
    limits, rows = disk.measured(scratch)
    assert limits[disk.READ].rate is None
    assert "read as others than were written" in limits[disk.READ].why
    assert [(row.status, beside(row, limits).share) for row in rows] == [("measured", None)] * 2


@pytest.mark.usefixtures("quiet_vgpu")
def test_a_store_that_changes_bytes_has_no_speed(scratch, monkeypatch):
    read = disk.DiskStore.read
    monkeypatch.setattr(
        disk.DiskStore, "read", lambda self, key, out: (read(self, key, out), out[:9].add_(1))[0]
    )  # fmt: skip
    _, rows = disk.measured(scratch)
    assert [(row.status, row.seconds, row.rate) for row in rows] == [("wrong", None, None)] * 2


# All of it.


@pytest.fixture(scope="module")
def report():
    return bench_run.bench(CPU, small=True)


def test_more_memory_means_larger_layers():
    class Card(Ticking):
        kind, room = "card", 0

        def free_memory(self):
            return self.room

    found = []
    for room in (160 * 2**30, 4 * 2**30, 2**29):
        Card.room = room
        found.append(bench_run.sizes_of(Card()))
        assert 4 * found[-1].turns < found[-1].room <= room // 2
    assert found[0].shapes == ((14336, 4096), (4096, 4096))
    assert [len(each.shapes) for each in found] == [2, 2, 2]
    areas = [math.prod(each.shapes[0]) for each in found]
    assert areas[0] > areas[1] > areas[2]
    assert found[0].side > found[2].side


def test_the_higher_ceiling_of_either_end_of_a_run_counts(monkeypatch):
    """What else ran at the beginning is no reason for a share above 1."""
    rates = iter((0.5, 4.0))
    monkeypatch.setattr(products, "peers", lambda _: (torch.float32,))
    monkeypatch.setattr(products, "native", lambda _: torch.float32)
    monkeypatch.setattr(products, "square_tflops", lambda *_: next(rates))
    found = bench_run.bench(CPU, small=True, watch=FixedWatch())
    limit = found.ceilings["product fp32"]
    assert limit.rate == 4.0
    bound = [row for row in found.rows if row.ceiling == "product fp32"]
    assert all(row.share == pytest.approx(row.rate / 4.0) for row in bound)


def test_a_ceiling_that_cannot_be_measured_costs_the_shares_alone(monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(products, "square_tflops", fails)
    monkeypatch.setattr(bench_run.Probe, "memory", fails)
    found = bench_run.bench(CPU, small=True)
    assert found.ceilings[MEMORY].why == "RuntimeError: out of memory"
    assert all((row.status, row.share) == ("measured", None) for row in found.rows if row.part == "linear")
    bench_text.tell(found)


def test_a_device_that_does_not_say_what_is_free_gets_small_layers(monkeypatch):
    monkeypatch.setattr(CpuDevice, "supports", lambda _, fn: fn != "free_memory")
    assert 0 < bench_run.sizes_of(CPU).room < 2**30


def test_the_report_says_what_it_is_true_for(report):
    values = json.loads(output.as_json(dataclasses.asdict(report)))
    assert set(values) == {"version", "machine", "small", "seconds", "ceilings", "rows"}
    machine = values["machine"]
    assert {"date", "commit", "driver", "torch", "triton", "python", "apt_model", "cores", "system"} < set(machine)
    assert machine["device"]["name"] == CPU.name()
    assert set(values["ceilings"]) >= {MEMORY, "product fp32", disk.READ, disk.WRITE}
    assert {row["part"] for row in values["rows"]} == {"linear", "attention", "link", "disk"}
    names = {field.name for field in dataclasses.fields(Row)}
    assert all(set(row) == names for row in values["rows"])
    for row in values["rows"]:
        assert (row["seconds"] is None) == (row["status"] != "measured") == (row["why"] is not None)
        assert row["seconds"] is None or (row["rate"] > 0 and row["share"] > 0)


def test_a_commit_is_named_only_where_git_knows_the_file(monkeypatch, tmp_path):
    copied = tmp_path / "run.py"
    copied.write_text("")
    monkeypatch.setattr(bench_run, "__file__", str(copied))
    assert bench_run._commit() is None


def test_a_picture_is_drawn(report, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    bench_plot.draw(report, tmp_path / "bench.png")
    data = (tmp_path / "bench.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 10_000
    assert left_in(tmp_path) == ["bench.png"]


def test_a_picture_of_nothing_is_drawn_too(report, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    bare = [Row(part="linear", what="nvfp4", why="nothing fits")]
    bench_plot.draw(dataclasses.replace(report, rows=bare, ceilings={}), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_without_matplotlib_the_extra_is_named(report, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_plot, "can_plot", lambda: False)
    with pytest.raises(MissingExtraError, match="plot"):
        bench_plot.draw(report, tmp_path / "bench.png")
    assert left_in(tmp_path) == []


def test_of_peers_the_one_that_counts_is_shown():
    rows = [
        Row(part="linear", what="nn.Linear bf16", shape="a", rows=1, share=0.5, seconds=1.0),
        Row(part="linear", what="nn.Linear fp32", shape="a", rows=1, share=0.4, seconds=2.0),
        Row(part="linear", what="nvfp4", shape="a", rows=1, share=0.3, seconds=1.0, peer="nn.Linear bf16"),
        Row(part="linear", what="nvfp4", shape="b", rows=1, share=0.3, seconds=1.0, peer="nn.Linear bf16"),
        Row(part="disk", what="read", share=0.2, seconds=1.0),
        Row(part="disk", what="write", why="full"),
    ]
    assert bench_plot._shown(rows) == [rows[0], rows[2], rows[4]]


def test_wrong_and_missing_rows_are_told_with_their_reason(report, capsys):
    wrong = Row(part="linear", what="nvfp4", shape="8 x 8", rows=4, status="wrong", why="wrong: 1.0 off")
    bench_text.tell(dataclasses.replace(report, rows=[*report.rows, wrong]))
    shown = capsys.readouterr().out
    assert "8 x 8, 4 rows, nvfp4  wrong: 1.0 off" in shown
    assert link.NO_LINK in shown
    assert shown.isascii()


@pytest.mark.parametrize(("share", "said"), [(0.987, "99%"), (0.034, "3.4%"), (0.002, "0.2%"), (1.14, "114%")])
def test_shares(share, said):
    assert bench_text.percent(share) == said


@pytest.mark.parametrize(("rate", "said"), [(2958.4, "2,958"), (792.6, "793"), (54.17, "54.2"), (0.04375, "0.0437")])
def test_rates(rate, said):
    assert bench_text.figure(rate) == said


# Calibration.


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(calibration, "_LAYERS_CPU", ((64, 64),))
    monkeypatch.setattr(calibration, "_MANY_CPU", 4)
    monkeypatch.setattr(calibration, "_WRITTEN", 1 << 20)
    monkeypatch.setattr(calibration, "_FIGURE_S", 1e-3)
    monkeypatch.setattr(calibration._Process, "found", None)


@pytest.mark.usefixtures("brief")
def test_a_calibration_is_kept_for_the_process(tmp_path):
    assert calibration.last() is None
    found = calibration.calibrate(CPU, folder=tmp_path)
    assert (found.device, found.name, found.layer, found.many_rows) == ("cpu", CPU.name(), (64, 64), 4)
    for value in (found.few_speed_up, found.many_speed_up, found.few_seconds, found.disk_gbps, found.seconds):
        assert value > 0
    assert (found.link_gbps, dict(found.why)) == (None, {"link_gbps": link.NO_LINK})
    assert calibration.calibrate(CPU) is found is calibration.last()
    assert calibration.calibrate(CPU, again=True) is not found
    assert left_in(tmp_path) == []


@pytest.mark.usefixtures("brief")
def test_what_cannot_be_calibrated_has_a_reason(tmp_path, monkeypatch):
    forward = FusedFP4Linear.forward
    monkeypatch.setattr(FusedFP4Linear, "forward", lambda self, x: forward(self, x) * (2 if len(x) == 4 else 1))
    found = calibration.calibrate(CPU, folder=tmp_path / "missing")
    assert found.few_speed_up > 0
    names = {"many_speed_up", "many_seconds", "link_gbps", "disk_gbps"}
    assert set(found.why) == names
    assert [getattr(found, name) for name in names] == [None] * 4
    assert found.why["many_speed_up"].startswith("wrong: ")
    assert str(tmp_path / "missing") in found.why["disk_gbps"]


def test_the_temporary_folder_is_what_is_measured_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with disk.Scratch(None, 1 << 20, 0.1) as found:
        assert found.folder.parent == tmp_path
