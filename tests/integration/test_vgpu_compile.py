"""Streamed models under torch.compile: the numbers of the compiled model, and no graph more after the first pass."""

import contextlib
import copy
import logging
import shutil

import hf_models
import pytest
import torch
from small_models import noise
from torch import nn
from torch.nn import functional as F

from apt_model.core.errors import InputError
from apt_model.optimization import FP4Config, VGPUStack, quantize
from apt_model.vgpu.compiling import Holders
from apt_model.vgpu.parameters import StreamedParameter

WIDTH, PASSES = 32, 4
X = noise(4, WIDTH, seed=1)
pytestmark = [
    pytest.mark.usefixtures("quiet_vgpu"),
    # Of torch's own compiler, which looks at tensors of all kinds.
    pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf", "ignore:.*torch.jit.script_"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # much, and nobody reads it
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that counts its graphs, and reads memory as generated code does: whatever class a parameter has."""

    def __init__(self, inner="eager"):
        self.graphs, self.inner = 0, torch._dynamo.lookup_backend(inner)

    def __call__(self, graph, examples):
        self.graphs += 1
        call = self.inner(graph, examples)

        def raw(*args):
            with torch._C.DisableTorchFunctionSubclass():
                return call(*args)

        return raw


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Blocks(nn.Module):
    def __init__(self, count=8, kind=Block):
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x * 2


class Unrolled(Blocks):
    """Without a loop, in which torch would compile the blocks alone."""

    def __init__(self):
        super().__init__(4)

    def forward(self, x):
        first, second, third, fourth = self.layers
        return fourth(third(second(first(x) + 1) + 2) + 3) * 2


class Frozen(Blocks):
    def __init__(self):
        super().__init__()
        for layer in self.layers[::2]:
            layer.requires_grad_(False)


class Tied(Blocks):
    def __init__(self):
        super().__init__(12)
        for layer in self.layers[6:]:
            layer.up.weight = self.layers[0].up.weight


class ReadsOutside(Blocks):
    """Reads what is away, in the model's own forward and in a function that is compiled by itself."""

    def tail(self, x):
        return F.linear(x, self.layers[-1].up.weight, self.layers[2].up.bias)

    def forward(self, x):
        for layer in self.layers:
            x = layer(F.linear(x, self.layers[0].down.weight.T)[:, :WIDTH] * 0.1)
        return self.tail(x)


class ReadsWithin(Blocks):
    """A block reads others that it knows without owning them."""

    def __init__(self):
        super().__init__()
        self.layers.append(_Reader(self.layers))


class _Reader(nn.Module):
    def __init__(self, others):
        super().__init__()
        self.own, self.others = nn.Linear(WIDTH, WIDTH), [layer.up for layer in others]

    def forward(self, x):
        return self.own(x + sum(F.linear(x, other.weight)[:, :WIDTH] for other in self.others))


class Writes(Block):
    def forward(self, x):
        with torch.no_grad():
            self.up.weight.mul_(0.9)
            self.down.bias.add_(0.1)
        return super().forward(x)


class Returns(Block):
    def forward(self, x):
        return super().forward(x), self.up.weight, self.down.weight[1:3]


class GetsReturned(Blocks):
    def __init__(self):
        super().__init__(kind=Returns)

    def forward(self, x):
        kept = []
        for layer in self.layers:
            x, *rest = layer(x)
            kept.append(rest)
        for weight, rows in kept:
            x = x + F.linear(x, weight)[:, :WIDTH] * 0.01 + rows[0, :WIDTH]
        return x


def stack_for(model, share=0.6, slots=3):
    total = sum(each.nbytes for each in model.parameters())
    sizes = total * share, total * 9
    return VGPUStack({"levels": [{"capacity_mb": each / 1e6, "device": "cpu"} for each in sizes], "slots": slots})


def whole(model, attach, **options):
    attach()
    return torch.compile(model, **options)


def whole_before(model, attach, **options):
    compiled = torch.compile(model, **options)
    attach()
    return compiled


def in_place(model, attach, **options):
    attach()
    model.compile(**options)
    return model


def dynamic(model, attach, **options):
    return whole(model, attach, dynamic=True, **options)


def blocks(model, attach, **options):
    attach()
    for layer in model.layers:
        layer.compile(fullgraph=True, **options)
    return model


def blocks_before(model, attach, **options):
    return blocks(model, lambda: None, **options) if attach() is None else model


def wrapped(model, attach, **options):
    attach()
    return _wrapped(model, **options)


def wrapped_before(model, attach, **options):
    _wrapped(model, **options)
    attach()
    return model


def _wrapped(model, **options):
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, **options)
    return model


