import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import SHAPE, VARIANTS, build, tokens

from apt_model import __version__
from apt_model.core.errors import CheckpointError, ConfigError, InputError, SequenceLengthError
from apt_model.modeling.apt_model import APTModel, APTModelConfiguration

CONFIG, WEIGHTS = "config.json", "model.safetensors"


# Options.


def test_importing_it_loads_no_torch():
    code = "import sys; import apt_model.modeling.configuration; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "near"),
    [("d_modle", "d_model"), ("use_leftspin", "use_left_spin"), ("num_layers", "num_encoder_layers"), ("ffn", None)],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name, near):
    with pytest.raises(ConfigError) as caught:
        APTModelConfiguration.from_dict({name: 3})
    assert f"APTModelConfiguration has no option {name!r}" in str(caught.value)
    assert (f"did you mean {near!r}?" if near else "known names: activation, ") in str(caught.value)
    with pytest.raises(TypeError, match=name):
        APTModelConfiguration(**{name: 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({field: 0}, f"{field}: expected at least 1, got 0")
            for field in ("vocab_size", "d_model", "num_heads", "d_ff", "max_seq_len", "num_decoder_layers")
        ),
        (
            {"num_encoder_layers": 0},
            "num_encoder_layers: expected at least 1 in an encoder-decoder, got 0\ndecoder_only=True",
        ),
        ({"d_model": 30, "num_heads": 4}, "d_model: expected a multiple of 2 * num_heads = 8"),
        ({"d_model": 12, "num_heads": 4}, "d_model: expected a multiple of 2 * num_heads = 8"),
        ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1, got 1.0"),
        ({"dropout": -0.1}, "dropout: expected 0 <= dropout < 1, got -0.1"),
        *(({field: 0.0}, f"{field}: expected above 0, got 0.0") for field in ("norm_eps", "rope_theta", "sr_ratio")),
        *(
            ({"vocab_size": 9, f"{kind}_token_id": value}, f"{kind}_token_id: expected 0..8, got {value}")
            for kind in ("pad", "bos", "eos")
            for value in (9, -1)
        ),
        ({"left_spin_alpha": 0.0}, "left_spin_alpha: expected above 0, got 0.0\nuse_left_spin=False"),
        ({"left_spin_beta": 0.0}, "left_spin_beta: expected 0 < beta <= 1, got 0.0"),
        ({"left_spin_beta": 1.1}, "left_spin_beta: expected 0 < beta <= 1, got 1.1"),
        ({"left_spin_mode": "guard"}, "left_spin_tau: expected a threshold above 0 in guard mode, got None\ntake 1.25"),
        (
            {"left_spin_mode": "guard", "left_spin_tau": 0.0},
            "left_spin_tau: expected a threshold above 0 in guard mode",
        ),
        (
            {"left_spin_mode": "guard", "left_spin_tau": 4.0, "left_spin_alpha": 0.5},
            "left_spin_alpha: expected at most 1 / left_spin_tau = 0.25 in guard mode",
        ),
        ({"left_spin_mode": "trust", "left_spin_tau": 0.3}, "left_spin_tau: expected None in trust mode, got 0.3"),
        *(
            (
                {"left_spin_mode": "trust", f"left_spin_{field}": 0.9},
                f"left_spin_{field}: expected {default}, its default",
            )
            for field, default in (("beta", 0.7), ("w1", 1.0), ("w2", 0.5))
        ),
        ({"activation": "relu"}, "activation: expected one of 'gelu', 'swiglu', got 'relu'"),
        ({"norm_position": "sandwich"}, "norm_position: expected one of 'pre', 'post', got 'sandwich'"),
        ({"left_spin_mode": "strong"}, "left_spin_mode: expected one of 'design', 'trust', 'guard', got 'strong'"),
        ({"d_model": 32.0}, "d_model: expected int, got 32.0"),
        ({"d_model": True}, "d_model: expected int, got True"),
        ({"use_left_spin": 1}, "use_left_spin: expected bool, got 1"),
        ({"dropout": "0.1"}, "dropout: expected float, got '0.1'"),
        ({"pad_token_id": "0"}, "pad_token_id: expected int or None, got '0'"),
        ({"autopoietic_alpha": float("nan")}, "autopoietic_alpha: expected a finite number, got nan"),
        ({"left_spin_w1": float("inf")}, "left_spin_w1: expected a finite number, got inf"),
    ],
)
def test_a_value_that_cannot_be_met_is_refused_by_name(options, message):
    with pytest.raises(ConfigError) as caught:
        APTModelConfiguration(**options)
    assert str(caught.value).startswith(f"APTModelConfiguration.{message}")


