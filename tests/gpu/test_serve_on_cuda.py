"""`apt-model serve` on a GPU, in processes of its own, and layers whose own parameters are on one.

An answer must be the same bits as the same module, type and shape give on this GPU, since the kernels are the same.
Gradients through attention are near instead: its kernels add them up in the order in which they come.
"""

# ruff: noqa: E402 - what needs an extra is imported after the skip

import copy
import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import build, noise, tokens
from torch import nn

tf = pytest.importorskip("transformers", reason="needs the extra hf")
for _name in ("uvicorn", "httptools"):
    pytest.importorskip(_name, reason="needs the extra serve")

sys.path.insert(0, str(Path(__file__).parents[1] / "cloud"))

from clouds import connected, counts
from served import over_http, request, running

from apt_model.cli.serving import apt_block, hf_block
from apt_model.cli.serving.placing import place_on
from apt_model.cloud.int8g64 import pack, unpack
from apt_model.cloud.remote_block import RemoteBlock
from apt_model.cloud.server.blocks import KINDS, make_block, register
from apt_model.cloud.tensors import Weights
from apt_model.optimization import CloudNPULinear
from apt_model.optimization.remote_layers import offload_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Of a thread of autograd's whose first product it is.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]
DEVICE = "cuda"
HALVES = [torch.float16, torch.bfloat16]
TYPES = [*HALVES, torch.float32]
WIDE, OUT, ROWS, LENGTH = 256, 384, 2, 33
SECONDS = 100.0  # a kernel may have to be compiled first
# Norm of a difference beside the norm: a few roundings of the type, through a few layers.
NEAR = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-4}
LLAMA = tf.LlamaConfig(hidden_size=WIDE, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                       num_key_value_heads=2, max_position_embeddings=128, vocab_size=64, use_cache=False,
                       bos_token_id=1, eos_token_id=2, initializer_range=0.06)  # fmt: skip
# Six layers of 4.5 MB, or of 1.3 MB in 4 bits: more than the share of the GPU either way.
DEEP = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
GPU_MB = 6
SAID = 2  # the descriptor of stderr: what a server logs stands under the test that failed


@pytest.fixture(autouse=True)
def _kinds(monkeypatch, caplog):
    """Those that the command registers, for the blocks here; and nothing of layers that lose."""
    caplog.set_level(logging.ERROR, "apt_model.cloud")
    for kind in (apt_block.KIND, hf_block.KIND):
        monkeypatch.setitem(KINDS, kind.name, kind)
        register(kind)


@pytest.fixture(scope="module")
def port():
    with running("--allow-upload", device=DEVICE, log=SAID) as (_, port):
        yield port


@pytest.fixture
def backend(port):
    with connected(port) as made:
        yield made


@pytest.fixture(scope="module")
def streaming():
    """The port of a server that has room for a part of a block on the GPU."""
    with running("--allow-upload", "--gpu-mb", GPU_MB, "--ram-mb", 400, device=DEVICE, log=SAID) as (_, port):
        yield port


def linear():
    return "linear", {}, {"weight": noise(OUT, WIDE) / 16, "bias": noise(OUT, seed=1)}


def mlp():
    shapes = {"gate": (512, WIDE), "up": (512, WIDE), "down": (OUT, 512)}
    tensors = {f"{name}.weight": noise(*shape, seed=n) / 16 for n, (name, shape) in enumerate(shapes.items())}
    return "mlp", {"activation": "silu"}, {**tensors, "down.bias": noise(OUT, seed=4)}


def ours():
    sizes = {"d_model": WIDE, "num_heads": 4, "d_ff": 512, "max_seq_len": 128}
    model = build(decoder_only=True, left_spin_mode="trust", activation="swiglu", **sizes)
    config = {"model": model.config.to_dict(), "layers": [0, 1]}
    return "apt_block", config, model.decoder_layers.state_dict()


def llama(first=1, last=2, **options):
    torch.manual_seed(0)
    config = copy.deepcopy(LLAMA)
    for key, value in options.items():
        setattr(config, key, value)
    if options:
        config.head_dim = config.hidden_size // config.num_attention_heads
    layers = tf.LlamaModel(config).layers.state_dict()
    tensors = {name: each for name, each in layers.items() if first <= int(name.partition(".")[0]) <= last}
    return "hf_block", {"model": json.loads(config.to_json_string()), "layers": [first, last]}, tensors


