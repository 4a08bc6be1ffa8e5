"""transformers and `apt_fp4`: quantised while loading, saved, opened. A test is named after the trap it covers."""

# ruff: noqa: E402 - what needs an extra is imported after the skip

import filecmp
import json
import logging
import subprocess
import sys

import pytest
import torch

tf = pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="needs the extra hf")

from hf_models import MODELS, ids
from safetensors.torch import load_file, save_file

from apt_model.core.errors import CheckpointError, ConfigError, InputError
from apt_model.core.fp4_storage import quantization_config
from apt_model.integrations import AptFP4Config, prepare_for_training
from apt_model.integrations.fp4_files import open_fp4
from apt_model.layers.fp4_embedding import FusedFP4Embedding
from apt_model.layers.fp4_experts import FP4Experts
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.layers.packed import PackedModule
from apt_model.optimization.convert import quantize
from apt_model.optimization.fp4_config import FP4Config


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    tf.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()


def logits(model):
    with torch.no_grad():
        return model.eval()(**ids(model)).logits


def saved(folder, kind):
    """A model in full precision, and its folder."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    model.save_pretrained(folder / "plain")
    return model, folder / "plain"


def quantized(folder, kind, **options):
    """A model quantised while it is loaded."""
    model, plain = saved(folder, kind)
    return type(model).from_pretrained(plain, quantization_config=AptFP4Config(**options))


@pytest.fixture
def dense(tmp_path):
    """A folder of a quantised model."""
    quantized(tmp_path, "dense").save_pretrained(tmp_path / "fp4")
    return tmp_path / "fp4"


def same_files(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("kind", MODELS)
def test_loads_saves_and_opens_again_byte_for_byte(kind, form, tmp_path):
    model = quantized(tmp_path, kind, format=form)
    assert any(isinstance(each, FusedFP4Linear) for each in model.modules())
    model.save_pretrained(tmp_path / "one")
    again, info = type(model).from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(info.values())
    again.save_pretrained(tmp_path / "two")
    assert same_files(tmp_path / "one", tmp_path / "two")
    assert torch.equal(logits(model), logits(again))
    assert open_fp4(tmp_path / "one").scheme.format == form


@pytest.mark.parametrize("kind", MODELS)
def test_loading_gives_what_quantize_gives(kind, tmp_path):
    """The same values as our own `quantize` of the whole model, where both take the same layers."""
    model = quantized(tmp_path, kind)
    plain, _ = saved(tmp_path, kind)
    other = quantize(plain, FP4Config(skip=tuple(model.hf_quantizer.report.kept)), report=lambda _: None)
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("kind", ["dense", "mixtral", "gpt2", "t5"])
def test_dequantize_gives_a_model_that_is_saved_as_any_other(kind, tmp_path):
    model = quantized(tmp_path, kind)
    before = logits(model)
    plain = model.dequantize()
    torch.testing.assert_close(logits(plain), before)
    assert not any(isinstance(each, PackedModule) for each in plain.modules())
    plain.save_pretrained(tmp_path / "out")
    again, info = type(plain).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again), logits(plain))


def test_what_is_skipped_is_reported_with_its_reason(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "apt_model"):
        model = quantized(tmp_path, "tied", modules_to_not_convert=["layers.0.mlp"])
    kept = model.hf_quantizer.report.kept
    assert kept["lm_head"] == "the output projection"
    assert kept["model.layers.0.mlp.up_proj"] == "asked for: layers.0.mlp"
    assert len(model.hf_quantizer.report.quantized) == 14 - 3
    assert "the output projection): lm_head" in caplog.text
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (
        quantized(tmp_path, "qwen_moe").hf_quantizer.report.kept["model.layers.0.mlp.shared_expert_gate"] == "a router"
    )
    assert "float32" in quantized(tmp_path, "t5").hf_quantizer.report.kept["encoder.block.0.layer.1.DenseReluDense.wo"]


def test_a_pattern_that_covers_nothing_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"modules_to_not_convert: .*each covers a module, got 'layer\.7'"):
        quantized(tmp_path, "dense", modules_to_not_convert=("layer.7",))


def test_a_new_head_stays_plain_and_trainable(tmp_path):
    _, plain = saved(tmp_path, "dense")
    model = tf.LlamaForSequenceClassification.from_pretrained(plain, quantization_config=AptFP4Config())
    assert model.score.weight.requires_grad
    assert len(model.hf_quantizer.report.quantized) == 14


def test_a_weight_that_the_files_lack_stays_plain_and_is_reported(tmp_path):
    _, plain = saved(tmp_path, "dense")
    tensors = load_file(plain / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    model = tf.LlamaForCausalLM.from_pretrained(plain, quantization_config=AptFP4Config())
    assert model.hf_quantizer.report.kept["model.layers.1.mlp.up_proj"] == "not in the files, and newly drawn"
    assert model.model.layers[1].mlp.up_proj.weight.requires_grad
    model.save_pretrained(tmp_path / "fp4")
    assert torch.equal(logits(tf.LlamaForCausalLM.from_pretrained(tmp_path / "fp4")), logits(model))


@pytest.mark.parametrize("kind", ["dense", "mixtral"])
def test_shards(kind, tmp_path):
    model, _ = saved(tmp_path, kind)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    model = type(model).from_pretrained(tmp_path / "shards", quantization_config=AptFP4Config())
    model.save_pretrained(tmp_path / "fp4", max_shard_size="8KB")
    assert len(list((tmp_path / "fp4").glob("*.safetensors"))) > 2
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "fp4")), logits(model))


def test_a_head_opens_a_base_models_folder(tmp_path):
    model = quantized(tmp_path, "dense")
    model.save_pretrained(tmp_path / "fp4")
    base = tf.LlamaModel.from_pretrained(tmp_path / "fp4")
    assert sum(isinstance(each, FusedFP4Linear) for each in base.modules()) == 14


def test_the_type_asked_for_is_the_layers(tmp_path):
    _, plain = saved(tmp_path, "dense")
    model = tf.LlamaForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, quantization_config=AptFP4Config())
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.dtype, layer.weight_scale.dtype) == (torch.bfloat16, torch.float8_e4m3fn)
    model.save_pretrained(tmp_path / "fp4")
    assert torch.equal(logits(tf.LlamaForCausalLM.from_pretrained(tmp_path / "fp4")), logits(model))


def test_quantising_keeps_no_second_copy(tmp_path, monkeypatch):
    """When a weight is quantised, no other weight of a quantised layer is there in full precision."""
    from apt_model.integrations import transformers_fp4

    plain_bytes, real = [], transformers_fp4.AptFP4HfQuantizer._take

    def take(self, model, name, weight, missing):
        matrices = [held for held in model.parameters() if held.dim() > 1 and held.dtype == torch.float32]
        plain_bytes.append(sum(held.numel() for held in matrices if not held.is_meta))
        return real(self, model, name, weight, missing)

    monkeypatch.setattr(transformers_fp4.AptFP4HfQuantizer, "_take", take)
    model = quantized(tmp_path, "dense")
    assert len(plain_bytes) == 14
    assert max(plain_bytes) <= model.lm_head.weight.numel() + model.model.embed_tokens.weight.numel()


# --- the twelve traps


def test_trap_1_without_our_import_transformers_says_that_it_skips_the_quantisation(dense):
    """It goes on all the same, with weights drawn anew; what can be had is that its words name the cause."""
    code = f"import transformers; transformers.LlamaForCausalLM.from_pretrained({str(dense)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Unknown quantization type, got apt_fp4" in done.stdout + done.stderr
    assert "weight_packed" in done.stdout + done.stderr


def test_trap_1_packed_weights_have_names_of_their_own(dense):
    """No reader can take them for weights: nothing in the file is called as the layer's weight is."""
    names = load_file(dense / "model.safetensors").keys()
    assert "model.layers.0.mlp.up_proj.weight_packed" in names
    assert "model.layers.0.mlp.up_proj.weight" not in names


