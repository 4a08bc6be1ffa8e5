"""Saved models that come to a GPU's levels: in the kernels' order where they are quantised, and read in place."""

import pytest
import torch

from apt_model.optimization import FP4Config, VGPUStack, quantize

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::SyntaxWarning"),  # of torchao, which transformers imports
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=256, dtype=torch.bfloat16,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("saved")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="5MB")
    return path


@pytest.mark.parametrize("packed", [None, "nvfp4", "mxfp4"])
@pytest.mark.parametrize("host", [0.3, 2.0])
def test_the_same_as_loaded_whole(folder, packed, host):
    reference = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    if packed:
        quantize(reference, FP4Config(format=packed), report=lambda _: None)
    size = sum(each.nbytes for each in reference.parameters()) / 1e6
    reference.cuda()
    levels = [(size * 0.5, "cuda:0"), (size * host, "cpu"), (size, "ssd")]
    config = {"levels": [{"capacity_mb": amount, "device": device} for amount, device in levels]}
    ids = torch.randint(0, 256, (2, 33), device="cuda")
    with torch.no_grad(), VGPUStack.load(folder, config=config, quantize=packed) as stack:
        for _ in range(3):
            assert torch.equal(stack.model(ids).logits, reference(ids).logits)
        for (name, mine), theirs in zip(stack.model.state_dict().items(), reference.state_dict().values(), strict=True):
            assert torch.equal(mine.cpu(), theirs.cpu()), name
        used = [each["used_mb"] for each in stack.stats()["levels"]]
        if host < 1:
            assert (used[2] == 0) == (packed is None)  # quantised bytes are nowhere else yet
        made = stack.model.generate(ids[:, :4], max_new_tokens=6, do_sample=False)
        assert torch.equal(made, reference.generate(ids[:, :4], max_new_tokens=6, do_sample=False))
        stack.detach(stack.model)
        assert torch.equal(stack.model(ids.cpu()).logits, reference.cpu()(ids.cpu()).logits)
