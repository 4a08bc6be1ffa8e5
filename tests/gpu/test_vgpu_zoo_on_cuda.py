"""Architectures of transformers and ours, streamed to a GPU: the bits of the same model that is all there."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

pytest.importorskip("transformers", reason="needs the extra hf")

from streamed_zoo import ZOO

from apt_model.core.errors import CapacityError
from apt_model.optimization import FP4Config, VGPUStack, quantize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of transformers, and of what it imports
    pytest.mark.usefixtures("quiet_vgpu"),
]
BELOW = {"host": ((9.0, "cpu"),), "disk": ((0.6, "cpu"), (9.0, "ssd"))}


def takes_inputs(model):
    """Inputs come from the CPU, as the zoo's are there."""

    def moved(_, args, kwargs):
        return pytree.tree_map_only(torch.Tensor, lambda each: each.cuda(), (args, kwargs))

    model.register_forward_pre_hook(moved, with_kwargs=True)
    return model


def attached(model, layout):
    """A stack that streams the model, with as much of it on level 1 as it takes, from a third on."""
    size = sum(each.nbytes for each in (*model.parameters(), *model.buffers())) / 1e6
    for share in (0.3, 0.4, 0.5, 0.6, 0.75, 0.9):
        levels = ((share, "cuda:0"), *BELOW[layout])
        stack = VGPUStack({"levels": [{"capacity_mb": part * size, "device": device} for part, device in levels]})
        try:
            stack.attach(model)
        except CapacityError:
            stack.close()
        else:
            return stack
    raise AssertionError("no share of the model does")


@pytest.mark.parametrize("layout", BELOW)
@pytest.mark.parametrize(
    ("name", "packed"),
    [
        *((name, False) for name in ZOO if "generates" not in name),
        *((name, True) for name in ("llama", "mixtral", "gpt2")),
    ],
)
def test_the_zoo(name, packed, layout):
    make, call = ZOO[name]
    torch.manual_seed(0)
    model = make().eval()
    if packed:
        model = quantize(model, FP4Config(), report=lambda _: None)
    dense = takes_inputs(copy.deepcopy(model).cuda())
    with torch.no_grad():
        wanted = call(dense)
    with attached(model, layout) as stack, torch.no_grad():
        takes_inputs(model)
        for _ in range(3):
            for ours, theirs in zip(call(model), wanted, strict=True):
                assert torch.equal(ours, theirs)
        assert stack.stats()["levels"][0]["bytes_in"] > 0
        for level in stack.stats()["levels"]:
            assert level["peak_mb"] <= level["capacity_mb"]