@pytest.mark.parametrize("kind", ["dense", "mixtral"])
def test_trap_2_packed_tensors_are_frozen_after_loading(kind, tmp_path):
    model = quantized(tmp_path, kind)
    model.save_pretrained(tmp_path / "fp4")
    for each in (model, type(model).from_pretrained(tmp_path / "fp4")):
        packed = [held for module in each.modules() if isinstance(module, PackedModule) for held in module.parameters()]
        assert packed
        assert not any(held.requires_grad for held in packed)
        assert each.lm_head.weight.requires_grad


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_global_scale"])
def test_trap_3_a_missing_tensor_of_ours_raises(part, dense):
    tensors = load_file(dense / "model.safetensors")
    del tensors[f"model.layers.1.mlp.down_proj.{part}"]
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"1 packed tensors are missing: model\.layers\.1\.mlp\.down_proj\.{part}"
    ):
        tf.LlamaForCausalLM.from_pretrained(dense)
    with pytest.raises(CheckpointError, match=rf"missing: model\.layers\.1\.mlp\.down_proj\.{part}"):
        tf.LlamaForCausalLM.from_pretrained(None, state_dict=tensors, config=tf.AutoConfig.from_pretrained(dense))


def test_trap_3_scales_of_experts_are_loaded_and_a_missing_one_raises(tmp_path):
    model = quantized(tmp_path, "mixtral")
    model.save_pretrained(tmp_path / "fp4")
    again = tf.MixtralForCausalLM.from_pretrained(tmp_path / "fp4")
    for name, held in model.named_parameters():
        assert torch.equal(held.view(torch.uint8), again.get_parameter(name).view(torch.uint8)), name
    tensors = load_file(tmp_path / "fp4/model.safetensors")
    for name in [name for name in tensors if name.endswith("w2.weight_scale") and "layers.0" in name]:
        del tensors[name]
    save_file(tensors, tmp_path / "fp4/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.0\.mlp\.experts\.down_proj_scale"):
        tf.MixtralForCausalLM.from_pretrained(tmp_path / "fp4")


