"""Models that come from their files to the levels: the same results as loaded whole, and never whole in memory."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from apt_model.core.errors import CapacityError, CheckpointError, ConfigError, StorageError
from apt_model.modeling.apt_model import APTModel
from apt_model.modeling.configuration import APTModelConfiguration
from apt_model.optimization import FP4Config, VGPUStack, quantize

transformers = pytest.importorskip("transformers")
# What a model of transformers says of its own configuration in these sizes is no concern here.
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

_SMALL = {"num_attention_heads": 4, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128}


def llama(**options):
    config = transformers.LlamaConfig(num_hidden_layers=5, num_key_value_heads=2, **_SMALL, **options)
    return transformers.LlamaForCausalLM(config)


def mixtral():
    config = transformers.MixtralConfig(
        num_hidden_layers=3, num_key_value_heads=2, num_local_experts=4, **{**_SMALL, "intermediate_size": 96}
    )
    return transformers.MixtralForCausalLM(config)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=64, n_layer=4, n_head=4, vocab_size=128, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    )


def bert():
    return transformers.BertModel(transformers.BertConfig(num_hidden_layers=4, **_SMALL))


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=64, d_ff=128, num_layers=3, num_heads=4, d_kv=16, vocab_size=128)
    )


MODELS = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "mixtral": mixtral,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each model, in each type, made once."""
    folders = {}

    def of(name, dtype=torch.float32):
        if (name, dtype) not in folders:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("saved")
            MODELS[name]().to(dtype).save_pretrained(folder)
            folders[name, dtype] = folder
        return folders[name, dtype]

    return of


def whole(name, folder):
    return type(MODELS[name]()).from_pretrained(folder).eval()


def levels(*sizes):
    return {"levels": [{"capacity_mb": size, "device": device} for device, size in sizes]}


def inputs(name):
    ids = torch.randint(0, 128, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("dtype", "packed"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "nvfp4"), (torch.bfloat16, "mxfp4")],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_as_loaded_whole(saved, name, dtype, packed):
    folder = saved(name, dtype)
    reference = whole(name, folder)
    if packed:
        quantize(reference, FP4Config(format=packed), report=lambda _: None)
    size = sum(each.nbytes for each in reference.parameters()) / 1e6
    with torch.no_grad():
        want = reference(**inputs(name))[0]
        for config in (levels(("cpu", size * 2)), levels(("cpu", size * 0.6), ("ssd", size * 2))):
            with VGPUStack.load(folder, config=config, quantize=packed) as stack:
                assert not stack.model.training
                assert stack.model.dtype == dtype
                for _ in range(2):
                    assert torch.equal(stack.model(**inputs(name))[0], want)
                assert [key for key, _ in stack.model.named_parameters()] == [
                    key for key, _ in reference.named_parameters()
                ]
                for (key, mine), theirs in zip(
                    stack.model.state_dict().items(), reference.state_dict().values(), strict=True
                ):
                    assert torch.equal(mine, theirs), key
                if len(config["levels"]) > 1:
                    assert stack.stats()["levels"][0]["bytes_in"] > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_blocks_on_the_disk_are_read_where_they_lie(saved, name):
    folder = saved(name)
    before = digest(folder)
    reference = whole(name, folder)
    size = sum(each.nbytes for each in reference.parameters()) / 1e6
    with VGPUStack.load(folder, config=levels(("cpu", size * 0.7), ("ssd", 0.001))) as stack, torch.no_grad():
        assert stack.stats()["levels"][1]["peak_mb"] == 0
        assert torch.equal(stack.model(**inputs(name))[0], reference(**inputs(name))[0])
    with VGPUStack.load(folder, config=levels(("cpu", size * 0.7), ("ssd", size * 2))) as stack, torch.no_grad():
        for model in (stack.model, reference):  # what is written to goes to a file of the stack's own
            for parameter in model.parameters():
                parameter.mul_(2)
        assert stack.stats()["levels"][1]["used_mb"] > 0
        assert torch.equal(stack.model(**inputs(name))[0], reference(**inputs(name))[0])
        stack.detach(stack.model)
        assert torch.equal(stack.model(**inputs(name))[0], reference(**inputs(name))[0])
        assert [each["used_mb"] for each in stack.stats()["levels"]] == [0, 0]
    assert digest(folder) == before