WAYS = [whole, whole_before, in_place, dynamic, blocks, blocks_before, wrapped, wrapped_before]


def passes(compiled, backend, train, inputs=(X,) * PASSES):
    """Outputs of some passes, and the graphs after each."""
    outs, graphs = [], []
    with torch.set_grad_enabled(train):
        for x in inputs:
            out = compiled(x)
            if train:
                out.square().sum().backward()
            outs.append(out.detach().clone())
            graphs.append(backend.graphs)
    return outs, graphs


def check(model, way, *, train=False, inner="eager", share=0.6, inputs=(X,) * PASSES):
    """Compile a model and a copy that is streamed; the graphs after each pass of the latter."""
    dense, backend = copy.deepcopy(model), Counting(inner)
    wanted, _ = passes(way(dense, lambda: None, backend=backend), backend, train, inputs)
    torch._dynamo.reset()
    backend = Counting(inner)
    with stack_for(model, share) as stack:
        got, graphs = passes(way(model, lambda: stack.attach(model) and None, backend=backend), backend, train, inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
        assert stack.stats()["levels"][0]["bytes_in"] > 0
        assert any(isinstance(each, StreamedParameter) for each in model.parameters())
        stack.detach(model)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
    assert graphs[1:] == graphs[1:2] * (len(graphs) - 1), "compiled anew after the second pass"
    return graphs[-1]


@pytest.mark.parametrize("way", WAYS)
def test_blocks_that_are_alike_share_one_graph(way):
    assert check(Blocks(12), way) == 1


@pytest.mark.parametrize("way", [whole, blocks, wrapped_before])
def test_training(way):
    """One graph more, for the first block: its input needs no gradient."""
    assert check(Blocks(12), way, train=True, inner="aot_eager") == 2


@pytest.mark.parametrize(
    ("way", "train"), [(whole, False), (wrapped_before, False), (whole, True)], ids=["whole", "wrapped", "training"]
)
@pytest.mark.parametrize("make", [Unrolled, Frozen, Tied, ReadsOutside, ReadsWithin, GetsReturned])
def test_hard_models(make, way, train):
    check(make(), way, train=train, inner="aot_eager" if train else "eager", share=0.8)


@pytest.mark.parametrize("way", [whole, blocks])
def test_weights_that_a_block_writes(way):
    check(Blocks(kind=Writes), way)


@pytest.mark.parametrize("way", [whole, blocks, dynamic])
def test_inputs_of_other_sizes(way):
    """A second graph for all sizes, as without the stack, and no third."""
    inputs = [noise(rows, WIDTH, seed=rows) for rows in (4, 5, 6, 7, 4)]
    assert check(Blocks(), way, inputs=inputs) <= 2


@pytest.mark.parametrize("way", [whole, blocks])
def test_4_bit_weights(way):
    model = quantize(Blocks(), FP4Config(format="nvfp4"))
    check(model, way, share=0.8)


def compiled_by_itself(model, backend):
    for layer in model.layers:
        layer.up.compile(backend=backend)
    return lambda x: torch.stack([layer.up(x) for layer in model.layers])


def compiled_whole(model, backend):
    return torch.compile(model, backend=backend)


@pytest.mark.parametrize("recursive", [False, True])
@pytest.mark.parametrize("compiled", [compiled_whole, compiled_by_itself])
def test_graphs_from_before_are_not_used_while_weights_are_away(compiled, recursive):
    """torch 2.11 looks at nothing below a dictionary that is as it was: what away changes has to be seen."""
    with attaching_and_detaching(compiled, recursive) as differ:
        assert not differ


def test_that_test_can_fail(monkeypatch):
    monkeypatch.setattr(Holders, "changed", lambda *_: None)
    with attaching_and_detaching(compiled_whole, recursive=True) as differ:
        assert differ


@contextlib.contextmanager
def attaching_and_detaching(compiled, recursive):
    """Passes in which a compiled model gave other numbers when it was attached or detached."""
    model = Blocks()
    backend = Counting()
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=recursive), torch.no_grad():
        call = compiled(model, backend)
        wanted = [call(X) for _ in range(5)][-1]
        differ = []
        for i in range(2):
            with stack_for(model) as stack:
                stack.attach(model)
                differ += [("streamed", i) for _ in range(4) if not torch.equal(call(X), wanted)]
                stack.detach(model)
                differ += [("detached", i) for _ in range(4) if not torch.equal(call(X), wanted)]
        yield differ


