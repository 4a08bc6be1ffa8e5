"""LoRA, DoRA and transformers' Trainer over packed layers. A test is named after the trap it covers."""

# ruff: noqa: E402 - what needs an extra is imported after the skip

import copy
import itertools
import json
import subprocess
import sys

import pytest
import torch

tf = pytest.importorskip("transformers", reason="needs the extra hf")
peft = pytest.importorskip("peft", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="needs the extra hf")

from hf_models import MODELS, ids
from torch import nn

from apt_model.core.errors import InputError
from apt_model.integrations import AptFP4Config, prepare_for_training
from apt_model.integrations.peft_fp4 import LoraFP4Linear, hook_lora, unhook_lora
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.layers.packed import PackedModule
from apt_model.optimization.convert import quantize


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    tf.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()


@pytest.fixture
def folder(tmp_path):
    """A folder of a quantised model."""
    base(tmp_path, "dense").save_pretrained(tmp_path / "fp4")
    return tmp_path / "fp4"


def base(tmp_path, kind, **options):
    torch.manual_seed(0)
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "plain")
    return type(model).from_pretrained(tmp_path / "plain", quantization_config=AptFP4Config(**options))


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def logits(model):
    with torch.no_grad():
        return model.eval()(**ids(model)).logits


def train(model, steps=4):
    """Losses of a few steps on one batch."""
    optimizer = torch.optim.AdamW([held for held in model.parameters() if held.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model.train()(**ids(model), labels=ids(model)["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(model, **options):
    adapted = peft.get_peft_model(model, lora(**options))
    train(adapted)
    return adapted


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT's own, for experts
@pytest.mark.parametrize(
    ("kind", "dora"), [("dense", False), ("dense", True), ("gpt2", False), ("gpt2", True), ("mixtral", False)]
)
def test_trap_7_all_linear_finds_the_packed_layers_and_they_train(kind, dora, tmp_path):
    model = peft.get_peft_model(base(tmp_path, kind), lora(use_dora=dora))
    wrapped = [each for each in model.modules() if isinstance(each, LoraFP4Linear)]
    packed = [each for each in model.modules() if isinstance(each, FusedFP4Linear)]
    assert len(wrapped) == len(packed) > 0
    before = [held.clone() for each in packed for held in each.parameters()]
    losses = train(model)
    assert losses[-1] < losses[0] - 0.1
    assert all(
        torch.equal(held, old) for held, old in zip((h for p in packed for h in p.parameters()), before, strict=True)
    )


@pytest.mark.parametrize("kind", ["dense", "gpt2"])
@pytest.mark.parametrize(("dora", "safe"), list(itertools.product([False, True], repeat=2)))
def test_trap_8_merging_gives_plain_layers_with_what_was_trained(kind, dora, safe, tmp_path):
    model = trained(base(tmp_path, kind), use_dora=dora)
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=safe)
    assert not any(isinstance(each, PackedModule) for each in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_trap_8_a_merged_layer_is_a_linear_layer_of_the_layers_type(tmp_path):
    torch.manual_seed(0)
    MODELS["dense"]().save_pretrained(tmp_path / "plain")
    model = tf.LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16, quantization_config=AptFP4Config()
    )
    merged = trained(model).merge_and_unload()
    layer = merged.model.layers[0].mlp.up_proj
    assert (type(layer), layer.weight.dtype, layer.weight.requires_grad) == (nn.Linear, torch.bfloat16, False)


@pytest.mark.parametrize("dora", [False, True])
def test_trap_8_unmerging_gives_the_packed_layers_back_bit_for_bit(dora, tmp_path):
    model = trained(base(tmp_path, "dense"), use_dora=dora)
    expected, packed = logits(model), {id(each) for each in model.modules() if isinstance(each, FusedFP4Linear)}
    model.merge_adapter()
    assert not any(isinstance(each, FusedFP4Linear) for each in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert {id(each) for each in model.modules() if isinstance(each, FusedFP4Linear)} == packed
    assert torch.equal(logits(model), expected)


def test_trap_8_two_dora_adapters_merge_into_the_same_weight(tmp_path):
    """The second one takes the first out again to measure the weight, and that must not lose either."""
    model = base(tmp_path, "dense")
    twin = peft.get_peft_model(copy.deepcopy(model).dequantize(), lora(use_dora=True))
    model = peft.get_peft_model(model, lora(use_dora=True))
    for each in (model, twin):
        each.add_adapter("second", lora(use_dora=True))
    noise = {name: torch.randn_like(held) for name, held in model.named_parameters() if "lora_" in name}
    for each in (model, twin):
        for name, held in each.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                held.data = noise[name] / 10
        each.merge_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)


def test_trap_8_a_merged_model_is_saved_as_what_it_is(tmp_path):
    merged = trained(base(tmp_path, "dense")).merge_and_unload()
    expected = logits(merged)
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    again, info = tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again), expected)


def test_trap_8_a_partly_merged_model_is_saved_as_what_it_is(tmp_path):
    merged = trained(base(tmp_path, "dense"), target_modules=["q_proj", "down_proj"]).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again, info = tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert type(again.model.layers[0].mlp.down_proj) is nn.Linear
    assert torch.equal(logits(again), logits(merged))


def test_trap_8_who_asks_gets_the_merged_model_in_4_bits(tmp_path):
    merged = trained(base(tmp_path, "dense")).merge_and_unload()
    expected = logits(merged)
    packed = quantize(merged, report=lambda _: None)
    assert isinstance(packed.model.layers[0].mlp.up_proj, FusedFP4Linear)
    assert 0 < (logits(packed) - expected).norm() / expected.norm() < 0.2
    packed.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(tf.LlamaForCausalLM.from_pretrained(tmp_path / "out")), logits(packed))


