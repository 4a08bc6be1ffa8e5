"""Blocks whose order cannot be foreseen: what stays on level 1, what moves, and that results are the same."""

import copy
import random

import pytest
import torch
from small_models import noise
from torch import nn

from apt_model.core.errors import ConfigError
from apt_model.optimization import VGPUStack
from apt_model.vgpu.planner import DEVICE, Blob, Capacities, plan
from apt_model.vgpu.policy import FREQUENCY, LRU, Usage

pytestmark = pytest.mark.usefixtures("quiet_vgpu")
WIDTH, EXPERTS = 32, 8
BELOW = {"host": ["cpu"], "disk": ["ssd"]}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(EXPERTS)
        )

    def forward(self, x, chosen):
        x = x + self.mix(self.norm(x))
        for number in chosen:
            x = x + self.experts[number](x)
        return x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x, route):
        for layer, chosen in zip(self.layers, route, strict=True):
            x = layer(x, chosen)
        return x


def routes(count):
    """Some experts are met far more often than others, as in models that were trained."""
    generator = random.Random(0)
    return [[sorted({min(EXPERTS - 1, int(generator.paretovariate(1.0)) - 1) for _ in range(2)}) for _ in range(4)]
            for _ in range(count)]  # fmt: skip


def made():
    torch.manual_seed(0)
    return Model().eval()


def stack_for(model, policy, layout="host", share=0.4):
    size = sum(each.nbytes for each in model.parameters()) / 1e6
    levels = [(size * share, "cpu"), *((size * 2, device) for device in BELOW[layout])]
    config = {"levels": [{"capacity_mb": amount, "device": device} for amount, device in levels], "policy": policy}
    return VGPUStack(config)


X = noise(3, WIDTH, seed=2)


@pytest.mark.parametrize("layout", BELOW)
@pytest.mark.parametrize("policy", ["cyclic", LRU, FREQUENCY])
def test_the_same_results(policy, layout):
    model = made()
    with torch.no_grad():
        wanted = [model(X, route) for route in routes(30)]
        with stack_for(model, policy, layout) as stack:
            stack.attach(model)
            for route, expected in zip(routes(30), wanted, strict=True):
                assert torch.equal(model(X, route), expected)
            first = stack.stats()["levels"][0]
            assert first["peak_mb"] <= first["capacity_mb"]


@pytest.mark.parametrize("policy", [LRU, FREQUENCY])
def test_gradients(policy):
    model, dense = made(), made()
    with stack_for(model, policy) as stack:
        stack.attach(model)
        for route in routes(3):
            for each in (model, dense):
                each(X, route).square().mean().backward()
        for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def test_what_is_used_often_stays_and_less_is_moved():
    moved = {}
    for policy in ("cyclic", LRU, FREQUENCY):
        model = made()
        with stack_for(model, policy) as stack, torch.no_grad():
            stack.attach(model)
            for route in routes(60):
                model(X, route)
            first = stack.stats()["levels"][0]
            moved[policy] = first["bytes_in"]
            if policy == FREQUENCY:
                assert first["hit_rate"] > 0.5
    assert moved[FREQUENCY] < moved[LRU] < moved["cyclic"]


@pytest.mark.parametrize("policy", [LRU, FREQUENCY])
def test_nothing_is_brought_ahead_and_experts_that_are_not_met_are_never(policy):
    model = made()
    with stack_for(model, policy, share=0.6) as stack, torch.no_grad():
        stack.attach(model)
        assert stack.stats()["levels"][0]["bytes_in"] == 0
        for _ in range(3):  # the same experts: after the first pass all that is met is there
            model(X, [[0]] * 4)
        held = stack._models[id(model)]
        met = {blob.name for i, blob in enumerate(held.blobs) if i in held.places.where}
        assert met
        assert not [name for name in met if ".experts." in name and ".experts.0" not in name]
        first = stack.stats()["levels"][0]
        assert first["bytes_in"] == sum(held.blobs[i].nbytes for i in held.places.where)
        assert first["evictions"] == 0


def test_the_one_used_longest_ago_makes_room():
    blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(6)).eval()
    size = blocks[0].weight.nbytes
    config = {"levels": [{"capacity_mb": 3 * size / 1e6, "device": "cpu"}, {"capacity_mb": 1, "device": "cpu"}],
              "policy": LRU}  # fmt: skip
    with VGPUStack(config) as stack, torch.no_grad():
        stack.attach(blocks)
        places = stack._models[id(blocks)].places
        for number in (0, 1, 2, 0, 3):
            blocks[number](X)
        assert sorted(places.where) == [0, 2, 3]
        blocks[1](X)
        assert sorted(places.where) == [0, 1, 3]


def test_counts_are_forgotten_in_time():
    usage = Usage(FREQUENCY)
    for _ in range(50):
        usage.used(1)
    for _ in range(200):
        usage.used(2)
    for _ in range(8):
        usage.used(3)
    assert usage.worth(1) < usage.worth(3) < usage.worth(2)
    recent = Usage(LRU)
    for blob in (1, 1, 1, 2):
        recent.used(blob)
    assert recent.worth(1) < recent.worth(2)


def test_level_1_is_all_slots():
    blobs = [Blob(name=str(i), nbytes=4096) for i in range(20)]
    capacities = Capacities(device=10 * 4096 + 100, host=10**6)
    made = plan(blobs, capacities, cached=True)
    assert (made.slots, made.homes.count(DEVICE)) == (10, 0)
    assert plan(blobs, capacities).slots == 3
    assert plan(blobs[:5], capacities, cached=True).homes == (DEVICE,) * 5


def test_a_plan_says_no_time_for_an_order_that_nobody_knows():
    model = made()
    with stack_for(model, LRU) as stack:
        report = stack.plan(model, tokens=8)
        assert report.slots > 3
        assert (report.pass_s, report.link_s, report.bound, report.tokens_for_slow_down) == (None,) * 4
        assert "blocks come in an order that is not known" in str(report)
        before = copy.deepcopy(stack.stats())
        stack.attach(model)
        assert stack.stats()["levels"][0]["used_mb"] == pytest.approx(report.levels[0]["planned_mb"])
        assert before["levels"][0]["used_mb"] == 0


def test_policies_that_do_not_exist():
    with pytest.raises(ConfigError, match="'cyclic' or 'lru' or 'frequency'"):
        VGPUStack({"levels": [{"capacity_mb": 1, "device": "cpu"}], "policy": "fifo"})
