"""Streamed models compiled on a GPU, with CUDA graphs within blocks: the same numbers, and few recordings."""

import copy
import warnings

import pytest
import torch
from torch import nn

from apt_model.core.errors import InputError
from apt_model.optimization import FP4Config, VGPUStack, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of torch's own compiler
]
WIDE, DEEP, SLOTS, PASSES = 512, 8, 3, 12
HOST = {"capacity_mb": 400, "device": "cpu"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDE)
        self.up, self.down = nn.Linear(WIDE, 4 * WIDE), nn.Linear(4 * WIDE, WIDE)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(DEEP))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x * 2


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tower(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return Tower().to(dtype)


def stack_for(model, share=0.5):
    first = {"capacity_mb": share * sum(p.nbytes for p in model.parameters()) / 1e6, "device": "cuda:0"}
    return VGPUStack({"levels": [first, HOST], "slots": SLOTS})


def compiled(model, **options):
    for layer in model.layers:
        layer.compile(fullgraph=True, **options)
    return model


def passes(model, xs):
    """Each pass is one of inductor's steps: what graphs of one give is not overwritten within it."""
    for x in xs:
        torch.compiler.cudagraph_mark_step_begin()
        yield model(x).clone()


def inputs(count, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, WIDE, generator=generator).to("cuda", dtype) for _ in range(count)]


@pytest.fixture
def recordings(monkeypatch):
    """One entry for each CUDA graph that inductor records."""
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    made, record = [], CUDAGraphTreeManager.record_function

    def counted(self, new_inputs, function):
        made.append(function)
        return record(self, new_inputs, function)

    monkeypatch.setattr(CUDAGraphTreeManager, "record_function", counted)
    return made


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "nvfp4"])
def test_compiled_blocks_are_bit_equal(mode, quantised):
    model = quantize(tower(), FP4Config()) if quantised else tower()
    dense = compiled(copy.deepcopy(model).cuda(), mode=mode)
    xs = inputs(PASSES)
    with torch.no_grad():
        wanted = list(passes(dense, xs))
        torch._dynamo.reset()
        with stack_for(model, 0.6) as stack:
            stack.attach(model)
            compiled(model, mode=mode)
            for made, expected in zip(passes(model, xs), wanted, strict=True):
                assert torch.equal(made, expected)
            assert stack.stats()["levels"][0]["bytes_in"] > 0


def test_recordings_come_to_an_end(recordings):
    """A graph is recorded for a block in its place of the pass and for the slot that it lies in; then no more."""
    model, xs = tower(), inputs(1) * PASSES
    counts = []
    with stack_for(model) as stack, torch.no_grad():
        stack.attach(model)
        compiled(model, mode="reduce-overhead")
        for _ in passes(model, xs):
            counts.append(len(recordings))  # noqa: PERF401 - after each pass
    print("recordings after each pass:", counts)
    assert counts[-1] > 0
    assert counts[-1] == counts[PASSES // 2], "recorded again in every pass"
    assert counts[-1] <= SLOTS * DEEP


def test_a_compiled_pass_does_not_wait():
    model, xs = tower(), inputs(1)
    with stack_for(model) as stack, torch.no_grad():
        stack.attach(model)
        compiled(model)
        for _ in range(PASSES):
            model(xs[0])
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch's look-out for waiting is young
            try:
                torch.cuda.set_sync_debug_mode("error")
                model(xs[0])
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_gradients_of_compiled_blocks():
    model = tower(torch.float32)
    dense = compiled(copy.deepcopy(model).cuda())
    xs = inputs(3, torch.float32)
    for x in xs:
        dense(x).square().sum().backward()
    torch._dynamo.reset()
    with stack_for(model) as stack:
        stack.attach(model)
        compiled(model)
        for x in xs:
            model(x).square().sum().backward()
        pairs = zip(model.parameters(), dense.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_compiled_before_it_is_attached():
    """Triton is given addresses: a graph of parameters that are away now would read slots."""
    model, xs = tower(), inputs(1)
    model = model.cuda()
    whole = torch.compile(model)
    with torch.no_grad():
        wanted = [whole(xs[0]) for _ in range(6)][-1].clone()
        with stack_for(model) as stack:
            stack.attach(model)
            for _ in range(4):
                torch.testing.assert_close(whole(xs[0]), wanted, rtol=2e-2, atol=2e-2)  # fused within blocks only
            stack.detach(model)
            assert torch.equal(model(xs[0]), model(xs[0]))


def test_capturing_streamed_blocks_is_refused_and_harms_nothing():
    model, xs = tower(), inputs(1)
    dense = copy.deepcopy(model).cuda()
    with stack_for(model) as stack, torch.no_grad():
        stack.attach(model)
        expected = dense(xs[0])
        for _ in range(2):
            assert torch.equal(model(xs[0]), expected)
        with pytest.raises(InputError, match="reduce-overhead"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(xs[0])
        for _ in range(3):
            assert torch.equal(model(xs[0]), expected)
        for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
            assert torch.equal(ours, theirs)
