"""A run from start to end: what it learns, what it leaves behind, and what its options mean."""

import importlib.util
import json
import math
import os
import random
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from micro import tensors_of, train_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tolerances import TOLERANCES

from apt_model.core.errors import ConfigError, DeviceError, MissingExtraError
from apt_model.modeling.apt_model import APTModel
from apt_model.modeling.tokenizer import Tokenizer
from apt_model.trainer.config import OptimizerConfig
from apt_model.trainer.data import IGNORED
from apt_model.trainer.evaluation import evaluate
from apt_model.trainer.metrics import JsonlSink, read_metrics
from apt_model.trainer.optimizer import learning_rate, make_optimizer
from apt_model.trainer.plot import draw_curve
from apt_model.trainer.progress import PlainLines
from apt_model.trainer.runs import saved_config, step_folder, steps_saved
from apt_model.trainer.trainer import Trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory, texts):
    """The folder, the configuration and the result of a run with everything on."""
    out = tmp_path_factory.mktemp("run") / "out"
    config = train_config(
        out,
        texts,
        steps=60,
        log_every=7,
        eval_every=20,
        checkpoint_every=25,
        tensorboard="auto",
        plot="auto",
        model={"dropout": 0.1},
    )
    return out, config, Trainer(config).run()


def losses(out):
    return [(row["step"], row["loss"]) for row in read_metrics(out) if "loss" in row]


def heldout(out):
    return [(row["step"], row["bits_per_byte"]) for row in read_metrics(out) if "bits_per_byte" in row]


def stepped(config):
    """A trainer that took all steps of `config` and wrote nothing, with each step's loss."""
    trainer = Trainer(config)
    return trainer, [float(trainer.train_step(step).loss) for step in range(config.steps)]


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def assert_close(got, expected, name):
    tolerance = TOLERANCES[name]
    torch.testing.assert_close(got, expected, rtol=tolerance.relative, atol=tolerance.absolute)


# --- a whole run


def test_it_learns(finished):
    out, _, result = finished
    assert losses(out)[0][1] > 4
    assert losses(out)[-1][1] < 1.5
    assert [bits for _, bits in heldout(out)] == sorted((bits for _, bits in heldout(out)), reverse=True)
    assert result.loss == losses(out)[-1][1]
    assert result.bits_per_byte == heldout(out)[-1][1]


def test_it_learns_pairs(tmp_path, pairs):
    config = train_config(tmp_path / "out", pairs, steps=60)
    result = Trainer(config).run()
    first, *_, last = losses(tmp_path / "out")
    assert first[1] > 4
    assert last[1] < 2
    assert result.bits_per_byte < 1.5


def test_what_it_leaves(finished):
    out, _, result = finished
    names = {path.name for path in out.iterdir()}
    assert names == {"train.json", "tokenizer.json", "metrics.jsonl", "checkpoints", "tensorboard", "curve.png"}
    assert steps_saved(out) == [50, 60]
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-00000050", "step-00000060"}
    files = {"config.json", "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert set(tensors_of(step_folder(out, 60))) == files
    assert result.checkpoint == str(step_folder(out, 60))
    assert result.curve == str(out / "curve.png")


def test_files_are_as_readable_as_the_umask_says(tmp_path, texts):
    before = os.umask(0o027)
    try:
        Trainer(train_config(tmp_path / "out", texts)).run()
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}, modes


