"""Training that goes wrong stops, says so, and leaves a checkpoint from before."""

import dataclasses
import itertools
import shutil

import pytest
import torch
from micro import tensors_of, train_config

from apt_model.core.errors import DivergenceError
from apt_model.modeling.apt_model import APTModel
from apt_model.trainer.metrics import read_metrics
from apt_model.trainer.runs import step_folder, steps_saved
from apt_model.trainer.trainer import Trainer


def poison(trainer, steps):
    """Make the gradients of the given steps (from 0) NaN."""
    step, train_step = None, trainer.train_step

    def counted(number):
        nonlocal step
        step = number
        return train_step(number)

    trainer.train_step = counted
    trainer.model.decoder_norm.weight.register_hook(lambda grad: grad * torch.nan if step in steps else None)
    return trainer


def weights(folder):
    model = APTModel.from_pretrained(folder)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_loss_that_stays_up_stops_the_run(tmp_path, texts):
    config = train_config(
        tmp_path / "out", texts, steps=400, checkpoint_every=20, keep_checkpoints=50, optimizer={"lr": 3.0}
    )
    with pytest.raises(DivergenceError, match=r"the smoothed loss has been \d+\.\d\d nats above its best") as error:
        Trainer(config).run()
    assert "--optimizer.lr (it was 3)" in error.value.remedy
    assert error.value.exit_code == 4
    rows = read_metrics(tmp_path / "out")
    assert rows[-1]["step"] < 400
    assert max(row["loss"] for row in rows) > min(row["loss"] for row in rows) + 1.5
    saved = steps_saved(tmp_path / "out")
    assert saved == list(range(20, rows[-1]["step"], 20))
    assert all(weights(step_folder(tmp_path / "out", step)).isfinite().all() for step in saved)


def test_a_few_steps_without_finite_gradients_are_skipped(tmp_path, texts):
    config = train_config(tmp_path / "out", texts, steps=6, checkpoint_every=1, keep_checkpoints=9, max_skipped=3)
    result = poison(Trainer(config), {2, 3}).run()
    assert result.skipped_steps == 2
    assert [row["skipped"] for row in read_metrics(tmp_path / "out") if "loss" in row] == [0, 0, 1, 2, 2, 2]
    after = [weights(step_folder(tmp_path / "out", step)) for step in range(1, 7)]
    moved = [not torch.equal(one, two) for one, two in itertools.pairwise(after)]
    assert moved == [True, False, False, True, True]
    assert after[-1].isfinite().all()


def test_skipped_steps_are_counted_in_a_row(tmp_path, texts):
    config = train_config(tmp_path / "out", texts, steps=8, max_skipped=2)
    assert poison(Trainer(config), {1, 3, 5}).run().skipped_steps == 3
    config = dataclasses.replace(config, out=str(tmp_path / "again"))
    with pytest.raises(DivergenceError, match="2 steps in a row had gradients that were not finite"):
        poison(Trainer(config), {1, 3, 4}).run()


def test_the_count_of_skipped_steps_goes_on_after_a_resume(tmp_path, texts):
    config = train_config(tmp_path / "out", texts, steps=8, max_skipped=2, checkpoint_every=3, keep_checkpoints=9)
    poison(Trainer(config), {2}).run()
    for step in (6, 8):
        shutil.rmtree(step_folder(tmp_path / "out", step))
    with pytest.raises(DivergenceError, match="2 steps in a row"):
        poison(Trainer(dataclasses.replace(config, resume=True)), {3}).run()


def test_a_run_that_stopped_goes_on_from_before_it_went_wrong(tmp_path, texts):
    config = train_config(tmp_path / "whole", texts, steps=8, checkpoint_every=2, max_skipped=2)
    Trainer(config).run()
    config = dataclasses.replace(config, out=str(tmp_path / "out"))
    with pytest.raises(DivergenceError):
        poison(Trainer(config), {4, 5, 6, 7}).run()
    assert steps_saved(tmp_path / "out") == [2, 4]
    Trainer(dataclasses.replace(config, resume=True)).run()
    assert tensors_of(step_folder(tmp_path / "out", 8)) == tensors_of(step_folder(tmp_path / "whole", 8))


@pytest.mark.parametrize(("log_every", "noticed"), [(1, 4), (5, 5)])
def test_without_treatment_nothing_guards_the_weights_and_the_run_stops_at_once(tmp_path, texts, log_every, noticed):
    config = train_config(
        tmp_path / "out",
        texts,
        steps=9,
        log_every=log_every,
        checkpoint_every=3,
        max_skipped=5,
        model={"use_dbc_dac": False},
    )
    with pytest.raises(DivergenceError, match="nothing guarded the weights") as error:
        poison(Trainer(config), {3}).run()
    assert read_metrics(tmp_path / "out")[-1]["step"] == noticed
    assert steps_saved(tmp_path / "out") == [3]
    assert weights(step_folder(tmp_path / "out", 3)).isfinite().all()
    assert "no checkpoint of it was saved" in error.value.state


def test_a_checkpoint_is_never_written_of_a_run_that_went_wrong(tmp_path, texts):
    """The step before a checkpoint is looked at even where no row is logged."""
    config = train_config(
        tmp_path / "out", texts, steps=9, log_every=9, checkpoint_every=4, model={"use_dbc_dac": False}
    )
    with pytest.raises(DivergenceError):
        poison(Trainer(config), {3}).run()
    assert steps_saved(tmp_path / "out") == []