BLOCKS = {"linear": linear, "mlp": mlp, "apt_block": ours, "hf_block": llama}


class Pair:
    """A block elsewhere, whose tensors and inputs are on the GPU, and the same block on the GPU here."""

    def __init__(self, made, dtype, backend, **more):
        kind, config, tensors = made
        quantize = more.pop("quantize", None)
        config = {**config, "quantize": quantize} if quantize else config
        tensors = {name: each.to(dtype) for name, each in tensors.items()}
        self.weights = Weights(kind=kind, config=config, tensors=tensors)
        self.block = self.on(DEVICE)
        self.out = self.block.y.shape[-1]
        there = {name: each.to(DEVICE) for name, each in tensors.items()}
        self.remote = RemoteBlock(
            kind, config, there, cloud_backend=backend, out_features=self.out, deadline_s=SECONDS, **more
        )
        wide = self.block.x.shape[-1]
        self.x = noise(ROWS, LENGTH, wide, seed=7).to(DEVICE, dtype)
        self.dy = noise(ROWS, LENGTH, self.out, seed=8).to(DEVICE, dtype)

    def on(self, device):
        """The block as a server there makes it."""
        block = make_block(self.weights.kind, self.weights.config, self.weights.tensors)
        block.module = place_on(torch.device(device))(block.module, self.weights.config.get("quantize")).module
        return block

    def asked(self, **more):
        """What the server makes of it: the answer and the gradient."""
        x = self.x.clone().requires_grad_()
        y = self.remote(x, **more)
        y.backward(self.dy)
        assert y.device == x.grad.device == self.x.device
        return y.detach(), x.grad

    def here(self, **more):
        inputs = {"x": self.x, **more}
        return self.block.forward(inputs), self.block.backward(inputs, self.dy)