def test_nothing_but_the_run_lands_in_the_working_directory(tmp_path, texts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Trainer(train_config(Path("runs/one"), texts, tensorboard="on", plot="on")).run()
    assert {path.as_posix() for path in Path().iterdir()} == {"runs"}


def test_building_a_trainer_writes_nothing(tmp_path, texts):
    Trainer(train_config(tmp_path / "out", texts))
    assert not list(tmp_path.iterdir())


def test_the_effective_configuration_can_be_read_again(finished):
    out, config, _ = finished
    saved = saved_config(out)
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    assert saved.model == config.model.replace(**ids)
    assert (saved.data, saved.optimizer, saved.gradient) == (config.data, config.optimizer, config.gradient)
    assert saved.steps == 60
    json.loads((out / "train.json").read_text(), parse_constant=pytest.fail)


def test_the_last_checkpoint_is_the_trained_model(finished):
    out, _, result = finished
    model = APTModel.from_pretrained(result.checkpoint)
    assert model.config == saved_config(out).model
    assert model.num_parameters() == result.parameters
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    ids = torch.tensor([tokenizer.encode("value_1 = ")])
    text = tokenizer.decode(model.generate(ids, max_new_tokens=12)[0].tolist())
    assert " + x\n" in text


def test_rows(finished):
    out, config, result = finished
    rows = read_metrics(out)
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert [step for step, _ in heldout(out)] == [20, 40, 60]
    assert rows == sorted(rows, key=lambda row: row["step"])
    for row in training:
        timed = {"tokens", "seconds", "tokens_per_s", "memory_bytes"}
        assert set(row) == {"step", "loss", "grad_norm", "skipped", "lr", *timed}
        assert row["lr"] == learning_rate(config.optimizer, row["step"] - 1, 60)
        assert row["skipped"] == 0
        assert min(row["grad_norm"], row["seconds"], row["memory_bytes"]) > 0
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
    assert [row["tokens"] for row in training] == [7 * 4 * 16] * 8 + [4 * 4 * 16]
    assert result.skipped_steps == 0
    assert result.tokens_per_s == pytest.approx(60 * 4 * 16 / result.seconds)
    assert result.peak_memory_bytes > 0


def test_a_rows_loss_is_the_mean_since_the_last_row_whenever_checkpoints_are_written(tmp_path, texts):
    for name, options in {"each": {"log_every": 1}, "five": {"log_every": 5, "checkpoint_every": 4}}.items():
        Trainer(train_config(tmp_path / name, texts, steps=10, **options)).run()
    each = [loss for _, loss in losses(tmp_path / "each")]
    expected = [(5, sum(each[:5]) / 5), (10, sum(each[5:]) / 5)]
    assert losses(tmp_path / "five") == expected


def test_the_curve_is_a_picture(finished):
    data = (finished[0] / "curve.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (960, 540)
    assert data[-12:] == b"\x00\x00\x00\x00IEND\xaeB`\x82"


def test_figures_that_are_not_finite_are_null_and_leave_a_gap_in_the_curve(tmp_path):
    sink = JsonlSink(tmp_path, from_step=0)
    sink.write({"step": 1, "loss": math.nan})
    sink.write({"step": 1, "bits_per_byte": math.inf})
    sink.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 1, "loss": None},
        {"step": 1, "bits_per_byte": None},
    ]
    assert draw_curve(tmp_path).stat().st_size > 1000


def test_tensorboard_holds_the_same_figures(finished):
    out, _, _ = finished
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    names = {name for row in read_metrics(out) for name in row} - {"step"}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        expected = [(row["step"], row[name]) for row in read_metrics(out) if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in expected
        ]


def test_plain_lines_say_what_happens(tmp_path, texts, capfd):
    Trainer(train_config(tmp_path / "out", texts), progress=PlainLines(interval=0.0)).run()
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[:3] == ["reading text ...", "training the tokenizer ...", "encoding ..."]
    assert sum(line.startswith("step ") and " s left" in line for line in lines) == 4
    assert lines[-1].startswith("step 4  held-out ")


# --- what is refused before anything is written


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_is(finished):
    out, config, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="already holds a run") as error:
        Trainer(config)
    assert f"apt-model train --out {out} --resume" in error.value.remedy
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_folder_with_another_runs_checkpoints_is_refused(tmp_path, texts):
    Trainer(train_config(tmp_path / "out", texts)).run()
    (tmp_path / "out" / "train.json").unlink()
    with pytest.raises(ConfigError, match="already holds a run"):
        Trainer(train_config(tmp_path / "out", texts))


def test_a_device_that_is_not_there(tmp_path, texts):
    with pytest.raises(DeviceError, match="cuda:63"):
        Trainer(train_config(tmp_path / "out", texts, device="cuda:63"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "package"), [("tensorboard", "tensorboard"), ("plot", "matplotlib")])