def test_a_write_for_which_the_disk_has_no_room_changes_nothing(saved):
    reference = whole("llama", saved("llama"))
    size = sum(each.nbytes for each in reference.parameters()) / 1e6
    with VGPUStack.load(saved("llama"), config=levels(("cpu", size * 0.7), ("ssd", 0.001))) as stack, torch.no_grad():
        held = stack._models[id(stack.model)]
        on_disk = next(i for i in held.places._sources if held.places._sources[i].host is None)
        with pytest.raises(CapacityError, match="written to"):
            held.blobs[on_disk].seen[0].parameter.mul_(2)
        assert torch.equal(stack.model(**inputs("llama"))[0], reference(**inputs("llama"))[0])


def test_files_that_change_under_a_model(saved, tmp_path):
    for path in saved("llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size / 1e6
    stack = VGPUStack.load(tmp_path, config=levels(("cpu", size * 0.7), ("ssd", 1)))
    os.utime(file, ns=(1, 1))

    def run_twice():  # what was read ahead is still right
        for _ in range(2):
            stack.model(**inputs("llama"))

    with pytest.raises(StorageError, match="was changed since"), torch.no_grad():
        run_twice()
    stack.close(restore=False)


def test_a_model_quantised_before(saved, tmp_path):
    from apt_model.integrations import AptFP4Config

    config = AptFP4Config(format="nvfp4")
    model = transformers.LlamaForCausalLM.from_pretrained(saved("llama"), quantization_config=config).eval()
    model.save_pretrained(tmp_path)
    size = sum(each.nbytes for each in model.parameters()) / 1e6
    with VGPUStack.load(tmp_path, config=levels(("cpu", size * 0.7), ("ssd", 0.001))) as stack, torch.no_grad():
        assert torch.equal(stack.model(**inputs("llama"))[0], model(**inputs("llama"))[0])
    with pytest.raises(ConfigError, match="quantised already"):
        VGPUStack.load(tmp_path, config=levels(("cpu", 10)), quantize="nvfp4")


@pytest.mark.parametrize("packed", [None, "nvfp4", "before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_our_own_model(tmp_path, packed, dtype):
    torch.manual_seed(0)
    config = APTModelConfiguration(
        vocab_size=128, d_model=64, num_decoder_layers=4, num_heads=4, d_ff=128, decoder_only=True, max_seq_len=32
    )
    model = APTModel(config).to(dtype)
    if packed == "before":
        quantize(model, report=lambda _: None)
    model.save_pretrained(tmp_path)
    model = APTModel.from_pretrained(tmp_path)
    if packed == "nvfp4":
        quantize(model, FP4Config(format=packed), report=lambda _: None)
    size = sum(each.nbytes for each in model.parameters()) / 1e6
    ids = torch.randint(0, 128, (2, 9))
    with torch.no_grad():
        want = model(ids)
        with VGPUStack.load(
            tmp_path, config=levels(("cpu", size * 0.8), ("ssd", size * 2)),
            model=lambda: APTModel.without_values(tmp_path), quantize="nvfp4" if packed == "nvfp4" else None,
        ) as stack:  # fmt: skip
            for _ in range(2):
                assert torch.equal(stack.model(ids), want)


class Net(nn.Module):
    """Any module: a buffer, tied weights, a parameter of its own."""

    def __init__(self, width=48):
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)) for _ in range(4))
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.table.weight
        self.gain = nn.Parameter(torch.ones(width))
        self.register_buffer("shift", torch.arange(width) / 700, persistent=False)

    def forward(self, ids):
        x = self.table(ids) * self.gain + self.shift
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.fixture
def net(tmp_path):
    torch.manual_seed(0)
    model = Net().eval()
    model.gain.data.uniform_()
    for block in model.blocks:
        block[1].running_mean.uniform_()
    tensors = {key: value for key, value in model.state_dict().items() if key != "head.weight"}
    save_file(tensors, tmp_path / "model.safetensors")
    return model


@pytest.mark.parametrize("meta", [False, True])
def test_any_module_and_its_buffers(net, tmp_path, meta):
    fresh = Net().eval()
    if meta:
        fresh.blocks.to("meta")  # with the buffers, which the files have
        fresh.table.weight = fresh.head.weight = nn.Parameter(fresh.table.weight.to("meta"))
    ids = torch.arange(20)
    with VGPUStack(levels(("cpu", 0.03), ("ssd", 1))) as stack, torch.no_grad():
        stack.attach(fresh, weights=tmp_path)
        assert fresh.head.weight is fresh.table.weight
        for _ in range(2):
            assert torch.equal(fresh(ids), net(ids))
        stack.detach(fresh)
        assert torch.equal(fresh(ids), net(ids))


