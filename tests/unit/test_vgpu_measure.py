"""Rates of the machine that runs this: all that there are, in the memory that was given, and nothing left behind."""

import dataclasses

import pytest
import torch

from apt_model.core.system import get_device_manager
from apt_model.vgpu import machine, measure
from apt_model.vgpu.headers import outline
from apt_model.vgpu.rates import UNKNOWN, Rates
from apt_model.vgpu.saved_names import Saved
from apt_model.vgpu.work import Facts, chain_bytes, facts_of, seconds, work_of

CPU = get_device_manager("cpu")


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    monkeypatch.setattr(measure, "_SECONDS_CPU", 0.002)
    monkeypatch.setattr(measure, "_ROWS_CPU", (1, 16))
    monkeypatch.setattr(measure, "_TURNS_CPU", 4 << 20)
    monkeypatch.setattr(measure, "_PROBE", 1 << 20)


@pytest.mark.usefixtures("quiet_vgpu")
def test_all_rates_of_a_machine(tmp_path):
    found = machine.measure(CPU, ["F32"], str(tmp_path / "disk"))
    assert found.kind == "cpu"
    assert CPU.name() in found.device
    assert list(found.products) == ["F32"]
    assert [rows for rows, _ in found.products["F32"]] == [1, 16]
    assert len(found.fp4_products) == 2
    assert list(found.narrow_products) == ["F32", "FP4"]
    assert found.numels == (128**2, 512**2)
    rates = (
        found.link_gbps, found.disk_gbps, found.memory_gbps, found.chain_gbps, found.attention_tflops, found.launch_s
    )  # fmt: skip
    assert all(rate > 0 for rate in rates)
    assert found.hook_s >= 0
    assert not list((tmp_path / "disk").glob("*.blob"))


def test_less_room_means_smaller_probes(monkeypatch):
    made = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: made.append(shape) or randn(*shape, **options))
    for room in (10**6, 10**8):
        made.clear()
        measure.Probe(CPU, room, 1e-4).products(torch.float32)
        assert sum(4 * rows * columns for rows, columns in made) <= room
        largest = max(rows for rows, _ in made)
        assert largest == (128 if room == 10**6 else 512)


def test_a_tiny_block_counts_as_one_of_llamas():
    """launch_s is of a kernel as `work` counts them: both count the same for the same block."""
    names = {"q_proj": "self_attn.", "k_proj": "self_attn.", "v_proj": "self_attn.", "o_proj": "self_attn.",
             "gate_proj": "mlp.", "up_proj": "mlp.", "down_proj": "mlp."}  # fmt: skip
    tensors = {f"{owner}{name}.weight": Saved("F32", (64, 64)) for name, owner in names.items()}
    tensors |= {f"{name}.weight": Saved("F32", (64,)) for name in ("input_layernorm", "post_attention_layernorm")}
    theirs = work_of(outline(tensors, {}).root, Facts(rotary=True), 4)
    mine = work_of(measure.tree_of(measure._Tiny()), Facts(rotary=True), 4)
    assert (mine.launches, mine.traffic, mine.chained) == (theirs.launches, theirs.traffic, theirs.chained)
    # Seven products, two norms of six kernels and a sum, two rotations of five, attention and its copy, a gate of two.
    assert mine.launches == 7 + 2 * (6 + 1) + 2 * 5 + 3 + 1 + 2


LLAMA = {"hidden_size": 64, "num_attention_heads": 4, "architectures": ["LlamaForCausalLM"]}
MACHINE = Rates(products={"F32": ((1, 1.0),)}, fp4_products=((1, 2.0),), memory_gbps=1.0, attention_tflops=1.0)


def test_a_product_is_two_operations_a_weight_and_at_least_its_bytes():
    work = work_of(outline({"a.weight": Saved("F32", (1000, 100))}, {}).root, Facts(), 4)
    assert seconds(work, 10**6, 1, MACHINE, 1)[0] == pytest.approx(2 * 100_000 * 10**6 / 1e12)
    assert seconds(work, 1, 1, MACHINE, 1)[0] == pytest.approx(400_000 / 1e9)


def test_causal_attention_is_half():
    tensors = {"q_proj.weight": Saved("F32", (64, 64))}
    root = outline(tensors, {}).root
    machine_ = Rates(products={"F32": ((1, 1.0),)}, attention_tflops=1.0)
    causal, whole = (
        seconds(work_of(root, facts_of({**LLAMA, "architectures": [name]}), 4), 8, 8, machine_, 1)[0]
        for name in ("LlamaForCausalLM", "BertModel")
    )
    assert whole - causal == pytest.approx(2 * 8 * 8 * 64 / 1e12)


def test_experts_are_read_as_far_as_tokens_meet_them():
    tensors = {
        "mlp.experts.gate_up_proj": Saved("F32", (8, 32, 16)),
        "mlp.experts.down_proj": Saved("F32", (8, 16, 16)),
    }
    work = work_of(outline(tensors, {}).root, Facts(top_k=2), 4)
    nbytes = 4 * (8 * 32 * 16 + 8 * 16 * 16)
    machine_ = Rates(products={"F32": ((1, 1e6),)}, memory_gbps=1.0)
    quiet = work._replace(traffic=0.0, chained=0.0)
    assert seconds(quiet, 1, 1, machine_, 2)[0] == pytest.approx(nbytes / 1e9 * (1 - (7 / 8) ** 2))
    assert seconds(quiet, 10**4, 1, machine_, 2)[0] == pytest.approx(nbytes / 1e9)


def test_layers_between_two_widths_are_between_their_rates():
    rates = Rates(
        products={"F32": ((1, 4.0),)}, fp4_products=((1, 8.0),), numels=(100, 10_000),
        narrow_products={"F32": ((1, 1.0),), "FP4": ((1, 2.0),)},
    )  # fmt: skip

    def rate(numel, *, fp4=False):
        return 2 * numel / rates.product_s(1, numel, "F32", fp4=fp4) / 1e12

    assert [rate(numel) for numel in (10, 100, 1000, 10_000, 10**6)] == pytest.approx([1, 1, 2, 4, 4])
    assert rate(1000, fp4=True) == pytest.approx(4)


def test_norms_and_rotary_embeddings_have_a_rate_of_their_own():
    tensors = {"norm.weight": Saved("F32", (64,)), "q_proj.weight": Saved("F32", (64, 64))}
    work = work_of(outline(tensors, {}).root, Facts(rotary=True), 4)
    assert work.chained == 64 * chain_bytes(4)
    slow = dataclasses.replace(MACHINE, chain_gbps=0.5)
    more = seconds(work, 10, 1, slow, 1)[0] - seconds(work, 10, 1, MACHINE, 1)[0]
    assert more == pytest.approx(10 * work.chained / 1e9)


def test_of_weights_that_others_quantised_no_time_is_said():
    work = work_of(
        outline({"a.qweight": Saved("I32", (8, 64)), "a.scales": Saved("F16", (2, 64))}, {}).root, Facts(), 2
    )
    assert [product.dtype for product in work.products] == [UNKNOWN]
    assert seconds(work, 1, 1, MACHINE, 1) is None


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_packed_weights_have_a_rate_of_their_own(form):
    root = outline({"up.weight": Saved("F32", (512, 256))}, {}, quantize=form).root
    work = work_of(root, Facts(), 4)
    assert [product.numel for product in work.products] == [512 * 256]
    assert seconds(work, 10**6, 1, MACHINE, 1)[0] == pytest.approx(2 * 512 * 256 * 10**6 / 2e12)
    assert seconds(work, 1, 1, Rates(products=MACHINE.products), 1) is None
