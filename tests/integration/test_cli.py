"""Every command as a user runs it, in both formats: what it prints, what it leaves behind, how it fails."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apt_model import __version__
from apt_model.cli import main as cli
from apt_model.cli.diagnosis.finding import CODES
from apt_model.core import errors
from apt_model.modeling.apt_model import APTModel
from apt_model.modeling.tokenizer import Tokenizer
from apt_model.trainer.checkpoint import step_folder, steps_saved
from apt_model.trainer.data import CausalData
from apt_model.trainer.runs import saved_config
from apt_model.trainer.scoring import TWIN_FOLDER, training_figures
from apt_model.trainer.trainer import RunResult

ROOT = Path(__file__).parents[2]
MODEL = [
    "--model.vocab-size=300", "--model.d-model=32", "--model.num-encoder-layers=1", "--model.num-decoder-layers=1",
    "--model.num-heads=2", "--model.d-ff=64", "--model.max-seq-len=64",
]  # fmt: skip
RUN = [
    "--steps=4", "--batch-size=4", "--device=cpu", "--precision=fp32", "--tensorboard=off", "--plot=off",
    "--log-every=1", "--checkpoint-every=2", "--data.seq-len=16", "--data.target-len=12", "--optimizer.lr=0.01",
    "--optimizer.warmup-steps=2",
]  # fmt: skip
MICRO = [*MODEL, *RUN]
CAUSAL = [*MICRO, "--model.decoder-only"]
PAIRS = [*MICRO, "--data.task", "seq2seq"]


@dataclasses.dataclass
class Told:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def call(capfd):
    """Runs `apt-model` in this process; an error must come without a traceback."""

    def run(*args):
        capfd.readouterr()
        code = cli.main([str(arg) for arg in args])
        told = Told(code, *capfd.readouterr())
        assert "Traceback" not in told.out + told.err or "--debug" in args
        return told

    return run


def _train(out, source, options):
    assert cli.main(["train", "--quiet", "--out", str(out), "--data.source", str(source), *options]) == 0
    return out


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory, texts):
    """A finished run that no test changes."""
    return _train(tmp_path_factory.mktemp("runs") / "causal", texts, CAUSAL)


@pytest.fixture(scope="module")
def kept_pairs_run(tmp_path_factory, pairs):
    return _train(tmp_path_factory.mktemp("runs") / "pairs", pairs, PAIRS)


@pytest.fixture
def finished(kept_run, tmp_path):
    """A copy of the finished run, to change."""
    return Path(shutil.copytree(kept_run, tmp_path / "run"))


# apt-model itself


def test_help_ends_with_where_to_start(call):
    told = call("--help")
    assert told.code == 0
    assert told.out.isascii()
    assert told.out.splitlines()[-1] == "Start:  make demo  |  apt-model train --preset tiny --out runs/tiny"
    assert all(name in told.out for name in cli.COMMANDS)


def test_no_command_is_help_and_a_mistake(call):
    assert call() == Told(2, call("--help").out, "")
    assert call("--quiet").code == 2


def test_version(call):
    assert call("--version").out == f"apt-model {__version__}\n"
    assert call("--format", "json", "--version").json == {"version": __version__}


def _all_errors(kind=errors.AptError):
    return [kind, *(found for child in kind.__subclasses__() for found in _all_errors(child))]


@pytest.mark.parametrize("kind", _all_errors(), ids=lambda kind: kind.code)
def test_every_code_is_explained(call, kind):
    told = call("--explain", kind.code)
    assert told.code == 0
    assert f"{kind.code}  {kind.__name__}, exit code {kind.exit_code}" in told.out
    (row,) = call("--explain", kind.code.lower().removeprefix("apt-"), "--format", "json").json["codes"]
    assert row["code"] == kind.code
    assert row["meaning"]
    assert row["advice"]


def test_explain_without_a_code_explains_all(call):
    assert {row["code"] for row in call("--format=json", "--explain").json["codes"]} == {
        *(kind.code for kind in _all_errors()),
        *CODES,
    }


def test_an_unknown_code_lists_the_known_ones(call):
    told = call("--explain", "APT-E999")
    assert told.code == 2
    assert "APT-E001" in told.err
    assert "APT-E060" in told.err


# Errors


def _lines(told):
    """Label and text of each line of an error; what a command told of its progress stands before it."""
    error = told.err[told.err.index("APT-E") :]
    return {line[:10].strip(): line[10:] for line in error.splitlines()}


def test_an_error_says_what_the_state_the_remedy_and_where_to_read_on(call, finished):
    folder = step_folder(finished, 4)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    told = call("generate", finished, "--prompt", "x")
    assert told.code == 3
    assert told.out == ""
    lines = _lines(told)
    assert list(lines) == ["APT-E020", "now", "remedy", "more"]
    assert "model.safetensors" in lines["APT-E020"]
    assert lines["now"] == "the checkpoint of step 2 is untouched"
    assert str(folder) in lines["remedy"]
    assert lines["more"] == "apt-model --explain APT-E020"


def test_an_error_in_json_is_an_object_on_the_standard_output(call):
    told = call("generate", "/nowhere", "--prompt", "x", "--format", "json")
    assert told.code == 3
    assert told.err == ""
    error = told.json["error"]
    assert list(error) == ["code", "message", "state", "remedy", "exit_code"]
    assert (error["code"], error["exit_code"]) == ("APT-E020", 3)
    assert "/nowhere" in error["message"]


# arguments, exit code, what the message names, what the remedy names
REFUSED = [
    ("trian", 2, "'trian'", "'train'"),
    ("--verbos", 2, "'--verbos'", "'--version'"),
    ("--format human trian", 2, "'trian'", "'train'"),
    ("train --stepz 3", 2, "--stepz", "--steps"),
    ("train --lr 3", 2, "--lr", "--optimizer.lr"),
    ("train --model.d_modle 3", 2, "--model.d_modle", "--model.d-model"),
    ("train --data.task translate", 2, "'translate' for argument '--data.task'", "train --help"),
    ("train --model.d-model wide", 2, "--model.d-model: expected INT, got 'wide'", "train --help"),
    ("train --model.left-spin-tau=low", 2, "--model.left-spin-tau: expected {None}|FLOAT, got 'low'", ""),
    ("train --model.d-model 100", 2, "--model.d-model: expected a multiple of", ""),
    ("train --steps 0", 2, "--steps: expected at least 1, got 0", ""),
    ("train --data.seq-len 4096", 2, "--data.seq-len: expected at most", ""),
    ("train --model.decoder-only False", 2, "'False' after --model.decoder-only", "--model.no-decoder-only"),
    ("train --quiet yes", 2, "'yes' after --quiet", "leave it out"),
    ("train --preset", 2, "--preset", "train --help"),
    ("train --preset tinny", 2, "'tinny'", "'tiny'"),
    ("train --preset tiny --data.task seq2seq", 2, "--data.task", "--model.no-decoder-only"),
    ("train --model.pad-token-id 3", 2, "--model.pad-token-id", "--data.tokenizer"),
    ("train --out {tmp}/none --resume", 3, "train.json", "apt-model train --out"),
    ("train --out {tmp}/new --data.source {tmp}/absent", 2, "absent", "--data.source"),
    ("train --out {run}", 2, "already holds a run", "--resume"),
    ("train --out {run} --resume --steps 9", 2, "steps", "train.json"),
    ("train --device xpu", 5, "not built for Intel GPUs", "take 'cpu'"),
    ("generate", 2, "PATH, --prompt STR", "generate --help"),
    ("generate {run}", 2, "--prompt STR", "generate --help"),
    ("generate {run} --promt x", 2, "--promt", "--prompt"),
    ("generate {run} --prompt x y", 2, "'y'", "quotes"),
    ("generate {run} -q --prompt x", 2, "-q", "generate --help"),
    ("generate {run} --prompt x --temperature 2", 2, "--temperature", ""),
    ("generate {run} --prompt x --max-new-tokens 63", 2, "65 positions", "max_new_tokens=62"),
    ("generate {run} --prompt x --device xpu", 5, "xpu", ""),
    ("generate {tmp}/none --prompt x", 3, "no such folder", "apt-model train"),
    ("generate {tmp} --prompt x", 3, "no model", "save_pretrained"),
    ("generate {run}/train.json --prompt x", 3, "is a file", "save_pretrained"),
    ("eval {run} --batch-size 0", 2, "--batch-size", ""),
    ("eval {run} --max-tokens many", 2, "--max-tokens: expected {None}|INT, got 'many'", ""),
    ("eval {run}/checkpoints/step-00000002 --compare", 2, "step 2 of 4", "apt-model eval"),
    ("eval {run} --device xpu", 5, "xpu", ""),
    ("info {run} --preset tiny", 2, "got both", ""),
    ("info {tmp}", 3, "no model", ""),
    ("info one two", 2, "'two'", ""),
]


@pytest.mark.parametrize("refused", REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_be_done_is_refused_with_what_came_and_what_to_do(call, kept_run, tmp_path, refused):
    line, code, message, remedy = refused
    told = call(*(word.format(run=kept_run, tmp=tmp_path) for word in line.split()))
    assert told.code == code
    label, text = next(iter(_lines(told).items()))
    assert label.startswith("APT-E0")
    assert message in text
    assert remedy in _lines(told).get("remedy", "")


def test_the_traceback_comes_with_debug_only(call, monkeypatch):
    assert "Traceback" in call("info", "/nowhere", "--debug").err
    assert "Traceback" in call("--debug", "info", "/nowhere").err
    monkeypatch.setenv("APT_DEBUG", "1")
    cli.main(["info", "/nowhere"])
    monkeypatch.undo()
    call("info", "/nowhere")  # `call` looks for one


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (KeyError("gone"), 1, "our mistake, not yours: KeyError: 'gone'"),
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("tried to allocate"), 1, "out of memory: tried to allocate"),
        (OSError(28, "No space left on device", "runs"), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "stopped from the keyboard"),
        (errors.DivergenceError("uphill"), 4, "uphill"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_nobody_expected_ends_without_a_traceback(call, monkeypatch, raised, code, words):
    def fail(*args):
        raise raised

    monkeypatch.setattr("apt_model.cli.info.parse", fail)
    told = call("info")
    assert told.code == code
    assert words in told.err


def test_a_reader_that_leaves_is_no_error():
    line = f"set -o pipefail; {sys.executable} -m apt_model train --help | head -1"
    shell = subprocess.run(["/bin/bash", "-c", line], capture_output=True, text=True, cwd=ROOT, check=False)
    assert shell.stdout.startswith("usage: apt-model train")
    assert shell.stderr == ""
    assert shell.returncode in (0, 141)  # whether the reader leaves first is a matter of luck


def test_text_that_the_output_cannot_hold_is_escaped(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    assert cli.main(["info", "/n\u00f6where", "--format", "json"]) == 3
    assert rb"/n\xf6where" in narrow.buffer.getvalue()


# train


def test_train_tells_what_the_run_came_to(call, texts, tmp_path):
    told = call("train", "--out", tmp_path / "run", "--data.source", texts, *CAUSAL)
    assert told.code == 0
    assert told.out.isascii()
    told_of = {line[2:17].strip(): line[17:] for line in told.out.splitlines() if line.startswith("  ")}
    assert {"parameters", "loss", "held-out text", "speed", "peak memory", "time", "checkpoint"} <= told_of.keys()
    assert told_of["checkpoint"] == str(step_folder(tmp_path / "run", 4))
    assert f"next      apt-model eval {tmp_path / 'run'}" in told.out
    assert f"apt-model generate {tmp_path / 'run'} --prompt" in told.out
    assert "step 4/4" in told.err
    assert saved_config(tmp_path / "run").optimizer.lr == 0.01


def test_train_in_json_is_the_result(call, texts, tmp_path):
    told = call("train", "--format", "json", "--quiet", "--out", tmp_path / "run", "--data.source", texts, *CAUSAL)
    assert set(told.json) == {field.name for field in dataclasses.fields(RunResult)}
    assert told.json["steps"] == 4
    assert told.json["bits_per_byte"] > 0
    assert told.err == ""


def test_quiet_leaves_out_progress_and_hints(call, texts, tmp_path):
    told = call("train", "--quiet", "--out", tmp_path / "run", "--data.source", texts, *CAUSAL)
    assert told.err == ""
    assert "next" not in told.out
    assert "held-out text" in told.out


def test_a_preset_gives_the_defaults(call, texts, tmp_path):
    assert "(default: 800)" in call("train", "--preset", "tiny", "--help").out
    assert "(default: 1000)" in call("train", "--help").out
    options = [*MODEL, "--steps", "2", "--tensorboard", "off", "--plot", "off", "--data.seq-len", "16"]
    given = ["train", "--preset", "tiny", "--out", tmp_path / "run", "--data.source", texts, *options]
    assert call(*given).code == 0
    config = saved_config(tmp_path / "run")
    assert (config.steps, config.optimizer.warmup_steps, config.model.decoder_only) == (2, 40, True)
    assert call(*given, "--resume").code == 0  # the same line again, with --resume


def test_resume_goes_on_with_the_options_of_the_run(call, finished):
    whole = (step_folder(finished, 4) / "model.safetensors").read_bytes()
    shutil.rmtree(step_folder(finished, 4))
    told = call("train", "--out", finished, "--resume", "--format", "json")
    assert told.code == 0
    assert told.json["steps"] == 4
    assert (step_folder(finished, 4) / "model.safetensors").read_bytes() == whole


def test_resuming_a_finished_run_says_that_nothing_was_left(call, finished):
    assert "no step was left to train" in call("train", "--out", finished, "--resume").out
    assert call("train", "--out", finished, "--resume", "--format", "json").json["loss"] is None


def test_help_of_a_resumed_run_shows_its_options(call, finished):
    assert "(default: 0.01)" in call("train", "--out", finished, "--resume", "--help").out


# generate


def _generated(call, *args):
    told = call("generate", *args, "--format", "json", "--max-new-tokens", 8)
    assert told.code == 0
    assert list(told.json) == ["prompt", "text", "tokens", "seconds", "tokens_per_s"]
    return told.json


def test_generate_prints_the_text_alone(call, kept_run):
    told = call("generate", kept_run, "--prompt", "value_1 = ", "--max-new-tokens", 8)
    assert told.code == 0
    made = _generated(call, kept_run, "--prompt", "value_1 = ")
    assert told.out == made["text"] + "\n"
    assert made["text"].startswith("value_1 = ")
    assert f"{made['tokens']} tokens in" in told.err
    assert call("generate", kept_run, "--prompt", "value_1 = ", "--max-new-tokens", 8, "--quiet").err == ""


def test_a_prompt_begins_a_document(call, kept_run):
    model = APTModel.from_pretrained(step_folder(kept_run, 4))
    tokenizer = Tokenizer.load(kept_run / "tokenizer.json")
    ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode("value")]])
    made = model.generate(ids, max_new_tokens=8)[0].tolist()
    assert _generated(call, kept_run, "--prompt", "value")["text"] == tokenizer.decode(made[1:])
    assert _generated(call, kept_run, "--prompt", "")["tokens"] > 0


def test_a_prompt_comes_from_the_standard_input(call, kept_run, monkeypatch):
    given = _generated(call, kept_run, "--prompt", "value_1")
    for typed in ("value_1", "value_1\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        read = _generated(call, kept_run, "--prompt", "-")
        assert (read["prompt"], read["text"]) == (given["prompt"], given["text"])


def test_a_standard_input_that_is_no_text_is_refused(call, kept_run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert call("generate", kept_run, "--prompt", "-").code == 2


def test_the_options_of_generation_take_effect(call, kept_run):
    def text(*options):
        return _generated(call, kept_run, "--prompt", "v", *options)["text"]

    sampled = text("--do-sample", "--seed", 1, "--temperature", 2)
    assert sampled == text("--do-sample", "--seed", 1, "--temperature", 2)
    assert sampled != text("--do-sample", "--seed", 2, "--temperature", 2)
    assert text("--do-sample", "--seed", 1, "--top-k", 1) == text() == text("--no-use-cache")
    assert text("--num-beams", 2)


def test_a_path_is_a_run_a_step_or_a_saved_model(call, kept_run, tmp_path, monkeypatch):
    newest = _generated(call, kept_run, "--prompt", "v")["text"]
    assert _generated(call, step_folder(kept_run, 4), "--prompt", "v")["text"] == newest
    monkeypatch.chdir(step_folder(kept_run, 4))
    assert _generated(call, ".", "--prompt", "v")["text"] == newest
    APTModel.from_pretrained(step_folder(kept_run, 4)).save_pretrained(tmp_path / "saved")
    alone = call("generate", tmp_path / "saved", "--prompt", "v")
    assert alone.code == 3
    assert "tokenizer.json" in alone.err
    shutil.copy(kept_run / "tokenizer.json", tmp_path / "saved")
    assert _generated(call, tmp_path / "saved", "--prompt", "v")["text"] == newest


def test_an_altered_checkpoint_is_refused(call, finished):
    weights = step_folder(finished, 4) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for command in (["generate", finished, "--prompt", "x"], ["eval", finished]):
        told = call(*command)
        assert told.code == 3
        assert "altered" in told.err


def test_a_tokenizer_of_another_model_is_refused(call, finished):
    Tokenizer.train(["abc " * 500 + chr(n) * 9 for n in range(200, 900)], 400).save(finished / "tokenizer.json")
    told = call("generate", finished, "--prompt", "x")
    assert told.code == 3
    assert "do not belong together" in told.err


def test_a_run_without_a_checkpoint_is_told_how_to_go_on(call, finished):
    shutil.rmtree(finished / "checkpoints")
    told = call("generate", finished, "--prompt", "x")
    assert told.code == 3
    assert _lines(told)["remedy"] == f"apt-model train --out {finished} --resume"


def test_a_model_of_pairs_writes_the_target(call, kept_pairs_run):
    model = APTModel.from_pretrained(step_folder(kept_pairs_run, 4))
    tokenizer = Tokenizer.load(kept_pairs_run / "tokenizer.json")
    made = model.generate(torch.tensor([tokenizer.encode("7: say abba")]), max_new_tokens=8)[0].tolist()
    found = _generated(call, kept_pairs_run, "--prompt", "7: say abba")
    assert found["text"] == tokenizer.decode(made)
    assert found["tokens"] == len(made) - 1
    assert call("generate", kept_pairs_run, "--prompt", "").code == 2


def test_an_encoder_decoder_trained_to_continue_continues(call, texts, tmp_path):
    run = _train(tmp_path / "run", texts, MICRO)
    assert _generated(call, run, "--prompt", "value_1 = ")["text"].startswith("value_1 = ")


# eval


def test_eval_scores_all_held_out_text_beside_compressors(call, kept_run):
    told = call("eval", kept_run)
    assert told.code == 0
    assert told.out.isascii()
    found = json.loads((kept_run / "eval.json").read_text())
    assert f"{found['tokens']:,} held-out tokens" in told.out
    for row, figure in (("this model", found["bits_per_byte"]), ("gzip -9", found["compressors"]["gzip"])):
        assert any(line.split()[:3] == [*row.split(), f"{figure:.4f}"] for line in told.out.splitlines())
    assert "xz -9e" in told.out
    assert f"apt-model eval {kept_run} --compare" in told.out
    assert found["bytes"] == found["compressors"]["bytes"]
    assert (found["step"], found["steps"], found["plain"], found["mechanisms_off"]) == (4, 4, None, [])


def test_eval_in_json_is_what_it_writes(call, kept_run):
    told = call("eval", kept_run, "--format", "json", "--quiet")
    assert told.json == json.loads((kept_run / "eval.json").read_text())
    assert told.err == ""


def test_eval_takes_fewer_tokens_and_other_batches(call, kept_run, monkeypatch):
    whole = call("eval", kept_run, "--format", "json").json
    part = call("eval", kept_run, "--format", "json", "--max-tokens", 40).json
    assert part["tokens"] == 40 < whole["tokens"]
    assert part["partial"]
    assert "a part of the text" in call("eval", kept_run, "--max-tokens", 40).out
    sizes = []
    batches = CausalData.heldout_batches
    monkeypatch.setattr(
        CausalData, "heldout_batches", lambda self, size, most: (sizes.append(size), batches(self, size, most))[1]
    )
    other = call("eval", kept_run, "--format", "json", "--batch-size", 2, "--device", "cpu").json
    assert sizes == [2]
    assert other["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], abs=1e-5)


def test_eval_of_pairs_scores_targets(call, kept_pairs_run, pairs):
    found = call("eval", kept_pairs_run, "--format", "json").json
    targets = [json.loads(line)["target"] for line in pairs.read_text().splitlines()]
    assert 0 < found["compressors"]["bytes"] < sum(map(len, targets))
    assert found["tokens"] > 0


def test_compare_trains_the_twin_once(call, finished):
    told = call("eval", finished, "--compare")
    assert told.code == 0
    assert "plain twin" in told.out
    found = call("eval", finished, "--compare", "--format", "json")
    assert "training the plain twin" not in found.err
    twin = saved_config(finished / TWIN_FOLDER)
    assert twin.model == saved_config(finished).model.plain()
    assert twin.steps == 4
    plain = found.json["plain"]
    assert plain["bits_per_byte"] != found.json["bits_per_byte"]
    assert plain["bytes"] == found.json["bytes"]
    assert plain["training_seconds"] > 0
    assert plain["training_tokens_per_s"] > 0


def test_compare_goes_on_with_an_unfinished_twin(call, finished):
    whole = call("eval", finished, "--compare", "--format", "json").json["plain"]["bits_per_byte"]
    shutil.rmtree(step_folder(finished / TWIN_FOLDER, 4))
    again = call("eval", finished, "--compare", "--format", "json")
    assert again.json["plain"]["bits_per_byte"] == whole
    assert steps_saved(finished / TWIN_FOLDER) == [2, 4]


def test_compare_refuses_the_twin_of_another_run(call, finished):
    call("eval", finished, "--compare")
    path = finished / TWIN_FOLDER / "train.json"
    path.write_text(path.read_text().replace('"lr": 0.01', '"lr": 0.02'))
    told = call("eval", finished, "--compare")
    assert told.code == 2
    assert "optimizer.lr" in told.err
    assert f"rm -r {finished / TWIN_FOLDER}" in told.err


def test_a_mechanism_that_the_run_had_off_is_named(call, texts, tmp_path):
    run = _train(tmp_path / "run", texts, [*CAUSAL, "--model.no-use-left-spin"])
    assert "this model (left spin off)" in call("eval", run).out
    assert call("eval", run, "--compare", "--format", "json").json["mechanisms_off"] == ["left spin"]


def test_a_plain_run_has_no_twin(call, texts, tmp_path):
    off = ["--model.no-use-left-spin", "--model.no-use-autopoietic", "--model.no-use-dbc-dac"]
    run = _train(tmp_path / "run", texts, [*CAUSAL, *off])
    told = call("eval", run, "--compare")
    assert told.code == 2
    assert "plain itself" in told.err


def test_eval_refuses_a_text_that_has_changed(call, texts, tmp_path):
    source = Path(shutil.copytree(texts, tmp_path / "texts"))
    run = _train(tmp_path / "run", source, CAUSAL)
    next(source.iterdir()).write_text("something else\n" * 50)
    told = call("eval", run)
    assert told.code == 3
    assert "is not what the run" in told.err


def test_eval_of_a_model_without_a_run_is_refused(call, kept_run, tmp_path):
    shutil.copytree(step_folder(kept_run, 4), tmp_path / "saved")
    shutil.copy(kept_run / "tokenizer.json", tmp_path / "saved")
    told = call("eval", tmp_path / "saved")
    assert told.code == 3
    assert "belongs to no run" in told.err


def test_training_figures_come_from_the_runs_own_rows(tmp_path):
    rows = [
        {"step": 2, "loss": 1.0, "tokens": 100, "seconds": 2.0},
        {"step": 2, "bits_per_byte": 3.0},
        {"step": 4, "loss": 1.0, "tokens": 200, "seconds": 1.0},
        {"step": 6, "loss": 1.0, "tokens": 1, "seconds": 9.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training_figures(tmp_path, 4) == (pytest.approx(3), pytest.approx(100))
    assert training_figures(tmp_path / "none", 4) == (None, None)


# info


def test_info_tells_of_version_and_machine(call):
    told = call("info")
    assert told.code == 0
    assert told.out.isascii()
    assert __version__ in told.out
    assert str(torch.__version__) in told.out
    found = call("info", "--format", "json").json
    assert found["model"] is None
    assert found["device"]["memory_bytes"] > 2**20
    assert isinstance(found["device"]["bf16"], bool)


def test_info_counts_what_the_model_holds(call, kept_run, kept_pairs_run):
    for run, layers in ((kept_run, 0), (kept_pairs_run, 1)):
        model = APTModel.from_pretrained(step_folder(run, 4))
        for path in (run, step_folder(run, 4)):
            found = call("info", path, "--format", "json").json["model"]
            assert found["parameters"] == model.num_parameters() == sum(found["parts"].values())
            assert found["encoder_layers"] == layers
            assert found["bytes_fp32"] == 2 * found["bytes_bf16"] == 4 * model.num_parameters()
    assert f"{model.num_parameters():,}" in call("info", kept_pairs_run).out


def test_info_of_a_preset_allocates_nothing(call):
    found = call("info", "--preset", "mission", "--format", "json").json["model"]
    assert found["parameters"] > 200_000_000
    assert "12 encoder + 12 decoder" in call("info", "--preset", "mission").out


# Other ways in


def _start(*command, cwd):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=cwd, check=False)


def test_the_script_trains_from_anywhere(texts, tmp_path):
    script = ROOT / "training" / "start_training.py"
    done = _start(script, "--out", "run", "--data.source", texts, *CAUSAL, "--steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert steps_saved(tmp_path / "run") == [2]
    again = _start(script, "--out", "run", "--data.source", texts, *CAUSAL, cwd=tmp_path)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
    assert "Traceback" not in again.stderr


def test_the_package_runs_as_a_module(tmp_path):
    done = _start("-m", "apt_model", "--version", cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"apt-model {__version__}\n")