def test_the_model_that_is_attached_with_weights_trains(net, tmp_path):
    fresh = Net().eval()
    ids = torch.arange(20)
    with VGPUStack(levels(("cpu", 0.05), ("ssd", 1))) as stack:
        stack.attach(fresh, weights=tmp_path)
        for model in (fresh, net):
            for _ in range(2):
                model(ids).square().mean().backward()
                torch.optim.SGD(model.parameters(), lr=1e-3).step()
        for (name, mine), theirs in zip(fresh.named_parameters(), net.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad), name
            assert torch.equal(mine.detach(), theirs.detach()), name


def parameters_of(model):
    return {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tensors: tensors.pop("blocks.1.0.bias"), "1 parameters have no values in the files: blocks.1.0.bias"),
        (lambda tensors: tensors.update({"gain": torch.ones(3)}), r"gain: expected \[48\], and the files have \[3\]"),
        (lambda tensors: tensors.pop("blocks.2.1.running_var"), "buffer blocks.2.1.running_var is on the meta device"),
    ],
)
def test_files_of_another_model(net, tmp_path, spoil, words):
    tensors = load_file(tmp_path / "model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.device("meta"):
        fresh = Net()
    fresh.shift = torch.arange(48) / 700
    before = parameters_of(fresh)
    with VGPUStack(levels(("cpu", 1))) as stack:
        with pytest.raises(CheckpointError, match=words):
            stack.attach(fresh, weights=tmp_path)
        assert parameters_of(fresh) == before
        assert [each["used_mb"] for each in stack.stats()["levels"]] == [0]


def test_a_stack_that_is_too_small_leaves_the_model_as_it_was(net, tmp_path):
    with torch.device("meta"):
        fresh = Net()
    fresh.shift = torch.arange(48) / 700
    before = parameters_of(fresh)
    with VGPUStack(levels(("cpu", 0.01))) as stack:
        with pytest.raises(CapacityError):
            stack.attach(fresh, weights=tmp_path)
        assert parameters_of(fresh) == before
        assert all(each.is_meta for each in fresh.parameters())
        assert [each["used_mb"] for each in stack.stats()["levels"]] == [0]


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        VGPUStack.load(tmp_path / "nothing", config=levels(("cpu", 1)))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"]}))
    with pytest.raises(ConfigError, match="'NoSuchModel', which transformers does not have"):
        VGPUStack.load(tmp_path, config=levels(("cpu", 1)))
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(ConfigError, match="'gptq', whose tensors are not streamed"):
        VGPUStack.load(tmp_path, config=levels(("cpu", 1)))


def test_the_process_never_holds_more_than_the_model_once(tmp_path):
    """Peak of resident memory while building, over the model's bytes: 1.02 and what one reading thread needs."""
    blocks, width = 24, 1024
    tensors = {f"blocks.{i}.{j}.weight": torch.randn(width, 4096) for i in range(blocks) for j in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    size = sum(each.nbytes for each in tensors.values())
    script = f"""
        import torch
        from torch import nn
        from apt_model.optimization import VGPUStack
        def peak():
            text = open("/proc/self/status").read()
            return int(text.partition("VmHWM:")[2].split()[0]) * 1024
        with torch.device("meta"):
            model = nn.Module()
            model.blocks = nn.ModuleList(
                nn.ModuleList(nn.Linear(4096, {width}, bias=False) for _ in range(2)) for _ in range({blocks})
            )
        warm = VGPUStack({{"levels": [{{"capacity_mb": 1, "device": "cpu"}}]}})
        warm.attach(nn.Linear(4, 4))
        open("/proc/self/clear_refs", "w").write("5")
        before = peak()
        stack = VGPUStack({{"levels": [{{"capacity_mb": {size / 1e6 + 10}, "device": "cpu"}}]}})
        stack.attach(model, weights={str(tmp_path)!r})
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True, timeout=120
    )
    assert size < int(done.stdout) <= 1.02 * size
