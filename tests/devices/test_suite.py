"""The package's public interface on one device, forward and backward, against the same on the CPU.

APT_SUITE_DEVICE names the device; without it this runs on the CPU. `test_built_devices.py` runs it as it is on the
device that tests build, under the names of two vendors, and `tests/gpu/test_suite_on_cuda.py` on a GPU.
"""

import copy
import importlib
import os
import sys

import pytest
import torch
from micro import figures, train_config, write_texts
from small_models import USES, build, call, gradients, model_for, tokens
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import apt_model.optimization.vb_global as vb
from apt_model import APTModel
from apt_model.core.system import accelerator, get_device, get_device_manager
from apt_model.optimization import FP4Config, FusedFP4Linear, VGPUStack, dequantize, quantize
from apt_model.trainer.trainer import Trainer

NAME = os.environ.get("APT_SUITE_DEVICE", "cpu")
KIND = NAME.partition(":")[0]
# The built device computes on the CPU, in the CPU's order; a GPU sums in its own.
EXACT = KIND != "cuda"
FIRST, HOST = f"{KIND}:0" if KIND != "cpu" else "cpu", {"capacity_mb": 50, "device": "cpu"}


@pytest.fixture(scope="module")
def manager():
    return get_device_manager(NAME)


@pytest.fixture(autouse=True)
def _plain_attention():
    """torch has no fused attention for devices it does not know, and its formula then: the CPU is to use it too."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def counted():
    """What was asked of the built device since it was loaded; None on a device that is not built."""
    package = getattr(type(get_device_manager(NAME)), "package", None)
    device = getattr(sys.modules.get(package or ""), "device", None)
    return device.counted() if hasattr(device, "counted") else None


def same(got, expected):
    got = got.detach().cpu()
    if EXACT:
        assert torch.equal(got, expected.detach())
    else:
        torch.testing.assert_close(got, expected.detach(), rtol=2e-4, atol=2e-4)


def on_both(model, manager):
    """A model and its copy on the device."""
    return model, copy.deepcopy(model).to(manager.device)


def tower(width=64, blocks=6):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(blocks)))


def levels(model, share, *below):
    size = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    return {"levels": [{"capacity_mb": share * size, "device": FIRST}, *(below or [HOST])]}


# --- the device


def test_it_is_the_device_that_was_asked_for(manager):
    assert manager.get_accelerator_type() == get_device(NAME).type == KIND
    assert torch.ones(2, device=manager.device).device.type == KIND
    if KIND != "cpu":
        assert get_device().type == KIND  # which auto takes, too


def test_memory_is_counted(manager):
    held = torch.zeros(2**20, device=manager.device)
    allocated = manager.memory_allocated()
    assert allocated >= held.nbytes
    assert manager.peak_memory() >= allocated
    assert 0 < manager.free_memory() <= manager.total_memory()
    manager.reset_peak_memory()
    if manager.supports("reset_peak_memory") and KIND != "cpu":
        assert manager.peak_memory() == manager.memory_allocated()
        before = manager.memory_allocated()
        del held
        manager.empty_cache()
        assert before - manager.memory_allocated() == 2**22


def test_what_is_called_arrives(manager):
    before = counted()
    manager.synchronize()
    manager.empty_cache()
    manager.manual_seed(5)
    torch.ones(3, device=manager.device)
    after = counted()
    if before is None:
        return
    came = {name: after[name] - before[name] for name in after}
    assert came["allocations"] > 0
    assert came["frees"] > 0
    assert came["synchronisations"] == 1
    assert came["cache_clears"] == manager.supports("empty_cache")
    assert came["seeds"] >= 2  # both devices have a generator


def test_what_is_not_there_is_said(manager):
    has = {"cuda": True, "npu": True, "hpu": False, "cpu": False}
    assert manager.supports("empty_cache") is has.get(KIND, manager.supports("empty_cache"))
    for method in ("memory_allocated", "name", "total_memory", "manual_seed", "current_index"):
        assert manager.supports(method)
    assert manager.supports("stream") is (KIND != "cpu")


def test_streams_and_events(manager):
    begin, end, aside = manager.event(timed=True), manager.event(timed=True), manager.stream()
    done = manager.event()
    begin.record(manager.current_stream())
    with manager.during(aside):
        twice = 2 * torch.ones(100, device=manager.device)
        done.record(aside)
    manager.current_stream().wait_event(done)
    same(twice + 1, torch.full((100,), 3.0))
    end.record(manager.current_stream())
    end.synchronize()
    assert end.query()
    if manager.supports("event"):
        assert begin.elapsed_time(end) >= 0


def test_seeds_repeat_draws(manager):
    manager.manual_seed(3)
    first = torch.rand(4, device=manager.device)
    manager.manual_seed(3)
    assert torch.equal(torch.rand(4, device=manager.device), first)


def test_the_state_of_its_draws_comes_back(manager):
    assert manager.supports("random_state") is (KIND != "cpu")
    before = manager.random_state()
    if before is not None:
        manager.manual_seed(11)
        assert not torch.equal(manager.random_state(), before)
        manager.set_random_state(before)
        assert torch.equal(manager.random_state(), before)


def test_types_it_computes_in(manager):
    assert manager.supports_dtype(torch.float32)
    assert not manager.supports_dtype(torch.quint8)
    for dtype in (torch.bfloat16, torch.float16):
        if manager.supports_dtype(dtype):
            ones = torch.ones(16, 16, device=manager.device, dtype=dtype)
            same((ones @ ones).float(), torch.full((16, 16), 16.0))
    assert manager.supports_bf16() in (True, False)


def test_pinned_memory_holds_the_same(manager):
    values = torch.arange(5)
    pinned = manager.pin(values)
    assert pinned.is_pinned() == manager.supports("pin")
    assert torch.equal(pinned.to(manager.device, non_blocking=True).cpu(), values)


# --- the model


@pytest.mark.parametrize("variant", ["plain", "design", "trust"])
@pytest.mark.parametrize("use", USES)
def test_a_training_step_is_the_cpus(manager, use, variant):
    trained = []
    for model in on_both(model_for(use, variant), manager):
        device = next(model.parameters()).device
        # With the usual eps a gradient of 1e-8 moves its weight by the whole rate, up or down as its last bit falls.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, fused=True)
        for step in range(2):
            ids = tokens(3, 9, seed=step).to(device)
            logits = call(model, use, ids, source=tokens(3, 7, seed=1).to(device))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens(3, 9, seed=7).to(device).flatten())
            loss.backward()
            grads = gradients(model)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        trained.append((model, loss, grads))
    (expected, loss, _), (got, other, _) = trained
    same(other, loss)
    for mine, theirs in zip(got.parameters(), expected.parameters(), strict=True):
        assert mine.device.type == KIND
        same(mine, theirs)


def test_a_saved_model_comes_back(manager, tmp_path):
    model, there = on_both(build(), manager)
    there.save_pretrained(tmp_path)
    back = APTModel.from_pretrained(tmp_path)
    for (name, mine), theirs in zip(back.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    ids = tokens(2, 5)
    back = back.to(manager.device).eval()
    same(back(ids.to(manager.device), ids.to(manager.device)), model.eval()(ids, ids))


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3, "temperature": 0.7, "top_k": 9}])
def test_generation(manager, options):
    model, there = on_both(build(decoder_only=True), manager)
    written = there.generate(tokens(2, 4).to(manager.device), max_new_tokens=8, **options)
    assert written.device.type == KIND
    if EXACT or not options:
        assert torch.equal(written.cpu(), model.generate(tokens(2, 4), max_new_tokens=8, **options))


# --- four bits


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_a_four_bit_layer(manager, form):
    torch.manual_seed(0)
    layer, there = on_both(FusedFP4Linear(64, 32, format=form), manager)
    x = torch.randn(5, 64)
    mine, theirs = x.clone().to(manager.device).requires_grad_(), x.clone().requires_grad_()
    got, expected = there(mine), layer(theirs)
    got.square().sum().backward()
    expected.square().sum().backward()
    same(got, expected)
    same(mine.grad, theirs.grad)
    same(there.bias.grad, layer.bias.grad)
    state = there.state_dict()
    for name, held in layer.state_dict().items():
        assert torch.equal(state[name].cpu().view(torch.uint8), held.view(torch.uint8)), name
    fresh = FusedFP4Linear(64, 32, format=form).to(manager.device)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(mine), there(mine))


def test_a_model_is_quantised_where_it_is(manager):
    model, there = on_both(tower(), manager)
    for each in (model, there):
        quantize(each, FP4Config(), report=lambda _: None)
    x = torch.randn(3, 64)
    same(there(x.to(manager.device)), model(x))
    assert {name: held.device.type for name, held in there.state_dict().items()} == dict.fromkeys(
        there.state_dict(), KIND
    )
    for (name, mine), theirs in zip(there.state_dict().items(), model.state_dict().values(), strict=True):
        if EXACT:
            assert torch.equal(mine.cpu().view(torch.uint8), theirs.view(torch.uint8)), name
    dequantize(model)
    dequantize(there)
    same(there(x.to(manager.device)), model(x))


# --- levels of memory


def test_tensors_by_key(manager):
    config = {"levels": [{"capacity_mb": 0.02, "device": FIRST}, HOST]}
    with VGPUStack(config) as stack:
        kept = {str(i): torch.randn(1000) for i in range(12)}
        for key, tensor in kept.items():
            stack.put(key, tensor.to(manager.device) if int(key) % 2 else tensor)
        stack.prefetch(["0", "1"])
        for key, tensor in kept.items():
            got = stack.get(key)
            assert got.device.type == KIND
            assert torch.equal(got.cpu(), tensor)
        stack.delete("3")
        assert "3" not in stack
        assert stack.stats()["levels"][1]["used_mb"] > 0


@pytest.mark.parametrize("share", [0.45, 0.7])
@pytest.mark.parametrize("disk", [False, True])
def test_a_model_larger_than_its_device(manager, share, disk, tmp_path):
    model = tower()
    dense = copy.deepcopy(model).to(manager.device)
    held = dict(model.named_parameters())
    below = [HOST, {"capacity_mb": 50, "device": "ssd", "path": str(tmp_path)}] if disk else [HOST]
    if disk:
        below[0] = {"capacity_mb": 0.05, "device": "cpu"}
    x = torch.randn(4, 64, device=manager.device)
    with VGPUStack(levels(model, share, *below)) as stack, torch.no_grad():
        stack.attach(model)
        for _ in range(3):
            assert torch.equal(model(x), dense(x))
        assert all(parameter is held[name] for name, parameter in model.named_parameters())
        assert stack.stats()["levels"][0]["bytes_in"] > 0
        stack.detach(model)
    for mine, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        assert mine.device.type == "cpu"
        assert torch.equal(mine, theirs.cpu())
    same(dense(x), model(x.cpu()))


@pytest.mark.skipif(KIND == "cuda", reason="a GPU has streams")
def test_a_device_without_streams_is_served_in_the_order_of_the_calls(manager, monkeypatch):
    monkeypatch.setattr(accelerator, "_has_streams", lambda _: False)
    assert not manager.supports("stream")
    model = tower()
    dense = copy.deepcopy(model).to(manager.device)
    x = torch.randn(4, 64, device=manager.device)
    with VGPUStack(levels(model, 0.45)) as stack, torch.no_grad():
        stack.attach(model)
        for _ in range(2):
            assert torch.equal(model(x), dense(x))
        stack.put("x", x)
        assert torch.equal(stack.get("x"), x)
        stack.detach(model)


def test_gradients_of_a_model_larger_than_its_device(manager):
    model = tower()
    dense = copy.deepcopy(model).to(manager.device)
    x = torch.randn(4, 64, device=manager.device)
    with VGPUStack(levels(model, 0.5)) as stack:
        stack.attach(model)
        for each in (model, dense):
            each(x).square().sum().backward()
        for mine, theirs in zip(model.parameters(), dense.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)
        stack.detach(model)


def test_an_apt_model_larger_than_its_device(manager):
    model = build(decoder_only=True, num_decoder_layers=4).eval()
    dense = copy.deepcopy(model).to(manager.device)
    ids = tokens(2, 9).to(manager.device)
    with VGPUStack(levels(model, 0.6)) as stack, torch.no_grad():
        stack.attach(model)
        for _ in range(2):
            assert torch.equal(model(ids), dense(ids))
        assert torch.equal(model.generate(ids[:, :3], max_new_tokens=5), dense.generate(ids[:, :3], max_new_tokens=5))


def test_a_saved_model_comes_to_the_levels(manager, tmp_path):
    saved = build(decoder_only=True, num_decoder_layers=4).eval()
    saved.save_pretrained(tmp_path)
    ids = tokens(2, 9)
    config = levels(saved, 0.6)
    with (
        VGPUStack.load(tmp_path, config=config, model=lambda: APTModel.without_values(tmp_path)) as stack,
        torch.no_grad(),
    ):
        stack.model.eval()
        same(stack.model(ids.to(manager.device)), saved(ids))
        packed = sum(parameter.nbytes for parameter in saved.parameters())
        assert stack.stats()["levels"][0]["used_mb"] < packed / 1e6


# --- training and the policy


@pytest.mark.parametrize("use_dbc_dac", [False, True])
def test_the_trainer(manager, tmp_path, use_dbc_dac):
    texts = write_texts(tmp_path / "texts")
    found = []
    for number, device in enumerate(("cpu", NAME)):
        out = tmp_path / f"run {number}"
        config = train_config(out, texts, device=device, model={"use_dbc_dac": use_dbc_dac, "dropout": 0.0})
        trainer = Trainer(config)
        trainer.run()
        assert next(trainer.model.parameters()).device.type == torch.device(device).type
        found.append((figures(out), [parameter.detach().cpu() for parameter in trainer.model.parameters()]))
    (theirs, expected), (mine, weights) = found
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for got, wanted in zip(weights, expected, strict=True):
        same(got, wanted)


def test_the_policy(manager):
    model = build(decoder_only=True).to(manager.device)
    vb.enable(verbose=False)
    try:
        assert vb.optimize(model) is model
        logits = model(tokens(2, 9).to(manager.device))
        logits.float().square().mean().backward()
        assert all(
            torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None
        )
        assert vb.status()["accelerator"]["type"] == get_device().type
    finally:
        vb.disable()


@pytest.mark.parametrize("mode", ["speed", "memory", "full"])
def test_the_modes_move_a_model_and_give_it_back(manager, mode):
    model = build(decoder_only=True).eval().requires_grad_(False)
    model.register_buffer("extra", torch.arange(3.0))
    before = {name: (id(each), each.clone()) for name, each in [*model.named_parameters(), *model.named_buffers()]}
    enable = {
        "speed": vb.enable_speed_mode, "memory": vb.enable_memory_mode, "full": vb.enable_full_optimization,
    }[mode]  # fmt: skip
    enable(verbose=False, fp4="on", precision="bf16", compile="off")
    try:
        vb.optimize(model)
        assert {each.device.type for each in [*model.parameters(), *model.buffers()]} == {manager.kind}
        assert torch.isfinite(model(tokens(2, 9).to(manager.device)).float()).all()
    finally:
        vb.disable()
    after = {name: (id(each), each) for name, each in [*model.named_parameters(), *model.named_buffers()]}
    assert after.keys() == before.keys()
    for name, (identity, values) in before.items():
        assert after[name][0] == identity, name
        assert torch.equal(after[name][1], values), name


def test_triton_is_tried_and_not_believed(manager):
    found = importlib.import_module("apt_model.core.system").triton_works(manager.device)
    assert found.works or found.why