@pytest.mark.parametrize("way", [whole, in_place])
def test_fullgraph_of_more_than_a_block_says_what_to_do(way):
    model = Blocks()
    with stack_for(model) as stack, torch.no_grad():
        call = way(model, lambda: stack.attach(model), fullgraph=True, backend="eager")
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"for block in model.layers: block.compile"):
            call(X)


def test_export_is_refused():
    model = Blocks()
    with stack_for(model) as stack, torch.no_grad():
        stack.attach(model)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="VGPUStack"):
            torch.export.export(model, (X,), strict=True)


def llama(layers=6):
    return hf_models.tf.LlamaForCausalLM(
        hf_models.tf.LlamaConfig(**{**hf_models.LLAMA, **hf_models.TIED, "num_hidden_layers": layers})
    )


def bert(layers=6):
    sizes = {**hf_models.LLAMA, "num_hidden_layers": layers, "num_key_value_heads": 2}
    return hf_models.tf.BertForMaskedLM(hf_models.tf.BertConfig(**sizes))


@pytest.mark.parametrize(("make", "by_block"), [(llama, False), (llama, True), (bert, True)])
def test_transformers_models(make, by_block):
    """A graph for each layer of Llama, which finds its cache by its number; of BERT's layers one."""
    model, backend = make(6 if by_block else 3).eval(), Counting()
    layers = model.model.layers if make is llama else model.bert.encoder.layer
    tokens = hf_models.ids(model)["input_ids"]
    with torch.no_grad(), stack_for(model, 0.8) as stack:
        wanted = model(input_ids=tokens).logits
        stack.attach(model)
        for module in layers if by_block else [model]:
            module.compile(backend=backend)
        graphs = []
        for _ in range(PASSES):
            assert torch.equal(model(input_ids=tokens).logits, wanted)
            graphs.append(backend.graphs)
    assert graphs[0] > 0
    assert graphs[1:] == graphs[1:2] * (PASSES - 1)
    if by_block:
        assert graphs[-1] == {llama: len(layers), bert: 1}[make]


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_generated_code(train):
    assert check(Blocks(), blocks, train=train, inner="inductor") == 1 + train


def test_a_cuda_graph_of_streamed_blocks_is_refused(monkeypatch):
    """As on a GPU: the stream is asked whether it is captured."""
    model = Blocks()
    with torch.no_grad(), stack_for(model) as stack:
        wanted = model(X)
        stack.attach(model)
        lanes = stack._memory.lanes
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            patch.setattr(lanes, "device", torch.device("cuda"))
            with pytest.raises(InputError, match="reduce-overhead"):
                model(X)
            with pytest.raises(InputError, match="CUDA graph"):
                model.layers[0].up.weight.sum()
        assert torch.equal(model(X), wanted)
        assert all(place.pins == 0 for each in stack._models.values() for place in each.places.all)
