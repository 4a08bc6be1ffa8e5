"""What the modes do to any module on this machine's CPU, and that all of it is taken back."""

import copy
import gc
import inspect
import logging
import types
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import apt_model.optimization.vb_global as vb
from apt_model.core.errors import CapacityError, ConfigError
from apt_model.core.policy import Policy
from apt_model.core.system.cpu import CpuDevice
from apt_model.layers.fp4_linear import FusedFP4Linear
from apt_model.optimization import four_bits, product_speed
from apt_model.optimization.blocks import blocks_of
from apt_model.optimization.decision import decide

WIDTH = 32


@pytest.fixture(autouse=True)
def _disabled(monkeypatch):
    monkeypatch.setenv("APT_DEVICE", "cpu")
    vb.disable()
    yield
    vb.disable()


class Block(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Tower(nn.Module):
    def __init__(self, depth=4):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.lm_head = nn.Linear(WIDTH, 50)
        self.register_buffer("lasting", torch.ones(3))
        self.register_buffer("passing", torch.ones(3), persistent=False)

    def forward(self, ids, *, scale: float = 1.0):
        """What the tower says."""
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x) * scale


IDS = torch.arange(12).view(2, 6)
MODES = {
    "balanced": vb.enable_balanced_mode,
    "speed": vb.enable_speed_mode,
    "memory": vb.enable_memory_mode,
    "full": vb.enable_full_optimization,
}


def state(model):
    """Everything of a model that one can look at."""
    return {
        "class": type(model),
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "attributes": {
            name: {
                key: (value if isinstance(value, (int, bool, str, type(None))) else id(value))
                for key, value in vars(module).items()
                if key not in ("_parameters", "_buffers", "_modules", "calls")
            }
            for name, module in model.named_modules()
        },
        "parameters": [
            (name, id(each), each.dtype, each.device, each.requires_grad, each.detach().clone())
            for name, each in model.named_parameters()
        ],
        "buffers": [(name, id(each), each.dtype, each.detach().clone()) for name, each in model.named_buffers()],
        "keys": list(model.state_dict()),
    }


def torch_globals():
    hooks = {
        name: dict(value)
        for name, value in vars(torch.nn.modules.module).items()
        if name.startswith("_global_") and isinstance(value, dict)
    }
    return {
        "hooks": hooks,
        "call": nn.Module.__call__,
        "forward": nn.Linear.forward,
        "linear": F.linear,
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "seed": torch.get_rng_state().tolist(),
        "matmul": torch.get_float32_matmul_precision(),
        "sdpa": torch.backends.cuda.flash_sdp_enabled(),
    }


def same(one, other):
    assert one.keys() == other.keys()
    for key, left in one.items():
        if key in ("parameters", "buffers"):
            for mine, theirs in zip(left, other[key], strict=True):
                assert mine[:-1] == theirs[:-1], key
                assert torch.equal(mine[-1], theirs[-1]), mine[0]
        else:
            assert left == other[key], key
    return True


