"""One of two processes that share a model in 4 bits: `python sharded_run.py RANK FOLDER CHECK...`.

They find each other by a file in FOLDER, so that no port is chosen. What does not hold is a traceback, below a line
that says what was looked at.
"""

import itertools
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing import assert_close

from apt_model.core.errors import InputError
from apt_model.layers.packed import PackedModule
from apt_model.ops import fp4
from apt_model.optimization import FP4Config, FusedFP4Linear, quantize

RANKS = (0, 1)
WIDTH, VOCAB, CLASSES = 40, 51, 13
FULL = StateDictOptions(full_state_dict=True)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.2 * torch.randn(3, 48, WIDTH))
        self.down_proj = nn.Parameter(0.2 * torch.randn(3, WIDTH, 24))

    def forward(self, x):
        both = [nn.functional.linear(x, self.gate_up_proj[i]) for i in range(3)]
        return sum(nn.functional.linear(each[..., :24], self.down_proj[i]) for i, each in enumerate(both))


class Block(nn.Module):
    """Rows that two processes cannot share evenly: 71 of them, 3 experts, and a single one."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down, self.gate = nn.Linear(WIDTH, 71), nn.Linear(71, WIDTH), nn.Linear(WIDTH, 1)
        self.experts = Experts()

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(nn.functional.gelu(self.up(y))) * self.gate(y).sigmoid() + self.experts(y)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(form, seed=0, device="cpu"):
    """All in 4 bits but norms, biases and the head, which can be trained."""
    torch.manual_seed(seed)
    model = Model().to(device)
    return quantize(model, FP4Config(format=form, skip=("head",), embeddings=True), report=str)


def shard(model, **options):
    mesh = init_device_mesh("cpu", (len(RANKS),))
    fully_shard(model.blocks[1].up, mesh=mesh, **options)  # a packed layer by itself, too
    for each in (*model.blocks, model):
        fully_shard(each, mesh=mesh, **options)
    return model


def packed_in(model):
    return [each for each in model.modules() if isinstance(each, PackedModule)]


def batch(rank):
    return torch.randint(VOCAB, (6,), generator=torch.Generator().manual_seed(rank))


def loss_of(model, rank):
    return model(batch(rank)).float().square().mean()


def mean_gradients(model):
    """What both processes together should get: the mean of the gradients of their batches."""
    sum(loss_of(model, rank) for rank in RANKS).div(len(RANKS)).backward()


def all_sharded(model):
    return all(isinstance(each, DTensor) and each.placements == (Shard(0),) for each in model.parameters())


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def full(tensor):
    """The whole of a sharded tensor; gloo has no float8, so its bytes are gathered."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).full_tensor().view(tensor.dtype)
    return tensor.full_tensor()


def shared(tensor, like):
    """The inverse of `full`."""
    placed = like.device_mesh, like.placements
    if tensor.dtype == torch.float8_e4m3fn:
        return distribute_tensor(tensor.view(torch.uint8), *placed).view(tensor.dtype)
    return distribute_tensor(tensor, *placed)


def same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        got = full(state[name]) if isinstance(state[name], DTensor) else state[name]
        assert got.dtype == tensor.dtype, name
        assert torch.equal(bits(got), bits(tensor)), name
    return True


def packed_parts(model):
    return {name: each for name, each in model.state_dict().items() if name.endswith(("_packed", "_scale"))}


# --- the checks


def check_training(form, rank, folder):
    """Outputs, gradients and steps are those of the model in one process."""
    plain, model = build(form), shard(build(form))
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    frozen = {name for name, each in plain.named_parameters() if not each.requires_grad}
    assert all_sharded(model)
    mine = [torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.01) for each in (plain, model)]
    for step in range(3):
        out = model(batch(rank))
        assert all_sharded(model.blocks), "gathered for as long as a block runs"
        if step == 0:
            assert torch.equal(out, plain(batch(rank)))
        out.square().mean().backward()
        mean_gradients(plain)
        assert all_sharded(model)
        theirs = dict(model.named_parameters())
        for name, each in plain.named_parameters():
            assert (each.grad is None) == (theirs[name].grad is None) == (name in frozen), name
            if each.grad is not None:
                assert_close(
                    theirs[name].grad.full_tensor(), each.grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: n + m
                )
        for optimizer in mine:
            optimizer.step()
            optimizer.zero_grad()
    state = model.state_dict()
    for name, tensor in plain.state_dict().items():
        if name in frozen:
            assert torch.equal(bits(full(state[name])), bits(before[name])), name
        else:
            assert not torch.equal(tensor, before[name]), name
            assert_close(full(state[name]), tensor, rtol=1e-5, atol=1e-6)