def test_a_mechanism_that_is_off_does_not_ask_for_its_settings():
    config = APTModelConfiguration(use_left_spin=False, left_spin_mode="guard")
    assert config.left_spin_tau is None


@pytest.mark.parametrize(
    ("options", "sublayers", "resolved"),
    [
        ({}, 16, (0.5, 0.3)),
        ({"left_spin_alpha": 4.0, "left_spin_tau": 0.0}, 16, (4.0, 0.0)),
        ({"left_spin_mode": "trust"}, 16, (2.0, 0.0)),
        ({"left_spin_mode": "trust", "left_spin_alpha": 3.0}, 16, (3.0, 0.0)),
        ({"left_spin_mode": "guard", "left_spin_tau": 0.8}, 16, (0.5, 0.8)),
        ({"left_spin_mode": "guard", "left_spin_tau": 8.0}, 16, (0.125, 8.0)),
    ],
)
def test_the_settings_in_force_of_left_spin(options, sublayers, resolved):
    assert APTModelConfiguration(**options).resolve_left_spin(sublayers) == resolved


def test_derived_sizes():
    config = APTModelConfiguration(d_model=768, num_heads=12, num_encoder_layers=3, num_decoder_layers=5)
    assert (config.head_dim, config.autopoietic_rank, config.is_encoder_decoder) == (64, 192, True)
    assert (config.num_encoder_sublayers, config.num_decoder_sublayers) == (6, 15)
    alone = config.replace(decoder_only=True, sr_ratio=1000.0)
    assert (alone.num_encoder_sublayers, alone.num_decoder_sublayers, alone.autopoietic_rank) == (0, 10, 4)


def test_replace_checks_what_it_makes_and_leaves_the_original():
    config = APTModelConfiguration(**SHAPE)
    assert config.replace(dropout=0.1).dropout == 0.1
    assert config.dropout == 0.0
    with pytest.raises(ConfigError, match="has no option 'drop_out'"):
        config.replace(drop_out=0.1)
    with pytest.raises(ConfigError, match="dropout: expected"):
        config.replace(dropout=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dropout = 0.5


def test_plain_switches_the_mechanisms_off_and_nothing_else():
    config = APTModelConfiguration(**SHAPE, dropout=0.1)
    plain = config.plain()
    assert (plain.use_left_spin, plain.use_autopoietic, plain.use_dbc_dac) == (False, False, False)
    assert plain.replace(use_left_spin=True, use_autopoietic=True, use_dbc_dac=True) == config
    model = APTModel(plain)
    assert not any("self_value" in name or "residual" in name for name, _ in model.named_parameters())


# Files.


@settings(max_examples=40, deadline=None)
@given(
    variant=st.sampled_from(list(VARIANTS)),
    heads=st.integers(1, 8),
    dropout=st.floats(0, 0.99),
    theta=st.floats(1e-3, 1e9),
    pad=st.none() | st.integers(0, 36),
)
def test_a_configuration_survives_json(tmp_path_factory, *, variant, heads, dropout, theta, pad):
    shape = {**SHAPE, "num_heads": heads, "d_model": 4 * heads}
    config = APTModelConfiguration(
        **{**shape, **VARIANTS[variant], "dropout": dropout, "rope_theta": theta, "pad_token_id": pad}
    )
    assert APTModelConfiguration.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    folder = tmp_path_factory.mktemp("config")
    config.save(folder)
    assert APTModelConfiguration.load(folder) == config


@pytest.fixture
def saved(tmp_path):
    build().save_pretrained(tmp_path)
    return tmp_path


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_saved_model_is_two_files_that_say_what_they_are(saved):
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]
    values = json.loads((saved / CONFIG).read_text())
    assert (values["model_type"], values["architectures"], values["apt_version"]) == ("apt", ["APTModel"], __version__)
    assert load_file(saved / WEIGHTS).keys() == build().state_dict().keys()


def test_saving_again_replaces_the_older_model(saved):
    smaller = build(decoder_only=True)
    smaller.save_pretrained(saved)
    again = APTModel.from_pretrained(saved)
    assert again.config == smaller.config
    assert torch.equal(again(tokens(1, 3)), smaller(tokens(1, 3)))


def test_a_foreign_model_is_refused(saved):
    edit(saved / CONFIG, lambda values: values.update(model_type="bert"))
    with pytest.raises(CheckpointError, match="describes a model of type 'bert', not 'apt'"):
        APTModel.from_pretrained(saved)


def test_an_option_of_another_version_is_named(saved):
    edit(saved / CONFIG, lambda values: values.update(num_head=4))
    with pytest.raises(ConfigError, match=r"has no option 'num_head'\ndid you mean 'num_heads'\?"):
        APTModel.from_pretrained(saved)


