"""A run that is killed at any instant and resumed ends with the weights of the run that was left alone, bit for bit."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_run import EVERY, STEPS, settings
from micro import figures, tensors_of
from safetensors import SafetensorError

from apt_model.core.errors import CheckpointError, InterruptedRun
from apt_model.core.files import sha256
from apt_model.modeling import pretrained
from apt_model.trainer import checkpoint
from apt_model.trainer import trainer as trainer_module
from apt_model.trainer.checkpoint import Checkpoint, verify
from apt_model.trainer.metrics import read_metrics
from apt_model.trainer.progress import Silent
from apt_model.trainer.runs import step_folder, steps_saved
from apt_model.trainer.trainer import Trainer

HERE = Path(__file__).parent
DRAW = random.Random(20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, texts):
    """The folder of a run that nobody disturbed, in a process of its own."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(out, texts, "new").returncode == 0
    return out


@pytest.fixture
def run_copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "out")


def start(out, source, how, *kill):
    command = [sys.executable, "-W", "error", str(HERE / "killed_run.py"), str(out), str(source), how, *map(str, kill)]
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(out, source, how, *kill):
    process = start(out, source, how, *kill)
    process.out, process.err = process.communicate(timeout=120)
    return process


def assert_equal_runs(out, whole):
    assert sha256(step_folder(out, STEPS) / "model.safetensors") == sha256(
        step_folder(whole, STEPS) / "model.safetensors"
    )
    assert tensors_of(step_folder(out, STEPS)) == tensors_of(step_folder(whole, STEPS))
    assert not list(out.rglob(".partial-*"))
    assert {path.name for path in (out / "checkpoints").iterdir()} == {f"step-{step:08}" for step in (104, 112)}


# --- killed


def test_killed_again_and_again(whole, texts, tmp_path):
    """Each leg ends in SIGKILL at another place; steps that were saved are whole at every moment in between."""
    out = tmp_path / "out"
    legs = [
        # place, which call of it in this process, and the newest step that must be there afterwards
        ("before a step", DRAW.randint(1, EVERY), 0),
        ("before a step", DRAW.randint(EVERY + 1, 2 * EVERY), 8),
        ("in the weights", 3, 24),
        ("before the manifest", 4 + 4 * 2 + DRAW.randint(1, 4), 40),  # four files are read back, then four a checkpoint
        ("after the rename", 2 * 3 - 1, 64),
        ("after the rename", 2 * 2, 80),
        ("in the optimizer's state", 2, 88),
        ("before a step", DRAW.randint(13, 16), 96),
        ("in the weights", 1, 96),
        ("before a step", DRAW.randint(9, 15), 104),
    ]
    for leg, (place, call, newest) in enumerate(legs):
        process = run(out, texts, "resume" if leg else "new", place, call)
        assert process.returncode == -signal.SIGKILL, (leg, process.err)
        saved = steps_saved(out)
        assert (saved[-1] if saved else 0) == newest, (leg, saved)
        for step in saved:
            verify(step_folder(out, step))
        assert len(saved) <= 3
    process = run(out, texts, "resume")
    assert process.returncode == 0, process.err
    assert_equal_runs(out, whole)
    assert figures(out) == figures(whole)
    steps = [row["step"] for row in read_metrics(out) if "loss" in row]
    assert steps == [*range(3, STEPS, 3), STEPS]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop(whole, texts, tmp_path, number):
    out = tmp_path / "out"
    process = start(out, texts, "new")
    for line in process.stdout:
        if int(line) == 20:
            process.send_signal(number)
            break
    said, words = process.communicate(timeout=120)
    assert process.returncode == InterruptedRun.exit_code
    done = int(said.split()[-1]) if said else 20
    assert words.splitlines()[-3:] == [
        f"stopped by {number.name} after step {done} of {STEPS}",
        f"saved: {step_folder(out, done)}",
        f"to go on: apt-model train --out {out} --resume",
    ]
    assert steps_saved(out)[-1] == done
    process = run(out, texts, "resume")
    assert process.returncode == 0, process.err
    assert process.out.split()[0] == str(done + 1)
    assert_equal_runs(out, whole)
    assert [row["step"] for row in read_metrics(out) if "loss" in row] == sorted({*range(3, STEPS, 3), done, STEPS})