def check_state(form, rank, folder):
    """A state dict has the packed bytes: sharded, whole, and by way of torch.distributed.checkpoint."""
    plain, model = build(form), shard(build(form))
    expected = plain.state_dict()
    state = model.state_dict()
    assert all(isinstance(each, DTensor) for each in state.values())
    for name, tensor in expected.items():  # by rows, the first process's part the larger one
        half = -(-len(tensor) // len(RANKS))
        assert torch.equal(bits(state[name].to_local()), bits(tensor[half * rank : half * (rank + 1)])), name
    assert same(state, expected)

    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "saved")
    for other in (shard(build(form, seed=1)), shard(build(form, device="meta")).to_empty(device="cpu"), build(form, 1)):
        state = get_model_state_dict(other)
        dcp.load(state, checkpoint_id=folder / "saved")
        set_model_state_dict(other, state)
        assert same(other.state_dict(), expected)
        assert torch.equal(other(batch(rank)), plain(batch(rank)))

    other = shard(build(form, seed=1))
    if form == "mxfp4":  # nothing in float8
        assert same(get_model_state_dict(model, options=FULL), expected)
        set_model_state_dict(other, dict(expected), options=FULL)
        assert same(other.state_dict(), expected)
        other = shard(build(form, seed=2))
        from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(other, {} if rank else dict(expected), options=from_first)
    else:
        # Should torch's gloo learn float8, this fails: then the guide's detour by way of bytes can go, and `full` here.
        with pytest.raises(RuntimeError, match="Invalid scalar type"):
            get_model_state_dict(model, options=FULL)
        set_model_state_dict(other, {name: shared(expected[name], like) for name, like in other.state_dict().items()})
    assert same(other.state_dict(), expected)
    assert torch.equal(other(batch(rank)), plain(batch(rank)))


def check_reading(form, rank, folder):
    """Values are read while a module is gathered; types change as ever; what is sharded loads packed tensors only."""
    plain, model = build(form), shard(build(form))
    block = model.blocks[0]
    block.unshard()
    assert torch.equal(block.up.dequantize(), plain.blocks[0].up.dequantize())
    block.reshard()
    assert all_sharded(model)
    with pytest.raises(RuntimeError, match="got mixed"):
        block.up.dequantize()
    with pytest.raises(RuntimeError, match=r"blocks\.0\.up\.weight"):
        model.load_state_dict(Model().state_dict())

    model = shard(build(form)).to(torch.bfloat16)  # before the first call, as for any model of FSDP2
    assert same(packed_parts(model), packed_parts(plain))
    assert torch.equal(model(batch(rank)), plain.to(torch.bfloat16)(batch(rank)))


def check_mixed_precision(form, rank, folder):
    """bfloat16 for what is computed; float16 too where no global scale could leave its range."""
    plain, model = build(form), shard(build(form), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    plain.to(torch.bfloat16)
    out = model(batch(rank))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, plain(batch(rank)))
    out.float().square().mean().backward()
    mean_gradients(plain)
    theirs = dict(model.named_parameters())
    for name, each in plain.named_parameters():
        if each.requires_grad:
            got = theirs[name].grad.full_tensor()
            assert got.dtype == torch.float32
            assert (got - each.grad.float()).norm() < 1e-2 * each.grad.float().norm(), name
    torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1).step()
    assert model(batch(rank)).isfinite().all()
    assert same(packed_parts(model), packed_parts(plain))

    model = shard(build(form), mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16))
    if form == "mxfp4":
        assert torch.equal(model(batch(rank)), build(form).half()(batch(rank)))
        return
    with pytest.raises(InputError, match="take bfloat16 for FSDP's param_dtype"):
        model(batch(rank))

    # A global scale of another program need be no power of two: FSDP rounds it.
    plain, model = build(form).to(torch.bfloat16), build(form)
    model.blocks[0].up.weight_global_scale.fill_(1000.3)
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    plain.blocks[0].up.weight_global_scale.fill_(1000)
    assert torch.equal(model(batch(rank)), plain(batch(rank)))
    assert full(model.blocks[0].up.weight_global_scale).item() == pytest.approx(1000.3)


def check_order(form, rank, folder):
    """A weight in the kernels' order refuses; one that was read before is sharded, and stays in the order of files."""
    plain = build(form).to(torch.bfloat16)
    expected = plain(batch(rank))
    real, halves = fp4.wants_order, (torch.bfloat16, torch.float16)
    fp4.wants_order = lambda *asked: asked[-1] in halves  # as on a GPU whose kernels take weights in an order of theirs

    used = build(form).to(torch.bfloat16)
    used(batch(rank))
    layer = used.blocks[1].up
    assert layer.orders
    mesh = init_device_mesh("cpu", (len(RANKS),))
    with pytest.raises(InputError, match="kernels' order and cannot be sharded"):
        fully_shard(layer, mesh=mesh)
    assert layer.orders
    assert torch.equal(layer(torch.ones(1, WIDTH).bfloat16()), plain.blocks[1].up(torch.ones(1, WIDTH).bfloat16()))
    assert same(used.state_dict(), plain.state_dict())
    assert layer.weight_packed.dtype == torch.uint8
    with pytest.raises(AssertionError, match="already been applied"):  # torch's mark, set before it asks for anything
        fully_shard(layer, mesh=mesh)

    model = build(form).to(torch.bfloat16)
    model(batch(rank))
    in_order = [each for each in packed_in(model) if each.orders]
    assert sum(isinstance(each, FusedFP4Linear) for each in in_order) == 6
    for each in in_order:
        for name in each.slots:
            assert getattr(each, f"{name}_packed").dtype == torch.uint8
    shard(model)
    for _ in range(2):
        out = model(batch(rank))
        assert torch.equal(out, expected)
        out.sum().backward()
        assert not any(each.orders for each in packed_in(model))
    assert same(model.state_dict(), plain.state_dict())
    fp4.wants_order = real


def main(rank, folder, *checks):
    rank, folder = int(rank), Path(folder)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=len(RANKS),
        timeout=timedelta(seconds=20),
    )
    for check, form in itertools.product(checks, ("nvfp4", "mxfp4")):
        print(check, form, flush=True)
        globals()[f"check_{check}"](form, rank, folder / form)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
