"""Going on with a run: what may change, what may not, and that it is the same run."""

import dataclasses
import json
import shutil

import pytest
from micro import figures, tensors_of, train_config, write_pairs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from apt_model.core.errors import CheckpointError, ConfigError
from apt_model.modeling.tokenizer import Tokenizer
from apt_model.trainer.config import TrainConfig
from apt_model.trainer.corpus import read_corpus
from apt_model.trainer.metrics import TensorBoardSink, read_metrics
from apt_model.trainer.runs import step_folder, steps_saved
from apt_model.trainer.trainer import Trainer

# Every top-level option of a run, changed from what `train_config` gives; and some of each nested group.
REFUSED = {
    "steps": {"steps": 9},
    "batch_size": {"batch_size": 5},
    "grad_accumulation": {"grad_accumulation": 2},
    "seed": {"seed": 1},
    "precision": {"precision": "bf16"},
    "compile": {"compile": True},
    "model.dropout": {"model": {"dropout": 0.1}},
    "model.use_left_spin": {"model": {"use_left_spin": False}},
    "model.d_model": {"model": {"d_model": 64}},
    "data.holdout": {"data": {"holdout": 0.2}},
    "data.seq_len": {"data": {"seq_len": 15}},
    "optimizer.lr": {"optimizer": {"lr": 0.5}},
    "optimizer.beta2": {"optimizer": {"beta2": 0.9}},
    "gradient.clipping": {"gradient": {"clipping": "adagc"}},
    "gradient.rank_ratio": {"gradient": {"rank_ratio": 0.5}},
}
ALLOWED = {
    "activation_checkpointing": {"activation_checkpointing": True},
    "max_skipped": {"max_skipped": 11},
    "divergence_margin": {"divergence_margin": 1.25},
    "device": {"device": "auto"},
    "log_every": {"log_every": 3},
    "eval_every": {"eval_every": 1},
    "eval_tokens": {"eval_tokens": 10},
    "checkpoint_every": {"checkpoint_every": 1},
    "keep_checkpoints": {"keep_checkpoints": 1},
    "tensorboard": {"tensorboard": "on"},
    "plot": {"plot": "on"},
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, texts):
    """A run of eight steps that came to step 5, and its whole sister."""
    whole, part = (tmp_path_factory.mktemp(name) / "out" for name in ("whole", "part"))
    Trainer(settings(whole, texts)).run()
    shutil.copytree(whole, part)
    shutil.rmtree(step_folder(part, 8))
    assert steps_saved(part) == [5]
    return part, whole


@pytest.fixture
def part(stopped, tmp_path):
    return shutil.copytree(stopped[0], tmp_path / "out")


def settings(out, source, **changes):
    return train_config(out, source, **{"steps": 8, "checkpoint_every": 5, **changes})


def final_files(out):
    return tensors_of(step_folder(out, 8))


def test_the_two_tables_name_every_option_of_a_run():
    groups = {"model", "data", "optimizer", "gradient", "out", "resume"}
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names - groups == {name for name in {**REFUSED, **ALLOWED} if "." not in name}
    assert {name.partition(".")[0] for name in REFUSED if "." in name} == groups - {"out", "resume"}


def test_it_is_the_same_run_in_weights_moments_counters_and_figures(part, stopped, texts):
    Trainer(settings(part, texts, resume=True)).run()
    assert final_files(part) == final_files(stopped[1])
    assert figures(part) == figures(stopped[1])


@pytest.mark.parametrize("name", REFUSED)
def test_what_enters_the_arithmetic_cannot_change(part, texts, name):
    with pytest.raises(ConfigError, match="these options differ") as error:
        Trainer(settings(part, texts, resume=True, **REFUSED[name]))
    assert error.value.message.endswith(f": {name}")
    assert str(part / "train.json") in error.value.remedy


def test_all_changes_are_named_at_once(part, texts):
    changes = {"seed": 1, "optimizer": {"lr": 0.5}, "model": {"d_ff": 32}, "log_every": 2}
    with pytest.raises(ConfigError, match="these options differ") as error:
        Trainer(settings(part, texts, resume=True, **changes))
    assert error.value.message.endswith(": seed, model.d_ff, optimizer.lr")


@pytest.mark.parametrize("name", ALLOWED)
def test_what_does_not_enter_it_can(part, stopped, texts, name, monkeypatch):
    monkeypatch.setenv("APT_DEVICE", "cpu")
    Trainer(settings(part, texts, resume=True, **ALLOWED[name])).run()
    assert final_files(part) == final_files(stopped[1])
    assert json.loads((part / "train.json").read_text())[name] == ALLOWED[name][name]