def test_trap_3_a_weight_that_is_packed_against_the_config_raises(dense):
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = quantization_config("nvfp4", ["lm_head", "layers.0.mlp.up_proj"])
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"packed that the model keeps whole: model\.layers\.0\.mlp\.up_proj"):
        tf.LlamaForCausalLM.from_pretrained(dense)


def test_trap_3_global_scales_that_differ_inside_a_stack_are_refused(tmp_path):
    quantized(tmp_path, "mixtral").save_pretrained(tmp_path / "fp4")
    tensors = load_file(tmp_path / "fp4/model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.2.w3.weight_global_scale"] *= 2
    save_file(tensors, tmp_path / "fp4/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="conversion"):
        tf.MixtralForCausalLM.from_pretrained(tmp_path / "fp4")


@pytest.mark.parametrize(
    ("kind", "name"), [("mixtral", "block_sparse_moe.experts.3.w1"), ("qwen_moe", "mlp.experts.3.gate_proj")]
)
def test_trap_4_the_first_save_of_a_moe_has_canonical_names(kind, name, tmp_path):
    quantized(tmp_path, kind).save_pretrained(tmp_path / "fp4")
    names = load_file(tmp_path / "fp4/model.safetensors").keys()
    parts = {each for each in names if each.startswith(f"model.layers.1.{name}.")}
    assert parts == {f"model.layers.1.{name}.weight_{part}" for part in ("packed", "scale", "global_scale")}
    assert not any("experts.gate_up_proj" in each or "experts.down_proj" in each for each in names)


def test_trap_4_experts_are_packed_and_stay_so(tmp_path):
    model = quantized(tmp_path, "mixtral")
    assert sum(isinstance(each, FP4Experts) for each in model.modules()) == 2
    assert model.get_memory_footprint() < 0.5 * saved(tmp_path, "mixtral")[0].get_memory_footprint()


@pytest.mark.parametrize("kind", ["dense", "mixtral"])
def test_trap_5_a_packed_tensor_is_counted_once_when_places_are_planned(kind, tmp_path):
    from transformers.integrations.accelerate import compute_module_sizes
    from transformers.quantizers.auto import AutoHfQuantizer

    model = quantized(tmp_path, kind)
    true = sum(held.numel() * held.element_size() for held in model.parameters())
    for ready in (True, False):
        quantizer = AutoHfQuantizer.from_config(AptFP4Config(), pre_quantized=ready)
        with torch.device("meta"):
            skeleton = MODELS[kind]()
        quantizer.preprocess_model(skeleton)
        planned = compute_module_sizes(skeleton, quantizer)[0][""]
        assert planned == pytest.approx(true, rel=0.01), ready
        assert (quantizer.quantized_element_size is None) == ready


def test_trap_6_quantising_onto_the_disk_is_refused_with_the_way_round(tmp_path):
    _, plain = saved(tmp_path, "dense")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    with pytest.raises(ConfigError, match="apt-model quantize DIR --format nvfp4 --layout apt --out DIR2"):
        tf.LlamaForCausalLM.from_pretrained(plain, device_map=places, quantization_config=AptFP4Config())


@pytest.mark.parametrize("kind", ["dense", "mixtral"])
def test_trap_6_a_quantised_folder_runs_from_the_disk_and_is_saved_from_it(kind, tmp_path):
    model = quantized(tmp_path, kind)
    model.save_pretrained(tmp_path / "fp4")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    offloaded = type(model).from_pretrained(tmp_path / "fp4", device_map=places, offload_folder=tmp_path / "off")
    assert offloaded.model.layers[1].self_attn.q_proj.weight_packed.is_meta
    assert torch.equal(logits(offloaded), logits(model))
    assert offloaded.model.layers[1].self_attn.q_proj.weight_packed.is_meta


def test_trap_7_packed_layers_are_linear_layers(tmp_path):
    layer = quantized(tmp_path, "dense").model.layers[0].mlp.down_proj
    assert isinstance(layer, torch.nn.Linear)
    assert (layer.in_features, layer.out_features) == (64, 32)


def test_trap_10_our_preparation_freezes_checkpoints_and_casts_nothing(tmp_path):
    _, plain = saved(tmp_path, "dense")
    model = tf.LlamaForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, quantization_config=AptFP4Config())
    before = {name: held.dtype for name, held in model.named_parameters()}
    prepare_for_training(model)
    assert {name: held.dtype for name, held in model.named_parameters()} == before
    assert not any(held.requires_grad for held in model.parameters())
    assert model.is_activation_checkpointing
    assert not prepare_for_training(
        quantized(tmp_path, "dense"), gradient_checkpointing=False
    ).is_activation_checkpointing