def off(found, expected):
    """The norm of the difference beside that of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def same(found, expected):
    """The same bits; the message says how far from it."""
    found, expected = found.detach(), expected.detach()
    assert (found.dtype, found.shape, found.device) == (expected.dtype, expected.shape, expected.device)
    differ = int((found != expected).sum())
    assert torch.equal(found, expected), (
        f"{differ} of {found.numel()} elements are not the same bits: the largest difference is "
        f"{float((found.double() - expected.double()).abs().max()):.3g}, in the norm {off(found, expected):.3g}"
    )


def near(found, expected, most):
    found, expected = found.detach(), expected.detach()
    assert (found.dtype, found.shape, found.device) == (expected.dtype, expected.shape, expected.device)
    assert off(found, expected) <= most, f"{off(found, expected):.3g} off in the norm, expected at most {most}"


def padding():
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    mask[0, 20:] = False
    return mask.to(DEVICE)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block(backend, name, dtype):
    pair = Pair(BLOCKS[name](), dtype, backend)
    attends = name.endswith("_block")
    cases = [{}, {"attention_mask": padding()}] if attends else [{}]
    for number, more in enumerate(cases):
        (y, dx), (expected, gradient) = pair.asked(**more), pair.here(**more)
        same(y, expected)
        if attends:
            near(dx, gradient, NEAR[dtype])
        else:
            same(dx, gradient)
        cpu = pair.on("cpu").forward({"x": pair.x.cpu(), **{each: value.cpu() for each, value in more.items()}})
        near(y.cpu(), cpu, NEAR[dtype])
        assert counts(pair.remote) == (number + 1, 0, 0)
    stats = pair.remote.get_stats()
    assert (stats["backward_cloud"], stats["backward_local"], stats["retries"]) == (len(cases), 0, 0)


@pytest.mark.parametrize("name", ["linear", "mlp", "hf_block"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_in_four_bits(backend, name, dtype):
    pair, plain = (Pair(BLOCKS[name](), dtype, backend, quantize=form) for form in ("nvfp4", None))
    (y, dx), (expected, gradient), (exact, _) = pair.asked(), pair.here(), plain.here()
    near(y, expected, NEAR[dtype])
    near(dx, gradient, NEAR[dtype])
    # It is weights in 4 bits that answered: as far from the exact ones as those are.
    assert off(y, exact) > 0.5 * off(expected, exact) > NEAR[dtype] / 10
    assert off(y, exact) < 0.3
    # What the server holds on its device, which it makes by the same code.
    taken, whole = (sum(each.nbytes for each in p.block.module.parameters()) for p in (pair, plain))
    assert taken < 0.35 * whole


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_eight_bits_on_the_way(backend, dtype):
    pair = Pair(mlp(), dtype, backend, wire="int8g64")
    y, dx = pair.asked()
    # What the server reads, and what comes back of its answer.
    x = unpack(*pack(pair.x.cpu()), WIDE, torch.float32).to(DEVICE)
    whole = pair.block.forward({"x": x})
    expected = unpack(*pack(whole.cpu()), pair.out, dtype).to(DEVICE)
    same(y, expected)
    exact, gradient = pair.here()
    near(y, exact, 0.03)
    near(dx, gradient, 0.05)


@pytest.mark.parametrize("form", [None, "nvfp4"])
def test_a_block_that_is_larger_than_the_gpus_share(streaming, form):
    with connected(streaming) as backend:
        dtype = torch.bfloat16
        pair = Pair(llama(0, 5, **DEEP), dtype, backend, quantize=form)
        assert sum(each.nbytes for each in pair.block.module.parameters()) > GPU_MB * 1e6
        for number in range(3):
            (y, dx), (expected, gradient) = pair.asked(), pair.here()
            if form is None:
                same(y, expected)
            else:
                near(y, expected, NEAR[dtype])
            near(dx, gradient, NEAR[dtype])
            assert counts(pair.remote) == (number + 1, 0, 0)
        assert pair.remote.get_stats()["backward_cloud"] == 3
        # Its room is the next one's.
        path = f"/v2/repository/models/{pair.weights.model}/versions/{pair.weights.version}"
        assert over_http(streaming, "DELETE", path)[0] == 200


@pytest.mark.parametrize("form", [None, "nvfp4"])
def test_many_at_once(backend, form):
    pair = Pair(mlp(), torch.bfloat16, backend, quantize=form)
    inputs = [noise(ROWS, LENGTH, WIDE, seed=20 + n).to(DEVICE, torch.bfloat16) for n in range(8)]
    with torch.no_grad():
        alone = [pair.remote(x) for x in inputs]
    for x, y in zip(inputs, alone, strict=True):
        near(y, pair.block.forward({"x": x}), NEAR[torch.bfloat16])

    def ask(x):
        with torch.no_grad():
            return pair.remote(x)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            for found, y in zip(pool.map(ask, inputs), alone, strict=True):
                same(found, y)
    assert counts(pair.remote) == (88, 0, 0)


def test_memory_that_the_gpu_does_not_have(backend, port):
    """What is between these matrices takes 512 GiB: it is told so, and the next forward is answered."""
    hidden, rows = 1 << 18, 1 << 20
    tensors = {"up.weight": torch.ones(hidden, 16).half(), "down.weight": torch.ones(16, hidden).half() / hidden}
    block = RemoteBlock("mlp", {"activation": "relu"}, tensors, cloud_backend=backend, deadline_s=SECONDS)
    x = torch.ones(3, 16).half()
    before = block(x)
    body, headers = request({"x": torch.ones(rows, 16).half()})
    path = f"/v2/models/{block.weights.model}/versions/{block.weights.version}/infer"
    status, found, said = over_http(port, "POST", path, body, headers)
    assert (status, b"not enough memory" in said) == (503, True), said
    assert "retry-after" in found
    assert torch.equal(block(x), before)
    torch.testing.assert_close(before, x * 16, rtol=1e-2, atol=0.0)  # parts of sums may be added in fp16


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_layer_whose_parameters_are_on_the_gpu(backend, dtype):
    layer = CloudNPULinear.from_linear(
        nn.Linear(WIDE, OUT, dtype=dtype), cloud_backend=backend, fallback_local=False, deadline_s=SECONDS
    )
    assert layer.push_weights() > layer.weight.nbytes
    layer.to(DEVICE)
    assert layer.push_weights() == 0  # the same weights
    x = noise(ROWS, LENGTH, WIDE, seed=3).to(DEVICE, dtype).requires_grad_()
    dy = noise(ROWS, LENGTH, OUT, seed=4).to(DEVICE, dtype)
    y = layer(x)
    y.backward(dy)
    found, inputs = [x.grad, layer.weight.grad, layer.bias.grad], (x, layer.weight, layer.bias)
    for each in inputs:
        each.grad = None
    expected = F.linear(*inputs)
    expected.backward(dy)
    same(y, expected)
    same(found[0], dy @ layer.weight)
    for gradient, each in zip(found, inputs, strict=True):
        near(gradient, each.grad, NEAR[dtype])
    assert counts(layer) == (1, 0, 0)
    stats, tokens_bytes = layer.get_stats(), ROWS * LENGTH * dtype.itemsize
    assert (stats["backward_cloud"], stats["backward_local"], stats["retries"]) == (1, 0, 0)
    assert (stats["errors"], stats["local_reasons"]) == ({}, {})
    # x, then dy alone; y, then dx. What remains is JSON.
    assert 0 < stats["bytes_sent"] - tokens_bytes * (WIDE + OUT) < 2000
    assert 0 < stats["bytes_received"] - tokens_bytes * (WIDE + OUT) < 2000


def test_a_layer_under_the_gpus_autocast(backend):
    linear = nn.Linear(WIDE, OUT, device=DEVICE).requires_grad_(requires_grad=False)
    layer = CloudNPULinear.from_linear(linear, cloud_backend=backend, fallback_local=False, deadline_s=SECONDS)
    x = noise(LENGTH, WIDE).to(DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, expected = layer(x), linear(x)
    assert y.dtype == torch.bfloat16
    same(y, expected)
    assert counts(layer) == (1, 0, 0)


def logits(model, *args, **kwargs):
    with torch.no_grad():
        found = model(*args, **kwargs)
    return getattr(found, "logits", found)


def causal_lm(dtype):
    # Made in this type, as `from_pretrained` makes it: `.to` would round the frequencies of its rotary embedding too.
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(LLAMA, dtype=dtype)


def half(model, layers, backend, **options):
    """The model, frozen and on the GPU, a copy with these layers elsewhere, and their block."""
    here = model.to(DEVICE).requires_grad_(requires_grad=False).eval()
    there = copy.deepcopy(here)
    block = offload_layers(there, layers, cloud_backend=backend, deadline_s=SECONDS, **options)
    return here, there, block


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_half_of_a_llama(backend, dtype):
    here, there, block = half(causal_lm(dtype), (2, 3), backend, fallback_local=False)
    ids, mask = tokens(ROWS, LENGTH, seed=1, low=3).to(DEVICE), padding()
    same(logits(there, ids), logits(here, ids))
    found, expected = (logits(each, ids, attention_mask=mask.long()) for each in (there, here))
    same(found[mask], expected[mask])
    inputs = [noise(ROWS, LENGTH, WIDE).to(DEVICE, dtype).requires_grad_() for _ in range(2)]
    for x, model in zip(inputs, (there, here), strict=True):
        model(inputs_embeds=x).logits.float().square().sum().backward()
    near(inputs[0].grad, inputs[1].grad, NEAR[dtype])
    assert counts(block) == (3, 0, 0)
    assert block.get_stats()["backward_cloud"] == 1


def test_half_of_ours(backend):
    here, there, block = half(build(decoder_only=True, left_spin_mode="trust"), (1, 1), backend, fallback_local=False)
    ids = tokens(ROWS, LENGTH, seed=1).to(DEVICE)
    same(logits(there, ids), logits(here, ids))
    assert counts(block) == (1, 0, 0)


def test_a_server_that_is_killed_leaves_it_to_this_gpu():
    linear = nn.Linear(WIDE, OUT, device=DEVICE, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    x = noise(LENGTH, WIDE).to(DEVICE, torch.bfloat16)
    ids = tokens(ROWS, LENGTH, seed=1).to(DEVICE)
    with running("--allow-upload", device=DEVICE, log=SAID) as (process, port), connected(port) as backend:
        layer = CloudNPULinear.from_linear(linear, cloud_backend=backend, deadline_s=SECONDS)
        here, there, block = half(causal_lm(torch.bfloat16), (2, 3), backend)
        expected, whole = F.linear(x, linear.weight, linear.bias), logits(here, ids)
        same(layer(x), expected)
        same(logits(there, ids), whole)
        given = x.clone().requires_grad_()
        y = layer(given)  # there; its gradient comes too late for that
        assert (counts(layer), counts(block)) == ((2, 0, 0), (1, 0, 0))
        process.kill()
        process.wait()
        y.backward(torch.ones_like(y))
        same(given.grad, torch.ones_like(y) @ linear.weight)
        for _ in range(2):
            same(layer(x), expected)
            same(logits(there, ids), whole)
        assert (counts(layer), counts(block)) == ((2, 2, 0), (1, 2, 0))
        assert layer.get_stats()["backward_local"] == 1
        assert sum(block.get_stats()["errors"].values()) == 2