OPTIONS = {
    "as it is": {},
    "all in 4 bits": {"fp4": "on"},
    "streamed": {"stream": "on", "device_mb": 0.02, "disk_mb": 4},
    "in 4 bits and streamed": {"fp4": "on", "stream": "on", "device_mb": 0.02, "disk_mb": 4},
    "recomputed": {"activation_checkpointing": "on"},
    "bf16": {"precision": "bf16"},
    "fp32": {"precision": "fp32"},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_disable_leaves_no_trace(mode, options, training):
    model = Tower().train(training)
    model.blocks[1].requires_grad_(False)
    model.blocks[2].drop.eval()
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    before, world = state(model), torch_globals()
    MODES[mode](verbose=False, **OPTIONS[options])
    assert vb.optimize(model) is model
    state_of_random = torch.get_rng_state()
    with torch.set_grad_enabled(training and not OPTIONS[options].get("stream")):
        out = model(IDS)
    assert out.shape == (2, 6, 50)
    torch.set_rng_state(state_of_random)
    assert vb.stats()["models"]
    vb.disable()
    after = state(model)
    assert same(before, after)
    world_now = torch_globals()
    assert world_now == world
    handle.remove()
    assert not vb.stats()["models"]


def test_the_same_numbers_whatever_is_streamed_and_near_ones_in_fewer_bits():
    model = Tower().eval()
    expected = model(IDS)
    for mode, options, near in [
        ("memory", {"precision": "fp32", "stream": "on", "device_mb": 0.02, "disk_mb": 4}, 0.0),
        ("memory", {"precision": "bf16"}, 0.02),
        ("speed", {"precision": "fp32", "fp4": "off"}, 0.0),
        ("speed", {"precision": "bf16", "fp4": "off"}, 0.02),
        ("speed", {"fp4": "on"}, 0.2),
    ]:
        MODES[mode](verbose=False, **options)
        vb.optimize(model)
        found = model(IDS).float()
        gap = (found - expected).norm() / expected.norm()
        assert gap <= near, (mode, options)
        vb.disable()


def test_a_forward_keeps_its_name_its_text_and_its_signature():
    model = Tower()
    expected = inspect.signature(model.forward)
    vb.enable(verbose=False)
    vb.optimize(model)
    assert inspect.signature(model.forward) == expected
    assert model.forward.__doc__ == "What the tower says."
    assert model(IDS, scale=2.0).shape == (2, 6, 50)


def test_a_copy_is_plain_and_its_own():
    model = Tower().eval()
    vb.enable_speed_mode(verbose=False, fp4="off", precision="fp32")
    vb.optimize(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
        copied.lm_head.bias.zero_()
    assert not copied(IDS).any()
    assert model(IDS).any()
    assert not hasattr(copied.forward, "optimized")


def test_optimising_again_begins_from_the_model_as_it_was():
    model = Tower().eval()
    before = state(model)
    vb.enable_speed_mode(verbose=False, fp4="on")
    vb.optimize(model)
    assert any(isinstance(each, FusedFP4Linear) for each in model.modules())
    vb.enable_balanced_mode(verbose=False)
    vb.optimize(model)
    assert not any(isinstance(each, FusedFP4Linear) for each in model.modules())
    assert model.lm_head.weight.dtype == torch.float32
    vb.disable()
    assert same(before, state(model))


def test_a_model_that_nobody_holds_is_freed():
    model = Tower().eval()
    vb.enable_speed_mode(verbose=False)
    gone = weakref.ref(vb.optimize(model))
    del model
    gc.collect()
    assert gone() is None
    assert vb.stats() == {"models": []}
    vb.disable()


def test_training_in_balanced_mode_learns_and_keeps_what_it_learnt():
    model = Tower().train()
    vb.enable_balanced_mode(verbose=False, precision="bf16")
    vb.optimize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(IDS).float().flatten(0, 1), IDS.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    learnt = {name: each.clone() for name, each in model.state_dict().items()}
    vb.disable()
    assert all(torch.equal(each, learnt[name]) for name, each in model.state_dict().items())


def test_weights_that_were_loaded_meanwhile_are_kept():
    model = Tower().eval()
    vb.enable_speed_mode(verbose=False, fp4="off", precision="bf16")
    vb.optimize(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(0.5)
    vb.disable()
    assert model.lm_head.weight.dtype == torch.float32
    assert bool((model.lm_head.weight == 0.5).all())


def test_what_is_not_to_be_restored_takes_no_memory_and_stays():
    model = Tower().eval()
    vb.enable_speed_mode(verbose=False, fp4="on")
    vb.optimize(model, restorable=False)
    packed = model.blocks[0].up
    vb.disable()
    assert model.blocks[0].up is packed
    assert model.table.weight.dtype == torch.bfloat16


def test_host_memory_that_is_short_is_said_before_anything_is_changed(monkeypatch):
    model = Tower().eval()
    before = state(model)
    monkeypatch.setattr(CpuDevice, "free_memory", lambda _: 10)
    vb.enable_memory_mode(verbose=False, fp4="on", stream="on", device_mb=0.02, disk_mb=4)
    with pytest.raises(CapacityError, match="10 are free") as caught:
        vb.optimize(model)
    assert "restorable=False" in caught.value.remedy
    assert same(before, state(model))


def test_a_level_that_is_too_small_leaves_the_model_as_it_was():
    model = Tower().eval()
    before = state(model)
    vb.enable_memory_mode(verbose=False, stream="on", fp4="on", device_mb=0.001, disk_mb=4)
    with pytest.raises(CapacityError):
        vb.optimize(model)
    assert same(before, state(model))
    assert not vb.stats()["models"]


def test_speed_does_not_stream_and_says_who_does():
    vb.enable_speed_mode(verbose=False, device_mb=0.001)
    with pytest.raises(CapacityError, match="does not stream") as caught:
        vb.optimize(Tower().eval())
    assert "enable_full_optimization" in caught.value.remedy


# --- recomputing


def step(model):
    torch.manual_seed(3)
    model(IDS).float().square().sum().backward()
    found = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    return found


def calls(model):
    return [block.calls for block in model.blocks]


@pytest.mark.parametrize("free", [0, 2**40])
def test_recomputing_is_decided_on_the_first_block_and_changes_no_bit(free):
    model = Tower().train()
    expected = step(model)
    vb.enable_balanced_mode(verbose=False, precision="fp32")
    vb.optimize(model)
    model.forward.recompute.device = types.SimpleNamespace(free_memory=lambda: free, random_state=lambda: None)
    for number in range(2):
        before = calls(model)
        assert all(map(torch.equal, step(model), expected))
        ran = [now - then for now, then in zip(calls(model), before, strict=True)]
        assert ran[1:] == ([2, 2, 2] if free == 0 else [1, 1, 1])
        # The first block once more, when it is decided.
        assert ran[0] == (1 if free else 2 if number else 3)
    found = vb.stats()["models"][0]["recompute"]
    assert (found["shapes"], found["recomputed"]) == (1, int(free == 0))
    assert found["saved_bytes"] > 0


def test_what_a_forward_holds_is_counted():
    """Of a block: the input, the norm's mean and deviation, its output, the widened twice, the dropout's mask."""
    model = Tower().train()
    vb.enable_balanced_mode(verbose=False, precision="fp32")
    vb.optimize(model)
    model(IDS)
    tokens, wide = IDS.numel(), 2 * WIDTH
    least = 4 * tokens * (2 * WIDTH + 2 * wide) * 4
    assert least <= vb.stats()["models"][0]["recompute"]["saved_bytes"] <= 2 * least


def test_evaluation_is_not_recomputed():
    model = Tower().train()
    vb.enable_balanced_mode(verbose=False, activation_checkpointing="on")
    vb.optimize(model)
    model.eval()
    before = calls(model)
    model(IDS)
    assert [now - then for now, then in zip(calls(model), before, strict=True)] == [1, 1, 1, 1]


# --- what is decided


def test_blocks_are_those_of_the_outermost_lists():
    model = Tower()
    assert blocks_of(model) == list(model.blocks)
    assert blocks_of(model.lm_head) == [model.lm_head]
    pair = nn.ModuleDict({"a": Tower(2), "b": Tower(3)})
    assert blocks_of(pair) == [*pair["a"].blocks, *pair["b"].blocks]
    shared = nn.ModuleList([model.lm_head, model.lm_head])
    assert blocks_of(shared) == [model.lm_head]


class Writing(Tower):
    """A model that generates."""

    def generate(self):
        """Of no interest here."""


UP, DOWN = (2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH)


def measured(monkeypatch, said):
    """Products in 4 bits are as many times as fast as `said` for each shape, and take a second otherwise."""

    def speed(_device, _dtype, shape, _form, rows):
        assert len(rows) == len(said[shape])
        return product_speed.Speed((1.0,) * len(rows), tuple(1 / ratio for ratio in said[shape]))

    monkeypatch.setattr(four_bits, "speed_of", speed)
    return speed


def test_measured_layers_are_taken_where_they_win(monkeypatch):
    measured(monkeypatch, {UP: (2.0, 1.5, 1.0), DOWN: (3.0, 2.0, 0.5)})
    found = decide(Writing().eval(), Policy(mode="speed"), CpuDevice())
    assert {each.name for each in found.quantized} == {f"blocks.{number}.up" for number in range(4)}
    groups = {group.name: group for group in found.groups}
    assert groups["blocks.*.up"].treatment == "nvfp4"
    assert groups["blocks.*.up"].count == 4
    assert groups["blocks.*.up"].reason == "2.00, 1.50, 1.00 times as fast in 4 bits, measured at 1, 16, 128 rows"
    assert groups["blocks.*.down"].treatment == "as it is"
    assert groups["lm_head"].reason == "lm_head is left by default"


@pytest.mark.parametrize(
    ("up", "down", "compiles", "taken"),
    [((1.5, 1.3), (1.5, 1.3), "auto", 8), ((2.0, 1.1), (1.0, 1.0), "auto", 4), ((2.0, 1.6), (1.0, 1.0), "on", 4),
     ((2.0, 1.1), (1.0, 1.0), "on", 0), ((2.0, 1.1), (1.0, 1.0), "off", 4)],
)  # fmt: skip
def test_a_model_that_reads_is_in_4_bits_where_that_gains_more_than_compiling(monkeypatch, up, down, compiles, taken):
    # On a CPU blocks are compiled only where that is asked for.
    measured(monkeypatch, {UP: up, DOWN: down})
    found = decide(Tower().eval(), Policy(mode="speed", compile=compiles), CpuDevice())
    assert len(found.quantized) == taken
    assert ("4 bits" in {what for what, _, _ in found.steps}) == (taken == 0)
    if taken == 0:
        assert "1.33, 1.05 times as fast in all with 4 of 8 layers, measured at 128, 1024 rows" in str(found)
    assert found.compiles == (compiles == "on")


def test_what_transformers_says_of_generating_counts(monkeypatch):
    measured(monkeypatch, {UP: (2.0, 2.0), DOWN: (2.0, 2.0)})  # two rows: it reads
    model = Writing().eval()
    model.can_generate = lambda: False
    assert len(decide(model, Policy(mode="speed"), CpuDevice()).quantized) == 8


def test_the_speed_of_a_layer_is_measured_once(monkeypatch):
    monkeypatch.setattr(product_speed, "_measured", {})
    runs = []
    seconds = product_speed.Stopwatch.gpu
    monkeypatch.setattr(product_speed.Stopwatch, "gpu", lambda *works: runs.append(1) or seconds(*works))
    asked = (CpuDevice(), torch.float32, (48, 32), "nvfp4", (1, 3))
    first = product_speed.speed_of(*asked)
    assert product_speed.speed_of(*asked) == first
    assert len(runs) == 2 * 2
    assert all(ratio > 0 for ratio in first.ratios)
    product_speed.speed_of(*asked[:-1], (1,))
    assert len(runs) == 2 * 3


@pytest.mark.parametrize(("ratios", "taken"), [((2, 1.5, 1), True), ((1, 1, 1), False), ((9, 9, 0.9), False)])
def test_a_layer_is_worth_it(ratios, taken):
    assert product_speed.worth(ratios) == taken


def test_full_is_speed_or_memory_by_whether_the_model_trains():
    policy = Policy(mode="full", fp4="off")
    assert decide(Tower().eval(), policy, CpuDevice()).purpose == "inference"
    training = decide(Tower().train(), policy, CpuDevice())
    assert (training.purpose, training.recompute) == ("training", "auto")
    assert decide(Tower().train().requires_grad_(False), policy, CpuDevice()).purpose == "inference"


def test_memory_takes_what_is_frozen():
    model = Tower().train()
    model.blocks[0].requires_grad_(False)
    found = decide(model, Policy(mode="memory"), CpuDevice())
    assert [each.name for each in found.quantized] == ["blocks.0.up", "blocks.0.down"]


def test_levels_follow_the_capacities():
    model = Tower(8).eval()
    policy = Policy(mode="memory", device_mb=0.05, disk_mb=3)
    levels = decide(model, policy, CpuDevice()).levels
    assert levels == ({"device": "cpu", "capacity_mb": 0.05}, {"device": "ssd", "capacity_mb": 3})
    assert decide(model, Policy(mode="memory", device_mb=100), CpuDevice()).levels == ()


class Gpu(CpuDevice.__mro__[1]):
    """A device of 1 MB that is not there."""

    kind = "cuda"
    presence = name = total_memory = memory_allocated = peak_memory = reset_peak_memory = None
    empty_cache = synchronize = None

    def free_memory(self):
        return 100_000

    def supports_bf16(self):
        return True


@pytest.mark.parametrize(
    ("host_mb", "disk_mb", "expected"),
    [
        (None, None, ["cuda", "cpu"]),
        (0.01, None, ["cuda", "cpu", "ssd"]),
        (0.01, 0, ["cuda", "cpu"]),
        (10, 5, ["cuda", "cpu", "ssd"]),
    ],
)
def test_host_memory_comes_before_the_disk(host_mb, disk_mb, expected):
    Gpu.__abstractmethods__ = frozenset()
    found = decide(Tower(16).eval(), Policy(mode="memory", host_mb=host_mb, disk_mb=disk_mb), Gpu()).levels
    assert [level["device"] for level in found] == expected
    assert found[0]["capacity_mb"] == pytest.approx(0.07)


# --- words


def test_explain_prints_the_decision_and_returns_it(capsys):
    model = Tower().eval()
    with pytest.raises(ConfigError, match="expected an enabled mode"):
        vb.explain(model)
    vb.enable_memory_mode(verbose=False)
    before = vb.explain(model)
    out = capsys.readouterr().out
    assert out.startswith("memory mode, Tower for inference on cpu\n")
    assert "blocks.*.up" in out
    assert "4 of Linear 64 x 32, 32.0 KiB: as it is, it is trainable" in out
    assert vb.optimize(model)
    assert vb.explain(model) == before
    model.requires_grad_(False)
    vb.optimize(model)
    assert "nvfp4, it is frozen" in str(vb.explain(model))


def test_options_are_those_of_the_policy():
    with pytest.raises(ConfigError, match="Policy has no option 'fp8'") as caught:
        vb.enable_speed_mode(verbose=False, fp8="on")
    assert "fp4" in caught.value.remedy
    assert not vb.is_enabled()
    with pytest.raises(ConfigError, match=r"Policy\.device_mb: expected None or a number above 0, got -1"):
        vb.enable_memory_mode(verbose=False, device_mb=-1)


def test_compiled_blocks_that_fail_are_run_as_they_are(monkeypatch, caplog):
    model = Tower().eval()

    def refuses(block, **_):
        def call(*args, **kwargs):
            from torch._dynamo.exc import InternalTorchDynamoError

            raise InternalTorchDynamoError("no compiler here")

        block._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", refuses)
    expected = model(IDS)
    vb.enable_speed_mode(verbose=False, compile="on", fp4="off", precision="fp32")
    vb.optimize(model)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model(IDS), expected)
    assert "torch.compile of the blocks failed, they are run without it: no compiler here" in caplog.text
    assert all(block._compiled_call_impl is None for block in model.blocks)


def test_an_error_of_the_model_itself_is_its_own():
    model = Tower().eval()
    vb.enable_speed_mode(verbose=False, fp4="off")
    vb.optimize(model)
    with pytest.raises(IndexError):
        model(torch.tensor([[99]]))
    assert model(IDS).shape == (2, 6, 50)


def test_fp32_inputs_are_cast_with_the_weights():
    class Floats(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, shift=None):
            return self.second(self.first(x)) + (0 if shift is None else shift)

    model = Floats().eval()
    vb.enable_speed_mode(verbose=False, precision="bf16", fp4="off")
    vb.optimize(model)
    assert model(torch.randn(2, 8), shift=torch.randn(2, 8)).dtype == torch.bfloat16


def test_a_block_that_is_given_a_cache_is_run_as_it_is(monkeypatch):
    class Cached(Block):
        def forward(self, x, **_):
            return super().forward(x)

    model = nn.ModuleDict({"blocks": nn.ModuleList(Cached() for _ in range(2))})
    model.forward = lambda x, **options: model["blocks"][1](model["blocks"][0](x, **options), **options)
    compiled = []

    def compiles(block, **_):
        block._compiled_call_impl = lambda *args, **kwargs: compiled.append(block) or block._call_impl(*args, **kwargs)

    monkeypatch.setattr(nn.Module, "compile", compiles)
    vb.enable_speed_mode(verbose=False, compile="on", fp4="off", precision="fp32")
    vb.optimize(model)
    x = torch.randn(2, WIDTH)
    model(x, flags=(1, None, "a", [x]))
    assert compiled == list(model["blocks"])
    model(x, cache=object())
    model(x, flags=({"state": object()},))
    assert len(compiled) == 2