def test_trap_12_a_second_config_is_not_read_and_it_is_said(dense):
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        model = tf.LlamaForCausalLM.from_pretrained(dense, quantization_config=AptFP4Config(format="mxfp4"))
    assert model.model.layers[0].mlp.up_proj.format == "nvfp4"
    assert model.config.quantization_config.format == "nvfp4"


@pytest.mark.parametrize(("entry", "value"), [("format", "int4"), ("group_size", 32), ("layout", 9)])
def test_trap_12_what_this_version_does_not_read_is_refused(entry, value, dense):
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"][entry] = value
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"quantization_config\.{entry}: expected"):
        tf.LlamaForCausalLM.from_pretrained(dense)


def test_the_users_config_is_left_as_it_was(tmp_path):
    config = AptFP4Config()
    _, plain = saved(tmp_path, "dense")
    model = tf.LlamaForCausalLM.from_pretrained(plain, quantization_config=config)
    assert config == AptFP4Config()
    assert model.config.quantization_config.modules_to_not_convert == ("lm_head",)


def test_embeddings_quantised_after_loading_run_and_go_back_and_are_not_saved(tmp_path):
    model = quantize(quantized(tmp_path, "dense"), FP4Config(embeddings=True), report=lambda _: None)
    assert type(model.get_input_embeddings()) is FusedFP4Embedding
    expected = logits(model)
    with pytest.raises(InputError, match=r"expected embeddings in full precision, got model\.embed_tokens in 4 bits"):
        model.save_pretrained(tmp_path / "fp4")
    assert torch.equal(logits(model.dequantize()), expected)
    assert type(model.get_input_embeddings()) is torch.nn.Embedding