@pytest.mark.parametrize("content", ["", "{", "\x00", "[1, 2]", "3", "{}"])
def test_a_config_that_is_none_is_refused(saved, content):
    (saved / CONFIG).write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json (cannot be read as JSON|describes a model of type None)"):
        APTModel.from_pretrained(saved)


def test_a_folder_without_a_config_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(
            CheckpointError, match=r"holds no config\.json: it is not a saved model(?s:.*)save_pretrained"
        ):
            APTModel.from_pretrained(folder)


def test_missing_weights_are_named(saved):
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist: the folder holds no weights"):
        APTModel.from_pretrained(saved)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -4, -1])
def test_truncated_weights_are_refused(saved, keep):
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or no safetensors file"):
        APTModel.from_pretrained(saved)


def test_a_folder_in_the_place_of_the_weights_is_refused(saved):
    (saved / WEIGHTS).unlink()
    (saved / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        APTModel.from_pretrained(saved)


class Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_is_refused_and_never_run(saved, write, tmp_path):
    write({"embedding.weight": Trap(tmp_path / "sprung")}, saved / WEIGHTS)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        APTModel.from_pretrained(saved)
    assert not (tmp_path / "sprung").exists()


def altered(change):
    def apply(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), r"1 missing \(lm_head\.weight\)"),
        (lambda tensors: tensors.update({"head.bias": torch.ones(3)}), r"1 unexpected \(head\.bias\)"),
        (
            lambda tensors: tensors.update({"embedding.weight": torch.ones(37, 16)}),
            r"embedding\.weight is \[37, 16\], not \[37, 32\]",
        ),
        (lambda tensors: tensors.clear(), r"\d+ missing \(decoder_layers\.0\S*, \S+, \S+, \S+\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(saved, alter, message):
    altered(alter)(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        APTModel.from_pretrained(saved)
    assert "save the model again" in str(caught.value)


def test_several_misfits_are_named_together(saved):
    edit(saved / CONFIG, lambda values: values.update(tie_word_embeddings=True, vocab_size=50))
    with pytest.raises(
        CheckpointError, match=r"1 unexpected \(lm_head\.weight\); embedding\.weight is \[37, 32\], not \[50, 32\]"
    ):
        APTModel.from_pretrained(saved)


# What a model refuses to be called with.


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(3, dtype=torch.long),
        torch.zeros(2, 0, dtype=torch.long),
        torch.zeros(2, 3),
        torch.zeros(1, 2, 3).long(),
    ],
)
def test_what_are_no_token_ids_is_refused(ids):
    model = build()
    with pytest.raises(InputError, match=r"input_ids: expected token ids \[batch, positions >= 1\] of an integer type"):
        model(ids)
    with pytest.raises(InputError, match="src_tokens: expected token ids"):
        model(ids, tokens(2, 3))


def test_a_sequence_that_is_too_long_is_refused():
    model = build(max_seq_len=8)
    with pytest.raises(SequenceLengthError, match=r"input_ids: 9 positions(?s:.*)max_seq_len >= 9"):
        model(tokens(1, 9))
    with pytest.raises(SequenceLengthError, match="src_tokens: 9 positions"):
        model(tokens(1, 9), tokens(1, 3))
    assert model(tokens(1, 8)).shape == (1, 8, 37)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool), torch.ones(3, dtype=torch.bool)]
)
def test_masks_of_another_shape_or_type_are_refused(mask):
    model, ids = build(), tokens(2, 3)
    for arguments, name in (
        ({"src_mask": mask}, "src_mask"),
        ({"tgt_tokens": ids, "src_mask": mask}, "src_mask"),
        ({"tgt_tokens": ids, "tgt_mask": mask}, "tgt_mask"),
    ):
        with pytest.raises(InputError, match=rf"{name}: expected bool \[2, 3\] \(True = attend\)"):
            model(ids, **arguments)


@pytest.mark.parametrize(("sources", "targets"), [(1, 3), (3, 1), (2, 3)])
def test_as_many_sources_as_targets(sources, targets):
    with pytest.raises(InputError, match=f"tgt_tokens: {targets} rows, but the source has {sources}"):
        build()(tokens(sources, 3), tokens(targets, 4))


def test_masks_and_sources_without_a_place_are_refused():
    with pytest.raises(InputError, match="tgt_mask without tgt_tokens: a causal language model's mask is src_mask"):
        build()(tokens(2, 3), tgt_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="a decoder_only model has no encoder"):
        build(decoder_only=True)(tokens(2, 3), tokens(2, 3))
