"""`VGPUStack.plan`: what it says is what `attach` does, and its times are what the rates make of the bytes."""

import pytest
import torch
from torch import nn

from apt_model.core.errors import CapacityError, ConfigError
from apt_model.core.system import get_device_manager
from apt_model.modeling.apt_model import APTModel, APTModelConfiguration
from apt_model.optimization import FP4Config, VGPUStack, quantize
from apt_model.vgpu import rates
from apt_model.vgpu.modules import tree_of
from apt_model.vgpu.windows import find
from apt_model.vgpu.work import Facts, facts_of, seconds, work_of


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("APT_PLAN_CACHE", str(tmp_path / "kept"))


def blocks(width=128, depth=6):
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(width, 4 * width), nn.Linear(4 * width, width)) for _ in range(depth))
    )


def nbytes(model):
    return sum(parameter.nbytes for parameter in model.parameters())


def levels(model, share, host=None, disk=None):
    made = [{"capacity_mb": share * nbytes(model) / 1e6, "device": "cpu"}]
    if host is not None:
        made.append({"capacity_mb": host * nbytes(model) / 1e6, "device": "cpu", "speed_gbps": 10})
    if disk is not None:
        made.append({"capacity_mb": disk * nbytes(model) / 1e6 + 4, "device": "ssd", "speed_gbps": 2})
    return {"levels": made}


@pytest.mark.parametrize(("host", "disk"), [(2, None), (0.6, 2), (None, 2)])
def test_what_is_planned_is_what_is_then_held(host, disk):
    model = blocks()
    with VGPUStack(levels(model, 0.6, host, disk)) as stack:
        said = stack.plan(model, 16)
        assert [each["used_mb"] for each in stack.stats()["levels"]] == [0] * len(said.levels)
        assert all(parameter.__class__ is nn.Parameter for parameter in model.parameters())
        stack.attach(model)
        held = [each["used_mb"] for each in stack.stats()["levels"]]
        assert held == pytest.approx([each["planned_mb"] for each in said.levels])
        before = stack.stats()["levels"][0]["bytes_in"]
        with torch.no_grad():
            for _ in range(20):
                model(torch.ones(1, 128))
        moved = stack.stats()["levels"][0]["bytes_in"] - before
        ahead = said.slots * nbytes(model) / len(model)  # copies for the next pass, which wait for the disk's reads
        assert moved == pytest.approx(20 * said.streamed_mb * 1e6, rel=0.02, abs=ahead if disk and host else None)


def test_the_times_are_bytes_over_rates():
    model = blocks()
    with VGPUStack(levels(model, 0.6, 0.6, 2)) as stack:
        said = stack.plan(model, 7)
    # Whole pages are planned, and what is in them is copied.
    assert said.link_s == pytest.approx(said.streamed_mb * 1e6 / 10e9, rel=0.02)
    # What a stage still has is not read again.
    assert 0 < said.disk_s <= said.levels[2]["planned_mb"] * 1e6 / 2e9
    parts = {"compute": said.compute_s, "link": said.link_s, "disk": said.disk_s}
    assert said.bound == max(parts, key=parts.get)
    # A CPU copies and computes in turns, and waits for what the disk has not read meanwhile.
    assert max(said.compute_s + said.link_s, said.disk_s) <= said.pass_s * 1.000001
    assert said.pass_s <= sum(parts.values()) * 1.000001
    assert f"bound by {said.bound}" in str(said)


def test_more_tokens_hide_the_copies():
    model = blocks()
    with VGPUStack(levels(model, 0.6, 2)) as stack:
        enough = stack.plan(model, 1).tokens_for_slow_down
        assert enough > 1
        # What is not kept is measured anew by each plan, so that the figures of two plans differ.
        assert [stack.plan(model, tokens).pass_s > 0 for tokens in (1, enough)] == [True, True]


