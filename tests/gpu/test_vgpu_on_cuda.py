"""Models streamed to a GPU: the same bits, no wait of the host and no memory asked for, capacities kept."""

import copy
import warnings

import pytest
import torch
from torch import nn

from apt_model.optimization import FP4Config, VGPUStack, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDE, DEEP = 512, 8
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
        self.head = nn.Linear(WIDE, 16)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tower(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return Tower().to(dtype)


def first(share, model):
    return {"capacity_mb": share * sum(p.nbytes for p in model.parameters()) / 1e6, "device": "cuda:0"}


def twins(dtype=torch.bfloat16):
    model = tower(dtype)
    return model, copy.deepcopy(model).cuda()


@pytest.mark.parametrize("share", [0.45, 0.7])
@pytest.mark.parametrize(
    "below", [[HOST], [{"capacity_mb": 30, "device": "cpu"}, {"capacity_mb": 400, "device": "ssd"}]]
)
def test_the_same_bits(share, below):
    model, dense = twins()
    x = torch.randn(4, WIDE, device="cuda", dtype=torch.bfloat16)
    with VGPUStack({"levels": [first(share, model), *below]}) as stack, torch.no_grad():
        stack.attach(model)
        for _ in range(3):
            assert torch.equal(model(x), dense(x))
        assert stack.stats()["levels"][0]["bytes_in"] > 0
        stack.detach(model)
        assert next(model.parameters()).device.type == "cpu"
        assert all(torch.equal(a, b.cpu()) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_gradients_are_those_of_the_model_in_the_gpu():
    model, dense = twins(torch.float32)
    x = torch.randn(4, WIDE, device="cuda", requires_grad=True)
    y = x.detach().clone().requires_grad_()
    with VGPUStack({"levels": [first(0.5, model), HOST]}) as stack:
        stack.attach(model)
        for _ in range(2):
            model(x).square().sum().backward()
            dense(y).square().sum().backward()
        assert torch.equal(x.grad, y.grad)
        pairs = zip(model.parameters(), dense.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_4_bit_weights_stream_in_the_kernels_order():
    model = quantize(tower(), FP4Config())
    dense = copy.deepcopy(model).cuda()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with VGPUStack({"levels": [first(0.6, model), HOST]}) as stack, torch.no_grad():
        stack.attach(model)
        for rows in (1, 64, 300):
            x = torch.randn(rows, WIDE, device="cuda", dtype=torch.bfloat16)
            assert torch.equal(model(x), dense(x))
        assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in model.state_dict().items())
        stack.detach(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_pass_neither_waits_nor_asks_for_memory():
    model, dense = twins()
    x = torch.randn(4, WIDE, device="cuda", dtype=torch.bfloat16)
    with VGPUStack({"levels": [first(0.5, model), HOST]}) as stack, torch.no_grad():
        stack.attach(model)
        for _ in range(3):
            model(x)

        events = []
        made = stack._memory.lanes.event
        stack._memory.lanes.event = lambda **given: events.append(given) or made(**given)
        torch.cuda.synchronize()
        stack.stats()  # what is past gives its events back

        def asked(call):
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            call(x)
            stack.stats()
            return torch.cuda.memory_stats()["allocation.all.allocated"] - before

        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch's look-out for waiting is young
            try:
                torch.cuda.set_sync_debug_mode("error")
                counts = asked(model), asked(dense)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert counts[0] == counts[1]
        assert not events


def test_the_first_level_is_never_exceeded():
    model = tower()
    before = torch.cuda.memory_allocated()
    level = first(0.5, model)
    with VGPUStack({"levels": [level, HOST]}) as stack, torch.no_grad():
        stack.attach(model)
        assert torch.cuda.memory_allocated() - before <= level["capacity_mb"] * 1e6
        torch.cuda.reset_peak_memory_stats()
        x = torch.randn(1, WIDE, device="cuda", dtype=torch.bfloat16)
        model(x)
        torch.cuda.synchronize()
        activations = 4 << 20
        assert torch.cuda.max_memory_allocated() - before <= level["capacity_mb"] * 1e6 + activations
        assert all(each.pinned for each in stack._models[id(model)]._regions)


def test_a_captured_graph_replays_the_streamed_model():
    """Fixed slots: what is captured while everything is resident stays right."""
    model, dense = twins()
    x = torch.randn(4, WIDE, device="cuda", dtype=torch.bfloat16)
    with VGPUStack({"levels": [first(1.2, model), HOST]}) as stack, torch.no_grad():
        stack.attach(model)
        expected = dense(x)
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        graph.replay()
        assert torch.equal(out, expected)