def test_tables_that_are_scaled_or_tied_are_left():
    reports = []
    quantize(MODELS["bart"](), FP4Config(embeddings=True), report=reports.append)
    reasons = {each.name: each.reason for each in reports[0].skipped}
    for side in ("encoder", "decoder"):
        assert "BartScaledWordEmbedding is a subclass" in reasons[f"model.{side}.embed_tokens"]
        assert "BartLearnedPositionalEmbedding is a subclass" in reasons[f"model.{side}.embed_positions"]
    assert not any("embed" in name or "shared" in name for name in reports[0].quantized)


@pytest.mark.parametrize("entry", [{"embeddings": True}, {"modules": ["lm_head"]}])
def test_an_entry_that_nobody_knows_is_refused(entry, tmp_path):
    _, plain = saved(tmp_path, "dense")
    with pytest.raises(ConfigError, match=f"AptFP4Config has no option '{next(iter(entry))}'"):
        tf.LlamaForCausalLM.from_pretrained(
            plain, quantization_config={"quant_method": "apt_fp4", "format": "nvfp4", **entry}
        )
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(entry))}'"):
        AptFP4Config(**entry)


def test_our_own_folders_of_the_command_line_open(tmp_path):
    from apt_model.integrations.quantize_config import QuantizeConfig
    from apt_model.integrations.quantize_files import quantize_folder

    for kind in ("dense", "mixtral", "gpt2"):
        model, plain = saved(tmp_path / kind, kind)
        quantize_folder(plain, tmp_path / kind / "fp4", QuantizeConfig(layout="apt", device="cpu"))
        opened = type(model).from_pretrained(tmp_path / kind / "fp4")
        assert any(isinstance(each, PackedModule) for each in opened.modules())
        error = (logits(opened) - logits(model)).norm() / logits(model).norm()
        assert error < 0.15


@pytest.mark.parametrize("kind", ["dense", "mixtral", "gpt2"])
def test_fp8_activations_are_kept_in_config_json_and_by_every_module(kind, tmp_path):
    model = quantized(tmp_path, kind, activation_dtype="fp8")
    model.save_pretrained(tmp_path / "fp4")
    assert (
        json.loads((tmp_path / "fp4" / "config.json").read_text())["quantization_config"]["activation_dtype"] == "fp8"
    )
    again = type(model).from_pretrained(tmp_path / "fp4")
    for each in (model, again):
        packed = [module for module in each.modules() if isinstance(module, PackedModule)]
        assert packed
        assert all(module.activation_dtype == "fp8" for module in packed)
    assert open_fp4(tmp_path / "fp4").weights, "the command line reads the folder too"


def test_without_it_config_json_is_as_before(dense):
    text = (dense / "config.json").read_text()
    assert "activation_dtype" not in text
    with pytest.raises(ConfigError, match=r"AptFP4Config\.activation_dtype: expected one of 'fp8' or None, got 'fp4'"):
        AptFP4Config.from_dict({**json.loads(text)["quantization_config"], "activation_dtype": "fp4"})