def test_a_model_that_fits_streams_nothing():
    model = blocks()
    with VGPUStack(levels(model, 1.2, 1)) as stack:
        said = stack.plan(model, 3)
    assert (said.streamed_mb, said.link_s, said.bound, said.tokens_for_slow_down) == (0, None, "compute", None)


def test_rates_that_are_not_given_are_measured():
    model = blocks()
    config = levels(model, 0.6, 0.6, 2)
    for level in config["levels"]:
        level.pop("speed_gbps", None)
    config["levels"][1]["capacity_mb"] += 300
    config["levels"][2]["capacity_mb"] += 10
    with VGPUStack(config) as stack:
        assert stack.plan(model, 1).link_s > 0
        assert [each["used_mb"] for each in stack.stats()["levels"]] == [0, 0, 0]
        config["levels"][1]["capacity_mb"] -= 300
    with VGPUStack(config) as stack:
        assert stack.plan(model, 1).disk_s > 0
        assert len(stack._memory.store) == 0


def test_packed_weights_count_as_what_they_stand_for():
    model = blocks(256, 2)

    def operations():
        found = work_of(tree_of(model), Facts(), 4)
        return sum(product.numel for product in found.products), {product.fp4 for product in found.products}

    assert operations()[1] == {False}
    dense = operations()[0]
    quantize(model, FP4Config(skip=()))
    assert operations() == (dense, {True})


def test_rates_that_were_kept_are_taken(kept):
    model = blocks()
    device = get_device_manager("cpu").name()
    kept_rates = {"F32": ((1, 0.5),)}
    rates.keep(rates.Rates(device=f"{device}, torch x", kind="cpu", products=kept_rates, link_gbps=3.0))
    config = levels(model, 0.6, 2)
    with VGPUStack(config) as stack:
        said = stack.plan(model, 5)
        assert said.link_s == pytest.approx(said.streamed_mb * 1e6 / 10e9, rel=0.02)  # the level's own goes first
        assert said.compute_s == pytest.approx(2 * 5 * sum(p.numel() for p in model.parameters() if p.dim() > 1) / 5e11)
    del config["levels"][1]["speed_gbps"]
    with VGPUStack(config) as stack:
        assert stack.plan(model, 5).link_s == pytest.approx(said.streamed_mb * 1e6 / 3e9, rel=0.02)
        rates.keep(rates.Rates(device="another one", kind="cpu", products=kept_rates, link_gbps=3.0))
        assert stack.plan(model, 5).compute_s != said.compute_s


def test_probes_stay_within_the_levels():
    model = blocks()
    with VGPUStack(levels(model, 0.6, 1.2, 2)) as stack:
        stack.plan(model, 1)
        for level in stack.stats()["levels"]:
            assert level["peak_mb"] <= level["capacity_mb"]


def test_the_length_of_sequences_counts():
    config = APTModelConfiguration(
        vocab_size=64, d_model=64, num_heads=4, d_ff=128, num_decoder_layers=2, decoder_only=True
    )
    model = APTModel(config)
    found = [work for window in find(tree_of(model), 10**9).windows if (
        work := work_of(window.node, facts_of(config.to_dict()), 4)).attention]  # fmt: skip
    assert [work.attention for work in found] == [((64, True),)] * 2
    machine = rates.Rates(products={"F32": ((1, 1.0),)}, attention_tflops=1.0)
    short, long = (seconds(found[0], 64, length, machine, 1)[0] for length in (16, 64))
    assert long - short == pytest.approx(2 * 64 * (64 - 16) * 64 / 1e12)


def test_what_cannot_be_planned():
    model = blocks()
    with VGPUStack(levels(model, 0.01, 1)) as stack:
        with pytest.raises(CapacityError, match="give level 1 at least"):
            stack.plan(model)
        with pytest.raises(ConfigError, match="tokens: expected a whole number above 0"):
            stack.plan(model, 0)
        with pytest.raises(ConfigError, match="length: expected a whole number above 0"):
            stack.plan(model, 1, length=-1)