def test_trap_8_starts_that_rewrite_the_weight_are_refused(tmp_path):
    with pytest.raises(InputError, match="packed in nvfp4"):
        peft.get_peft_model(base(tmp_path, "dense"), lora(init_lora_weights="pissa"))


@pytest.mark.parametrize("first", ["import peft", "import apt_model.integrations.transformers_fp4"])
def test_trap_9_an_adapter_opens_in_a_fresh_process_in_any_import_order(first, folder, tmp_path):
    model = trained(tf.LlamaForCausalLM.from_pretrained(folder))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
{first}
import torch, transformers, peft, apt_model.integrations.transformers_fp4
from apt_model.integrations.peft_fp4 import LoraFP4Linear
import sys; sys.path.insert(0, "tests")
from hf_models import ids
model = transformers.LlamaForCausalLM.from_pretrained({str(folder)!r})
model = peft.PeftModel.from_pretrained(model, {str(tmp_path / "adapter")!r}).eval()
assert sum(isinstance(each, LoraFP4Linear) for each in model.modules()) == 14
with torch.no_grad():
    assert torch.equal(model(**ids(model)).logits, torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True))
model.merge_and_unload()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_trap_9_the_hook_is_set_once_and_can_be_taken_off():
    hook_lora()
    hooked = peft.LoraConfig.__post_init__
    hook_lora()
    assert peft.LoraConfig.__post_init__ is hooked
    assert peft.LoraConfig()._custom_modules[FusedFP4Linear] is LoraFP4Linear
    try:
        unhook_lora()
        assert peft.LoraConfig()._custom_modules is None
    finally:
        hook_lora()


def test_trap_10_pefts_preparation_leaves_packed_tensors_alone(tmp_path):
    model = base(tmp_path, "dense")
    packed = {name: held.dtype for name, held in model.named_parameters() if "weight_" in name}
    peft.prepare_model_for_kbit_training(model)
    assert {name: held.dtype for name, held in model.named_parameters() if "weight_" in name} == packed


def test_trap_10_our_preparation_trains_with_checkpoints(tmp_path):
    plain = train(peft.get_peft_model(base(tmp_path, "dense"), lora(init_lora_weights=False)))
    torch.manual_seed(0)
    model = prepare_for_training(base(tmp_path, "dense"))
    assert train(peft.get_peft_model(model, lora(init_lora_weights=False))) == pytest.approx(plain, abs=1e-4)


def test_trap_11_lora_on_packed_experts_never_trains_nothing_in_silence(tmp_path):
    experts = ["mlp.experts.gate_up_proj"]
    with pytest.raises(peft.utils.error.NoMatchingPeftModuleError):
        peft.get_peft_model(base(tmp_path, "mixtral"), lora(target_modules=None, target_parameters=experts))
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        peft.get_peft_model(base(tmp_path, "mixtral"), lora(target_modules=["q_proj"], target_parameters=experts))
    options = {"target_modules": None, "target_parameters": ["mlp.experts.gate_up_proj_packed"]}
    with pytest.raises(InputError, match=r"LoRA on packed experts \(gate_up_proj_packed\)"):
        peft.get_peft_model(base(tmp_path, "mixtral"), lora(**options))


def test_trap_11_its_remedy_works(tmp_path):
    model = base(tmp_path, "mixtral", modules_to_not_convert=("experts",))
    options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    losses = train(peft.get_peft_model(model, lora(**options)))
    assert losses[-1] < losses[0]


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def test_the_trainer_trains_lora_and_goes_on_where_it_stopped(folder, tmp_path):
    rows = torch.randint(3, 64, (16, 9), generator=torch.Generator().manual_seed(1))

    def run(out, resume=None, stop=None):
        torch.manual_seed(0)
        model = peft.get_peft_model(tf.LlamaForCausalLM.from_pretrained(folder), lora(init_lora_weights=False))
        settings = tf.TrainingArguments(
            output_dir=str(out), max_steps=4, per_device_train_batch_size=2, save_steps=2, learning_rate=0.01,
            logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=0, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = tf.Trainer(model=model, args=settings, train_dataset=_Rows(rows))
        trainer.remove_callback(tf.PrinterCallback)
        if stop:
            trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=resume)
        return {name: held.detach().clone() for name, held in model.named_parameters() if "lora_" in name}

    class Stop(tf.TrainerCallback):
        def on_step_end(self, args, state, control, **_):  # noqa: ARG002 - theirs
            control.should_training_stop = state.global_step >= 2

    whole = run(tmp_path / "whole")
    run(tmp_path / "half", stop=Stop())
    resumed = run(tmp_path / "half", resume=str(tmp_path / "half/checkpoint-2"))
    assert all(torch.equal(held, resumed[name]) for name, held in whole.items())
