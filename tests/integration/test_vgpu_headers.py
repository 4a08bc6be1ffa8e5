"""A plan from a saved model's headers is the plan of the model that is loaded from them."""

# ruff: noqa: E402 - what needs an extra is imported after the skip

import math

import pytest
import torch

tf = pytest.importorskip("transformers", reason="needs the extra hf")

import hf_models
import small_models
from test_vgpu_zoo import ZOO

from apt_model.core.errors import CapacityError, ConfigError
from apt_model.core.fp4_storage import CONFIG_FILE
from apt_model.core.tensor_folders import open_folder, read_json
from apt_model.modeling.apt_model import APTModel
from apt_model.optimization import FP4Config, VGPUStack, quantize
from apt_model.vgpu.headers import outline
from apt_model.vgpu.layout import lay_out
from apt_model.vgpu.modules import buffer_bytes, tree_of
from apt_model.vgpu.planner import Capacities
from apt_model.vgpu.saved_names import Saved, fused, ties
from apt_model.vgpu.units import padded
from apt_model.vgpu.work import facts_of, work_of

pytestmark = pytest.mark.usefixtures("quiet_vgpu")
EQUAL = ["gpt2", "llama", "llama tied", "mixtral", "t5", "bert", "apt seq2seq", "apt causal"]
MORE = {"qwen_moe": hf_models.qwen_moe, "apt tied": lambda: small_models.model_for("causal", tie_word_embeddings=True)}
MODELS = {**{name: ZOO[name][0] for name in EQUAL}, **MORE}
SHARES = (0.15, 0.3, 0.5, 0.7, 0.9, 1.5)


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    tf.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder, its headers and the model that is loaded from it, by name; each made once."""
    made = {}

    def give(name, dtype=torch.float32):
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp("saved")
            model = MODELS[name]().to(dtype)
            model.save_pretrained(folder)
            made[name, dtype] = folder
        folder = made[name, dtype]
        kind = APTModel if "apt" in name else type(MODELS[name]())
        return folder, kind.from_pretrained(folder)

    return give


def headers_of(folder):
    entries = open_folder(folder).entries
    return {name: Saved(each.dtype, each.shape) for name, each in entries.items()}, read_json(folder / CONFIG_FILE)


def planned(root, buffers, capacities, slots=3):
    """Sizes, homes, slots, and bytes of each level; or that it is refused, and what would do."""
    try:
        made = lay_out(root, buffers, capacities, slots)
    except CapacityError as error:
        return error.remedy
    blocks = [(blob.nbytes, home) for blob, home in zip(made.blobs, made.plan.homes, strict=True)]
    return blocks, made.needs, made.plan


def all_capacities(total):
    for share in SHARES:
        yield Capacities(device=int(share * total), host=9 * total)
        yield Capacities(device=int(share * total), host=int(0.2 * total), disk=9 * total)


@pytest.mark.parametrize("form", [None, "nvfp4", "mxfp4"])
@pytest.mark.parametrize("name", MODELS)
def test_the_plan_is_that_of_the_loaded_model(saved, name, form):
    folder, model = saved(name)
    if form is not None:
        # Of a gate of one row the rule on names says a router, and the model a linear layer.
        skip = ("lm_head", "shared_expert_gate") if name == "qwen_moe" else ("lm_head",)
        quantize(model, FP4Config(format=form, skip=skip), report=lambda _: None)
    tensors, config = headers_of(folder)
    said = outline(tensors, config, quantize=form)
    root, buffers = tree_of(model), buffer_bytes(model)
    assert said.root.nbytes == root.nbytes
    assert said.buffers == buffers
    for capacities in all_capacities(root.nbytes):
        assert planned(said.root, said.buffers, capacities) == planned(root, buffers, capacities)


@pytest.mark.parametrize("name", ["llama tied", "bert", "t5", "gpt2"])
def test_it_is_what_a_stack_plans_with_the_same_names(saved, name):
    folder, model = saved(name)
    said = outline(*headers_of(folder))
    total = tree_of(model).nbytes
    levels = [{"capacity_mb": 0.5 * total / 1e6, "device": "cpu"}, {"capacity_mb": 9 * total / 1e6, "device": "cpu"}]
    with VGPUStack({"levels": levels}) as stack:
        theirs = stack._layout(model)
        mine = lay_out(said.root, said.buffers, stack._memory.capacities(), 3)
        assert mine.plan == theirs.plan
        assert [blob.name for blob in mine.blobs] == [blob.name for blob in theirs.blobs]
        made = stack.plan(model)
        assert [each["planned_mb"] for each in made.levels] == [
            each / 1e6 for each in (mine.plan.device_bytes, mine.plan.host_bytes)
        ]


@pytest.mark.parametrize("name", EQUAL)
def test_what_is_computed_is_the_same_too(saved, name):
    folder, model = saved(name)
    tensors, config = headers_of(folder)
    mine, theirs = (
        work_of(root, facts_of(found), 4)
        for root, found in ((outline(tensors, config).root, config), (tree_of(model), model.config.to_dict()))
    )
    assert sum(each.numel for each in mine.products) == sum(each.numel for each in theirs.products)
    assert sorted(mine.attention) == sorted(theirs.attention)
    assert mine.attention
    assert (mine.traffic, mine.chained) == (theirs.traffic, theirs.chained)
    assert mine.launches == theirs.launches


def test_of_others_sizes_are_right_and_their_order_is_a_guess(tmp_path):
    model = ZOO["whisper"][0]()
    model.save_pretrained(tmp_path)
    said, root = outline(*headers_of(tmp_path)), tree_of(model)
    assert said.root.nbytes == root.nbytes
    buffers = buffer_bytes(model)
    assert said.buffers == buffers
    for share in (0.5, 0.7):
        capacities = Capacities(device=int(share * root.nbytes), host=9 * root.nbytes)
        mine, theirs = (lay_out(each, buffers, capacities, 3) for each in (said.root, root))
        assert sorted(blob.nbytes for blob in mine.blobs) == sorted(blob.nbytes for blob in theirs.blobs)
        assert mine.plan.slot_bytes == theirs.plan.slot_bytes
        assert mine.plan.device_bytes == pytest.approx(theirs.plan.device_bytes, rel=0.01)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_floats_are_counted_in_the_type_in_which_they_are_loaded(saved, name):
    folder, model = saved(name)
    said = outline(*headers_of(folder), dtype="BF16")
    assert said.dtype == "BF16"
    assert said.root.nbytes == tree_of(model.bfloat16()).nbytes
    assert said.root.nbytes == outline(*headers_of(saved(name, torch.bfloat16)[0])).root.nbytes


def test_our_own_folders_of_4_bit_weights(saved, tmp_path):
    from apt_model.cli.main import main

    folder, _ = saved("llama")
    assert main(["quantize", str(folder), "--out", str(tmp_path / "fp4"), "--layout", "apt", "--quiet"]) == 0
    tensors, config = headers_of(tmp_path / "fp4")
    written, asked = outline(tensors, config), outline(*headers_of(folder), quantize="nvfp4")
    assert written.fp4
    assert written.root.nbytes == asked.root.nbytes
    capacities = Capacities(device=written.root.nbytes // 2, host=9 * written.root.nbytes)
    assert planned(written.root, written.buffers, capacities) == planned(asked.root, asked.buffers, capacities)
    with pytest.raises(ConfigError, match="4-bit weights already"):
        outline(tensors, config, quantize="nvfp4")


def test_what_files_of_older_versions_have_too_much(saved):
    tensors, config = headers_of(saved("gpt2")[0])
    extra = {
        "transformer.h.0.attn.bias": Saved("F32", (1, 1, 64, 64)),
        "transformer.h.0.attn.masked_bias": Saved("F32", ()),
        "lm_head.weight": tensors["transformer.wte.weight"],
    }
    config = {**config, "tie_word_embeddings": True}
    assert outline({**tensors, **extra}, config).root.nbytes == outline(tensors, config).root.nbytes
    untied = outline({**tensors, **extra}, {**config, "tie_word_embeddings": False})
    assert untied.root.nbytes - outline(tensors, config).root.nbytes == 4 * math.prod(extra["lm_head.weight"].shape)


def test_of_a_model_whose_modules_are_called_otherwise_only_the_bytes_are_right(tmp_path):
    model = ZOO["vit"][0]()
    model.save_pretrained(tmp_path)
    assert outline(*headers_of(tmp_path)).root.nbytes == tree_of(model).nbytes


def test_buffers_in_files_stay_on_level_1():
    tensors = {"norm.weight": Saved("F32", (8,)), "norm.running_mean": Saved("F32", (8,))}
    said = outline(tensors, {})
    assert (said.root.nbytes, said.buffers) == (32, 32)


def test_experts_that_differ_are_left_one_by_one():
    names = [f"m.experts.{i}.{part}.weight" for i in range(2) for part in ("w1", "w2", "w3")]
    alike = {name: Saved("F32", (4, 8) if "w2" not in name else (8, 4)) for name in names}
    assert {name: each.shape for name, each in fused(alike).items()} == {
        "m.experts.gate_up_proj": (2, 8, 8), "m.experts.down_proj": (2, 8, 4),
    }  # fmt: skip
    other = {**alike, names[0]: Saved("F32", (5, 8))}
    assert fused(other) == other


def test_a_tie_of_other_shape_is_none():
    tensors = {"embed_tokens.weight": Saved("F32", (8, 4)), "lm_head.weight": Saved("F32", (9, 4))}
    assert list(ties(tensors, {"tie_word_embeddings": True})) == []


def test_buffers_are_padded_as_in_a_stack(saved):
    folder, model = saved("llama")
    said = outline(*headers_of(folder))
    made = lay_out(said.root, said.buffers, Capacities(device=10**9), 3)
    assert made.buffers == padded(buffer_bytes(model))