class Raises(Silent):
    """Sends this process a signal after each of the steps named."""

    def __init__(self, steps, number):
        self.steps, self.number = steps, number

    def step(self, step, _row):
        if step in self.steps:
            signal.raise_signal(self.number)


def test_a_stop_that_comes_late_in_a_step_waits_for_the_next(texts, tmp_path):
    """Between the row and the checkpoint of step 5: step 6 is done, logged and saved too."""
    trainer = Trainer(settings(tmp_path / "out", texts, steps=9), progress=Raises({5}, signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedRun, match="stopped by SIGTERM after step 6 of 9"):
        trainer.run()
    assert signal.getsignal(signal.SIGTERM) == before
    assert steps_saved(tmp_path / "out") == [6]
    assert [row["step"] for row in read_metrics(tmp_path / "out")] == [3, 6]


def test_a_second_signal_ends_at_once(texts, tmp_path):
    class Twice(Silent):
        def step(self, step, _row):
            if step == 2:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Trainer(settings(tmp_path / "out", texts), progress=Twice()).run()
    assert steps_saved(tmp_path / "out") == []


@pytest.mark.parametrize("step", [2, 3])
def test_a_signal_in_the_last_step_is_no_interruption(texts, tmp_path, step):
    Trainer(settings(tmp_path / "out", texts, steps=3), progress=Raises({step}, signal.SIGINT)).run()
    assert steps_saved(tmp_path / "out") == [3]


# --- everything that a checkpoint keeps matters


KEPT = [
    "optimizer.step", "optimizer.exp_avg", "optimizer.exp_avg_sq", "treatment.adagc.count", "treatment.adagc.norm",
    "treatment.low_rank.basis", "treatment.low_rank.error",
]  # fmt: skip


@pytest.mark.parametrize("kind", [None, *KEPT])
def test_state_that_came_back_wrong_would_show(run_copy, whole, texts, monkeypatch, kind):
    """The run is one in which every kind of state enters the weights, so that equality says something."""
    shutil.rmtree(step_folder(run_copy, STEPS))
    load = trainer_module.load_checkpoint

    def altered(root, step):
        found = load(root, step)
        names = [name for name in found.tensors if kind is not None and f"{name}.".startswith(f"{kind}.")]
        assert names or kind is None
        changes = {
            name: found.tensors[name].flip(0) if found.tensors[name].ndim else found.tensors[name] // 2
            for name in names
        }
        return Checkpoint(found.step, {**found.tensors, **changes}, found.state)

    monkeypatch.setattr(trainer_module, "load_checkpoint", altered)
    Trainer(settings(run_copy, texts, resume=True)).run()
    same = sha256(step_folder(run_copy, STEPS) / "model.safetensors") == sha256(
        step_folder(whole, STEPS) / "model.safetensors"
    )
    assert same is (kind is None)


# --- damaged


def truncate(name):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-7])

    return damage


