"""Hugging Face models with packed weights on a GPU: used, saved, trained and moved while in the kernels' order.

Without a GPU the same runs on the CPU, with weights brought into that order all the same.
"""

# ruff: noqa: E402 - what needs an extra is imported after the skip

import copy

import pytest
import torch

tf = pytest.importorskip("transformers", reason="needs the extra hf")
peft = pytest.importorskip("peft", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="needs the extra hf")

from torch import nn

from apt_model.integrations.peft_fp4 import hook_lora
from apt_model.layers.packed import PackedModule
from apt_model.ops import fp4
from apt_model.optimization import dequantize, quantize

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    tf.logging.set_verbosity_error()
    if not CUDA:
        halves = (torch.bfloat16, torch.float16)
        monkeypatch.setattr(fp4, "wants_order", lambda _form, _device, dtype: dtype in halves)


def llama():
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).bfloat16()


def mixtral():
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return tf.MixtralForCausalLM(config).bfloat16()


def ids(rows=2, length=12):
    return torch.randint(3, 256, (rows, length), generator=torch.Generator().manual_seed(4)).to(DEVICE)


def ordered(model):
    """How many weights are in the kernels' order."""
    return sum(len(each.orders) for each in model.modules() if isinstance(each, PackedModule))


def ready(make):
    return quantize(make().to(DEVICE).eval(), report=lambda _: None)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bytes(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)


def logits(model, batch=None):
    with torch.no_grad():
        return model(input_ids=ids() if batch is None else batch).logits.float()


@pytest.mark.parametrize("make", [llama, mixtral])
def test_what_was_used_is_saved_as_what_was_not(make):
    model = ready(make)
    fresh = state_of(model)
    first = logits(model)
    assert ordered(model)
    used = state_of(model)
    assert same_bytes(fresh, used)
    assert ordered(model), "saving leaves the order alone"
    again = ready(make)
    logits(again)
    again.load_state_dict(used)
    assert torch.equal(logits(again), first)


@pytest.mark.parametrize("make", [llama, mixtral])
def test_the_result_is_that_of_the_dequantised_model(make):
    model = ready(make)
    got = logits(model)
    exact = logits(dequantize(copy.deepcopy(model)))
    assert (got - exact).norm() < 2e-2 * exact.norm()
    assert torch.equal(got, logits(model)), "not the same bits twice"


def test_it_generates_the_same_in_and_out_of_order():
    model = ready(llama)
    options = {"max_new_tokens": 8, "do_sample": False}
    first = model.generate(ids(1), **options)
    assert ordered(model)
    for module in model.modules():
        if isinstance(module, PackedModule):
            assert module.weight_packed.dtype == torch.uint8
    assert not ordered(model)
    assert torch.equal(model.generate(ids(1), **options), first)


def test_there_and_back_between_devices():
    model = ready(llama)
    first = logits(model)
    before = sum(each.nbytes for each in model.parameters())
    model.to("cpu")
    if CUDA:
        assert not ordered(model)
    model.to(DEVICE)
    assert torch.equal(logits(model), first)
    assert sum(each.nbytes for each in model.parameters()) == before


def test_lora_trains_saves_and_merges(tmp_path):
    hook_lora()
    model = ready(llama)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([held for held in model.parameters() if held.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert ordered(model)
    trained = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(ready(llama), tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), trained)
    merged = logits(model.merge_and_unload())
    assert (merged - trained).norm() < 0.2 * trained.norm(), "merged weights are quantised anew"


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's imports
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # inductor's first, to make its pool
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_torch_compile_takes_the_kernels(used, mode):
    torch.compiler.reset()
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(2048, 512), nn.GELU(), nn.Linear(512, 2048))  # noqa: E731
    model = quantize(make().bfloat16().cuda(), report=lambda _: None)
    assert "split=1" not in model[0].explain(16), "sums that meet in memory are what graphs could get wrong"
    x = torch.randn(16, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        if used:
            model(x)
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(4):
            got = compiled(x).clone()
        assert ordered(model) == 2
    assert (got.float() - expected.float()).norm() < 1e-2 * expected.float().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_model_in_use_takes_the_memory_of_its_files():
    model = quantize(nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16), report=lambda _: None)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        model(torch.randn(4, 4096, device="cuda", dtype=torch.bfloat16))
    assert model.orders
    assert torch.cuda.memory_allocated() - before < 2**20