def test_a_run_can_be_moved(part, stopped, texts, tmp_path):
    part.rename(tmp_path / "elsewhere")
    Trainer(settings(tmp_path / "elsewhere", texts, resume=True)).run()
    assert final_files(tmp_path / "elsewhere") == final_files(stopped[1])


@pytest.mark.parametrize("change", ["a letter of the training text", "a held-out letter", "a new file"])
def test_other_text_is_refused(tmp_path, texts, change):
    source = shutil.copytree(texts, tmp_path / "texts")
    config = settings(tmp_path / "out", source)
    Trainer(config).run()
    corpus = read_corpus(config.data)
    document = (corpus.heldout if "held-out" in change else corpus.train)[-1]
    file = source / ("new.txt" if "new" in change else document.name)
    file.write_text(document.text[:-2] + "y\n")
    with pytest.raises(CheckpointError, match=r"the text under .* is not what the run in .* was trained on") as error:
        Trainer(settings(tmp_path / "out", source, resume=True))
    assert "restore the text" in error.value.remedy


def test_another_tokenizer_is_refused(part, texts):
    other = Tokenizer.train(["zzz yyy xxx " * 50], 300)
    other.save(part / "tokenizer.json")
    with pytest.raises(CheckpointError):
        Trainer(settings(part, texts, resume=True))


def test_pairs_whose_source_changed_are_refused(tmp_path):
    source = write_pairs(tmp_path / "pairs.jsonl")
    Trainer(settings(tmp_path / "out", source)).run()
    source.write_text(source.read_text().replace("7: say", "7: sat"))
    with pytest.raises(CheckpointError, match="is not what the run"):
        Trainer(settings(tmp_path / "out", source, resume=True))


def test_a_finished_run_is_evaluated_again_and_nothing_else(stopped, tmp_path, texts):
    out = shutil.copytree(stopped[1], tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*")}
    result = Trainer(settings(out, texts, resume=True)).run()
    assert result.bits_per_byte == read_metrics(out)[-1]["bits_per_byte"]
    assert figures(out) == figures(stopped[1])
    assert before == {path: path.stat().st_mtime_ns for path in (out / "checkpoints").rglob("*")}


def test_a_run_without_a_checkpoint_starts_over(part, stopped, texts):
    shutil.rmtree(part / "checkpoints")
    Trainer(settings(part, texts, resume=True)).run()
    assert final_files(part) == final_files(stopped[1])
    assert figures(part) == figures(stopped[1])


def test_what_never_had_a_gradient_has_no_state_and_needs_none(tmp_path, texts):
    """An encoder-decoder on plain text trains its decoder alone."""
    options = {"model": {"decoder_only": False}}
    Trainer(settings(tmp_path / "whole", texts, **options)).run()
    part = shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(step_folder(part, 8))
    Trainer(settings(part, texts, resume=True, **options)).run()
    assert final_files(part) == final_files(tmp_path / "whole")


@pytest.mark.parametrize("clipping", ["global", "adagc", "zclip"])
@pytest.mark.parametrize("error_feedback", [True, False])
def test_every_gradient_treatment_goes_on(tmp_path, texts, clipping, error_feedback):
    options = {
        "gradient": {
            "clipping": clipping, "rank_ratio": 0.25, "error_feedback": error_feedback, "refresh_steps": 3,
            "row_balance": True,
        },
    }  # fmt: skip
    Trainer(settings(tmp_path / "whole", texts, **options)).run()
    part = shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(step_folder(part, 8))
    Trainer(settings(part, texts, resume=True, **options)).run()
    assert final_files(part) == final_files(tmp_path / "whole")


def test_there_must_be_a_run(tmp_path, texts):
    with pytest.raises(CheckpointError, match=r"holds no run: there is no train\.json"):
        Trainer(settings(tmp_path / "out", texts, resume=True))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.json").write_text('{"stepz": 3}')
    with pytest.raises(CheckpointError, match=r"train\.json cannot be used: .*stepz"):
        Trainer(settings(tmp_path / "out", texts, resume=True))


def test_tensorboard_shows_each_step_once(part, texts):
    """Events that a killed run wrote beyond its checkpoint are superseded; those up to it stay."""
    sink = TensorBoardSink(part, from_step=0)
    for step in range(1, 8):
        sink.write({"step": step, "loss": 99.0})
    sink.close()
    Trainer(settings(part, texts, resume=True, tensorboard="on")).run()
    events = EventAccumulator(str(part / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [event.value == 99.0 for event in events] == [True] * 5 + [False] * 3


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(tmp_path, texts, keep):
    Trainer(settings(tmp_path / "out", texts, checkpoint_every=2, keep_checkpoints=keep)).run()
    assert steps_saved(tmp_path / "out") == [4, 6, 8][-keep:]
    assert len(list((tmp_path / "out" / "checkpoints").iterdir())) == keep