def flip(name):
    def damage(folder):
        path = folder / name
        data = bytearray(path.read_bytes())
        data[len(data) * 2 // 3] ^= 0x10
        path.write_bytes(data)

    return damage


def remove(name):
    return lambda folder: (folder / name).unlink()


def edit_manifest(change):
    def damage(folder):
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return damage


def foreign(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def renamed(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-00000104"), folder)


def rewrite(name, text):
    return lambda folder: (folder / name).write_text(text)


FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"]
DAMAGES = {
    **{f"{name} truncated": (truncate(name), f"{name} has .* bytes instead of .*: it is truncated") for name in FILES},
    **{f"{name} flipped": (flip(name), f"{name} was altered: its SHA-256 is not the one recorded") for name in FILES},
    **{f"{name} missing": (remove(name), f"{name} is missing") for name in FILES},
    "foreign folder": (foreign, "it has no manifest.json, so it is no checkpoint of a run"),
    "manifest truncated": (truncate("manifest.json"), "its manifest.json cannot be read"),
    "manifest of another kind": (rewrite("manifest.json", "[1, 2]"), "its manifest.json cannot be read"),
    "format": (
        edit_manifest(lambda manifest: manifest.update(format=2)),
        "it has format 2, and this version reads format 1",
    ),
    "nothing listed": (
        edit_manifest(lambda manifest: manifest["files"].clear()),
        "its manifest.json does not list config.json, model.safetensors, optimizer.safetensors, state.json",
    ),
    "another step": (renamed, "it holds step 104, whatever its name says"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(run_copy, whole, texts, name):
    damage, reason = DAMAGES[name]
    newest, earlier = step_folder(run_copy, STEPS), step_folder(run_copy, 104)
    before = tensors_of(earlier)
    damage(newest)
    with pytest.raises(CheckpointError, match=f"{newest} is refused: {reason}") as error:
        Trainer(settings(run_copy, texts, resume=True))
    assert error.value.state == "the checkpoint of step 104 is untouched"
    assert error.value.remedy == (f"to go on from it: rm -r {newest} && apt-model train --out {run_copy} --resume")
    assert tensors_of(earlier) == before
    shutil.rmtree(newest)
    Trainer(settings(run_copy, texts, resume=True)).run()
    assert_equal_runs(run_copy, whole)


def test_the_only_checkpoint_is_refused_without_promising_another(run_copy, texts):
    shutil.rmtree(step_folder(run_copy, 104))
    flip("model.safetensors")(step_folder(run_copy, STEPS))
    with pytest.raises(CheckpointError, match="was altered") as error:
        Trainer(settings(run_copy, texts, resume=True))
    assert (error.value.state, error.value.remedy) == ("there is no earlier checkpoint", None)


def test_a_checkpoint_of_another_model_is_refused(run_copy, texts, tmp_path):
    wider = {"model": {"d_ff": 96, "num_decoder_layers": 1, "dropout": 0.1}}
    Trainer(
        settings(tmp_path / "wider", texts, **wider, steps=STEPS + 8, eval_every=0, checkpoint_every=STEPS + 8)
    ).run()
    shutil.copytree(step_folder(tmp_path / "wider", STEPS + 8), step_folder(run_copy, STEPS + 8))
    with pytest.raises(CheckpointError, match=r"holds another model than .*train\.json describes"):
        Trainer(settings(run_copy, texts, resume=True))


# --- half-written


def test_what_a_killed_process_left_half_written_is_ignored_and_cleaned(run_copy, whole, texts):
    shutil.rmtree(step_folder(run_copy, STEPS))
    for number in (1, os.getpid()):
        folder = run_copy / "checkpoints" / f".partial-step-{STEPS:08}-{number}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    (run_copy / ".partial-train.json-1").write_text("{")
    Trainer(settings(run_copy, texts, resume=True)).run()
    assert_equal_runs(run_copy, whole)


def test_a_line_of_metrics_that_was_cut_short_is_dropped(run_copy, whole, texts):
    shutil.rmtree(step_folder(run_copy, STEPS))
    path = run_copy / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    Trainer(settings(run_copy, texts, resume=True)).run()
    assert figures(run_copy) == figures(whole)


# --- a full disk


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_safetensors(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "fault",
    [
        (pretrained, "save_file", full),
        (pretrained, "save_file", full_in_safetensors),
        (checkpoint, "save_file", full_in_safetensors),
        (Path, "write_text", full),
        (os, "fsync", full),
    ],
)
def test_a_full_disk_leaves_the_earlier_checkpoint(run_copy, whole, texts, monkeypatch, fault):
    shutil.rmtree(step_folder(run_copy, STEPS))
    before = tensors_of(step_folder(run_copy, 104))
    trainer = Trainer(settings(run_copy, texts, resume=True))
    save = trainer.save

    def save_on_a_full_disk():
        with monkeypatch.context() as patch:
            patch.setattr(*fault)
            save()

    monkeypatch.setattr(trainer, "save", save_on_a_full_disk)
    with pytest.raises(CheckpointError, match=f"step-{STEPS:08} could not be written: .*No space left") as error:
        trainer.run()
    assert error.value.state == "the checkpoint of step 104 is untouched"
    assert error.value.remedy == f"make room on the disk, then: apt-model train --out {run_copy} --resume"
    assert isinstance(error.value.__cause__, OSError | SafetensorError)
    assert {path.name for path in (run_copy / "checkpoints").iterdir()} == {"step-00000104"}
    assert tensors_of(step_folder(run_copy, 104)) == before
    Trainer(settings(run_copy, texts, resume=True)).run()
    assert_equal_runs(run_copy, whole)


def test_this_process_computes_as_the_others_did(whole, texts, tmp_path):
    """What the tests above assume of threads."""
    assert torch.get_num_threads() == 1
    Trainer(settings(tmp_path / "out", texts)).run()
    assert_equal_runs(tmp_path / "out", whole)
