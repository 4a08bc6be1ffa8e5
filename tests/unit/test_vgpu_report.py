"""`VGPUStack.plan`: what it says is what `attach` does, and its times are what the rates make of the bytes."""

import pytest
import torch
from torch import nn

from apt_model.core.errors import CapacityError, ConfigError
from apt_model.optimization import FP4Config, VGPUStack, quantize


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
    assert said.link_s == pytest.approx(said.streamed_mb * 1e6 / 10e9)
    assert said.disk_s == pytest.approx(said.levels[2]["planned_mb"] * 1e6 / 2e9)
    assert said.pass_s == max(said.compute_s, said.link_s, said.disk_s)
    assert (
        said.bound
        == max(("compute", said.compute_s), ("link", said.link_s), ("disk", said.disk_s), key=lambda e: e[1])[0]
    )
    assert f"bound by {said.bound}" in str(said)
    per_token = said.compute_s / 7
    assert said.tokens_for_slow_down * per_token * 1.15 == pytest.approx(
        max(said.link_s, said.disk_s), abs=1.2 * per_token
    )


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
    from apt_model.vgpu.report import _operations

    dense = _operations(model)
    packed = _operations(quantize(model, FP4Config(skip=())))
    assert packed == pytest.approx(dense, rel=0.01)


def test_what_cannot_be_planned():
    model = blocks()
    with VGPUStack(levels(model, 0.01, 1)) as stack:
        with pytest.raises(CapacityError, match="give level 1 at least"):
            stack.plan(model)
        with pytest.raises(ConfigError, match="above 0"):
            stack.plan(model, 0)