def test_what_is_asked_for_and_not_installed_is_refused_before_training(tmp_path, texts, monkeypatch, option, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(MissingExtraError, match=package) as error:
        Trainer(train_config(tmp_path / "out", texts, **{option: "on"}))
    assert error.value.remedy == f"pip install 'apt-transformer[{option}]'"
    assert not (tmp_path / "out").exists()
    result = Trainer(train_config(tmp_path / "out", texts, **{option: "auto"})).run()
    assert result.curve is None
    assert not (tmp_path / "out" / "tensorboard").exists()


# --- what a step computes


def test_two_runs_are_equal_bit_for_bit_whatever_was_drawn_before(tmp_path, texts):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        torch.manual_seed(ord(name[0]))
        random.seed(name)
        np.random.seed(ord(name[0]))  # noqa: NPY002 - the global generator is the one to disturb
        Trainer(train_config(tmp_path / name, texts, seed=seed, model={"dropout": 0.1})).run()
    one, two, other = (tensors_of(step_folder(tmp_path / name, 4)) for name in ("one", "two", "other"))
    assert one == two
    assert one["model.safetensors"] != other["model.safetensors"]


@pytest.mark.parametrize("source", ["texts", "pairs"])
def test_accumulation_equals_the_large_batch(tmp_path, request, source):
    # A large eps keeps Adam's division from turning the rounding of tiny gradients into steps of full size.
    options = {"optimizer": {"eps": 1.0, "lr": 1.0}, "steps": 3}
    source = request.getfixturevalue(source)
    large, large_losses = stepped(train_config(tmp_path / "large", source, batch_size=8, **options))
    parts, parts_losses = stepped(
        train_config(tmp_path / "parts", source, batch_size=2, grad_accumulation=4, **options)
    )
    assert_close(weights(parts), weights(large), "accumulation")
    assert_close(torch.tensor(parts_losses), torch.tensor(large_losses), "accumulation")
    assert (weights(large) - weights(Trainer(train_config(tmp_path / "new", source)))).abs().max() > 0.01


@pytest.mark.parametrize("source", ["texts", "pairs"])
def test_activation_checkpointing_gives_the_same_weights(tmp_path, request, source):
    source = request.getfixturevalue(source)
    kept, again = (
        stepped(train_config(tmp_path / "out", source, activation_checkpointing=on, model={"dropout": 0.1}))
        for on in (False, True)
    )
    assert torch.equal(weights(kept[0]), weights(again[0]))
    assert kept[1] == again[1]


def test_bf16_computes_in_bf16_and_keeps_fp32_weights(tmp_path, texts):
    full, full_losses = stepped(train_config(tmp_path / "out", texts))
    trainer = Trainer(train_config(tmp_path / "out", texts, precision="bf16"))
    seen = []
    trainer.model.decoder_layers[0].register_forward_hook(lambda _, __, output: seen.append(output[0].dtype))
    half_losses = [float(trainer.train_step(step).loss) for step in range(4)]
    assert set(seen) == {torch.bfloat16}
    assert weights(trainer).dtype == weights(full).dtype == torch.float32
    assert half_losses != full_losses
    assert half_losses == pytest.approx(full_losses, rel=0.02)


def test_auto_precision_is_what_the_device_multiplies_natively(tmp_path, texts, monkeypatch):
    from apt_model.core.system.cpu import CpuDevice

    for native in (False, True):
        monkeypatch.setattr(CpuDevice, "supports_bf16", lambda _, native=native: native)
        assert Trainer(train_config(tmp_path / "out", texts, precision="auto")).bf16 is native
        assert Trainer(train_config(tmp_path / "out", texts, precision="fp32")).bf16 is False


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # torch's own, on loading inductor
def test_compiled_steps_are_the_same_to_rounding(tmp_path, texts):
    options = {"steps": 2, "model": {"num_decoder_layers": 1}, "optimizer": {"eps": 1.0, "lr": 1.0}}
    plain, plain_losses = stepped(train_config(tmp_path / "out", texts, **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, compiled_losses = stepped(train_config(tmp_path / "out", texts, compile=True, **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_close(weights(compiled), weights(plain), "compiled")
    assert_close(torch.tensor(compiled_losses), torch.tensor(plain_losses), "compiled")


def test_the_learning_rate_by_hand():
    config = OptimizerConfig(lr=2.0, warmup_steps=4, min_lr_ratio=0.25)
    assert [learning_rate(config, step, 9) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    # Five steps of cosine from the peak to a quarter of it: 2 * (1/4 + 3/4 * (1 + cos(pi k / 4)) / 2).
    after = [2.0, 1.7803300858899107, 1.25, 0.7196699141100893, 0.5]
    assert [learning_rate(config, step, 9) for step in range(4, 9)] == pytest.approx(after, abs=1e-15)
    assert learning_rate(OptimizerConfig(lr=2.0, warmup_steps=0, min_lr_ratio=1.0), 0, 1) == 2.0


def test_the_schedule_is_what_the_optimizer_uses(tmp_path, texts):
    config = train_config(tmp_path / "out", texts, steps=6)
    trainer = Trainer(config)
    for step in range(6):
        trainer.train_step(step)
        assert {group["lr"] for group in trainer.optimizer.param_groups} == {learning_rate(config.optimizer, step, 6)}


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_decay_and_nothing_else(tmp_path, pairs, tied):
    trainer = Trainer(train_config(tmp_path / "out", pairs, model={"tie_word_embeddings": tied}))
    decayed, kept = ({id(parameter) for parameter in group["params"]} for group in trainer.optimizer.param_groups)
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    for name, parameter in trainer.model.named_parameters():
        is_matrix = name.endswith(("_proj.weight", "self_value.weight", "lm_head.weight"))
        assert (id(parameter) in decayed, id(parameter) in kept) == (is_matrix, not is_matrix), name
    assert any("gate_bias" in name for name, _ in trainer.model.named_parameters())


def test_decay_alone_shrinks_matrices_by_lr_times_weight_decay(tmp_path, texts):
    model = Trainer(train_config(tmp_path / "out", texts)).model
    optimizer = make_optimizer(model, OptimizerConfig(lr=0.5, weight_decay=0.1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim == 2 and name != "embedding.weight" else 1.0
        assert_close(parameter.detach(), before[name] * factor, "definition_fp32")


# --- evaluation


def test_bits_per_byte_by_hand(tmp_path):
    """One held-out text that fits one window: what the model says of each token given all before it."""
    (tmp_path / "text.txt").write_text("abc = 1 + 2\n" * 300 + "xyz = 7\n" * 3, encoding="utf-8")
    config = train_config(tmp_path / "out", tmp_path / "text.txt", data={"holdout": 0.0066, "seq_len": 64})
    trainer, _ = stepped(config)
    tokenizer = trainer.data.tokenizer
    text = "xyz = 7\n" * 3
    ids = [tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert len(ids) - 1 == trainer.data.heldout_tokens
    with torch.no_grad():
        logits = trainer.model.eval()(torch.tensor([ids[:-1]]))[0].double()
    surprise = [-float(row.log_softmax(-1)[token]) / math.log(2) for row, token in zip(logits, ids[1:], strict=True)]
    found = evaluate(trainer.model, trainer.data, batch_size=4)
    assert (found.tokens, found.bytes) == (len(ids) - 1, 24)
    assert found.bits_per_byte == pytest.approx(sum(surprise) / 24, rel=1e-6)
    assert found.nats_per_token == pytest.approx(sum(surprise) * math.log(2) / found.tokens, rel=1e-6)


@pytest.mark.parametrize("source", ["texts", "pairs"])
def test_every_heldout_byte_counts_once(tmp_path, request, source):
    trainer, _ = stepped(train_config(tmp_path / "out", request.getfixturevalue(source)))
    nats = 0.0
    for batch in trainer.data.heldout_batches(1):
        with torch.no_grad():
            logs = trainer.model.eval()(*batch.inputs).double().log_softmax(-1)
        for position, label in enumerate(batch.labels[0].tolist()):
            nats -= float(logs[0, position, label]) if label != IGNORED else 0.0
    found = evaluate(trainer.model, trainer.data, batch_size=4)
    assert (found.tokens, found.bytes) == (trainer.data.heldout_tokens, trainer.data.heldout_bytes)
    assert found.nats == pytest.approx(nats, rel=1e-6)


def test_a_uniform_model_needs_log2_of_the_vocabulary_a_token(tmp_path, texts):
    trainer = Trainer(train_config(tmp_path / "out", texts))
    torch.nn.init.zeros_(trainer.model.lm_head.weight)
    found = evaluate(trainer.model, trainer.data, batch_size=4)
    assert found.bits_per_byte == pytest.approx(math.log2(300) * found.tokens / found.bytes, rel=1e-6)


def test_max_tokens_bounds_an_evaluation(tmp_path, texts):
    trainer = Trainer(train_config(tmp_path / "out", texts))
    heard = []
    whole = evaluate(trainer.model, trainer.data, batch_size=4)
    part = evaluate(trainer.model, trainer.data, batch_size=1, max_tokens=30, on_batch=heard.append)
    assert part.tokens == heard[-1] == 30 < whole.tokens
    assert heard == sorted(heard)
    assert evaluate(trainer.model, trainer.data, batch_size=4, max_tokens=10**9) == whole


def test_evaluating_changes_nothing(tmp_path, texts):
    trainer, _ = stepped(train_config(tmp_path / "out", texts, model={"dropout": 0.5}))
    before, state = weights(trainer).clone(), torch.get_rng_state()
    assert trainer.model.training
    first, second = (evaluate(trainer.model, trainer.data, batch_size=4) for _ in range(2))
    assert first == second
    assert trainer.model.training
    assert torch.equal(before, weights(trainer))
    assert torch.equal(state, torch.get_rng_state())
