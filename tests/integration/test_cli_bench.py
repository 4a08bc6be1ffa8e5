"""`apt-model bench`: runs, checks, prints and writes; every option does something; mistakes end in four lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apt_model.cli import bench, bench_plot
from apt_model.cli.main import main
from apt_model.core.system import get_device_manager
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.optimization.bench import run

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def found():
    """What the command prints and leaves, in a process of its own."""
    args = [sys.executable, "-m", "apt_model", "bench", "--small", "--format", "json", *CPU]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), done.stderr


def asked(capsys, *args):
    code = main(["bench", "--small", *CPU, *map(str, args)])
    assert code == 0
    return capsys.readouterr()


def refused(capsys, *args):
    code = main(["bench", *map(str, args)])
    shown = capsys.readouterr()
    assert shown.out == ""
    return code, shown.err.splitlines()


def test_a_short_run_measures_everything_and_names_its_machine(found):
    values, told = found
    assert values["machine"]["device"]["name"] == get_device_manager("cpu").name()
    measured = [row for row in values["rows"] if row["status"] == "measured"]
    assert {row["part"] for row in measured} == {"linear", "attention", "disk"}
    assert {"nvfp4", "mxfp4", "nn.Linear fp32", "SDPA"} <= {row["what"] for row in measured}
    assert all(row["rate"] > 0 and row["share"] > 0 for row in measured)
    assert (values["written"], values["not_written"]) == ([], None)
    assert told.startswith("ceilings of memory, products and link\n")


def test_tables_are_plain_text_and_nothing_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = asked(capsys)
    assert shown.out.isascii()
    for words in (
        "  device",
        "\nceilings, measured in this run\n",
        "x 128, 1 row, nvfp4",
        "there is no link",
        "\ndisk\n",
    ):
        assert words in shown.out
    assert list(tmp_path.iterdir()) == []


def test_quiet_shows_no_progress(capsys):
    assert asked(capsys, "--quiet").err == ""


def test_json_and_picture_are_written_where_it_is_told_and_replaced(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    out = tmp_path / "deep" / "folder"
    for _ in range(2):
        assert f"written  {out / 'bench.json'}, {out / 'bench.png'}" in asked(capsys, "--out", out).out
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.png"]
    assert json.loads((out / "bench.json").read_text())["small"] is True
    assert (out / "bench.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_the_json_is_there_and_the_rest_is_said(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_plot, "can_plot", lambda: False)
    assert "pip install 'apt-transformer[plot]'" in asked(capsys, "--out", tmp_path).out
    values = json.loads(asked(capsys, "--out", tmp_path, "--format", "json").out)
    assert values["written"] == [str(tmp_path / "bench.json")]
    assert values["not_written"].startswith("bench.png: ")


def test_small_and_device_and_folder_are_what_is_measured(capsys, tmp_path, monkeypatch):
    given = []

    def remember(device, **options):
        given.append((device.kind, options["small"], options["folder"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "bench", remember)
    for args in (("--small", *CPU), CPU, (*CPU, "--folder", tmp_path)):
        assert main(["bench", *map(str, args)]) == 130
    assert given == [("cpu", True, None), ("cpu", False, None), ("cpu", False, tmp_path)]
    capsys.readouterr()


def test_the_disk_of_the_folder_is_measured_and_left_as_it_was(capsys, tmp_path, monkeypatch):
    seen = []
    make = run.disk.tempfile.mkdtemp
    monkeypatch.setattr(run.disk.tempfile, "mkdtemp", lambda **options: seen.append(options["dir"]) or make(**options))
    asked(capsys, "--folder", tmp_path)
    assert seen == [tmp_path]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can write")
def test_a_folder_in_which_nobody_can_write_costs_the_disks_rows_alone(capsys):
    rows = json.loads(asked(capsys, "--folder", "/proc", "--format", "json").out)["rows"]
    (told,) = [row for row in rows if row["part"] == "disk"]
    assert told["status"] == "not measured"
    assert "/proc: the disk cannot be measured" in told["why"]


def test_wrong_numbers_are_shown_as_such_and_end_in_an_error(capsys, monkeypatch):
    forward = FusedFP4Linear.forward
    monkeypatch.setattr(FusedFP4Linear, "forward", lambda self, x: forward(self, x) * 1.1)
    assert main(["bench", "--small", *CPU, "--format", "json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    packed = [row for row in rows if row["what"] in ("nvfp4", "mxfp4")]
    assert {row["status"] for row in packed} == {"wrong"}
    assert {(row["seconds"], row["rate"], row["speed_up"]) for row in packed} == {(None, None, None)}
    assert main(["bench", "--small", *CPU]) == 1
    assert "wrong: 1.0e-01 off" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--folder", "nowhere"), "--folder: expected a folder that exists, got 'nowhere'"),
        (("--out", "{file}"), "--out: expected a folder, or a place for one, got"),
        (("--out", "{file}/below"), "--out: expected a folder, or a place for one, got"),
        (("--device", "tpu"), "device 'tpu': expected auto"),
        (("--devise", "cpu"), "apt-model bench has no option --devise"),
        (("quick",), "apt-model bench: unexpected 'quick'"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(args, said, capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    code, lines = refused(capsys, *(arg.format(file=file) for arg in args))
    assert code in (2, 5)
    assert said in lines[0]
    assert lines[-1].startswith("more      apt-model --explain APT-E0")
    assert len(lines) <= 4
    assert file.read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_device_that_is_not_there_is_refused(capsys):
    code, lines = refused(capsys, "--device", "cuda")
    assert (code, lines[0].startswith("APT-E040  device 'cuda'")) == (5, True)


def test_lines_of_progress_come_at_most_every_two_seconds(monkeypatch, capsys):
    now = iter((10.0, 11.0, 12.5, 13.0))
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(now))
    lines = bench._Lines()
    for text in ("a", "b", "c", "d"):
        lines.tell(text)
    assert capsys.readouterr().err == "a\nc\n"


def test_a_killed_run_that_was_asked_to_stop_leaves_no_file(tmp_path):
    """Ctrl-C while the disk is written."""
    code = """
import os, signal, sys
from apt_model.cli.main import main
from apt_model.optimization.bench import disk
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
write = disk.Scratch.write
def stopped(self, size=None):
    taken = write(self, size)
    os.kill(os.getpid(), signal.SIGINT)
    return taken
disk.Scratch.write = stopped
sys.exit(main(["bench", "--small", "--device", "cpu", "--folder", sys.argv[1]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 130, done.stderr
    assert list(tmp_path.iterdir()) == []
