"""A streamed model computes what it computed before, bit for bit: architectures of transformers, and hard modules."""

# ruff: noqa: E402 - what needs an extra is imported after the skip

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

tf = pytest.importorskip("transformers", reason="needs the extra hf")

import small_models
from streamed_zoo import TOKENS, ZOO, gpt2, llama, logits, t5

from apt_model.core.errors import CapacityError, InputError
from apt_model.optimization import FP4Config, VGPUStack, quantize

LAYOUTS = {"host": ["cpu"], "disk": ["ssd"], "both": ["cpu", "ssd"]}
pytestmark = pytest.mark.usefixtures("quiet_vgpu")


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    tf.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()


def nbytes(model):
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
                for each in (*model.parameters(), *model.buffers())}  # fmt: skip
    return sum(storages.values())


@contextlib.contextmanager
def attached(model, layout="host", *, share=0.5, slots=3, path=None):
    """A stack that streams `model`: about `share` of it on level 1, most of the rest on a disk if there is one."""
    total = nbytes(model)
    sizes = [total * share, *({"cpu": total * 0.15, "ssd": total * 9}[kind] for kind in LAYOUTS[layout])]
    if layout == "host":
        sizes[1] = total * 9
    stack = None
    while stack is None:
        levels = [{"capacity_mb": size / 1e6, "device": kind}
                  for size, kind in zip(sizes, ["cpu", *LAYOUTS[layout]], strict=True)]  # fmt: skip
        if path is not None:
            levels[-1]["path"] = str(path)
        stack = VGPUStack({"levels": levels, "slots": slots})
        try:
            stack.attach(model)
        except CapacityError as error:
            stack.close()
            stack = None
            sizes[0 if error.remedy.startswith("give level 1") else 1] *= 1.1
            if sizes[0] > total * 1.2:
                raise
    with stack:
        yield stack
        for level in stack.stats()["levels"]:
            assert level["peak_mb"] <= level["capacity_mb"]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def same_state(model, state):
    now = model.state_dict()
    assert list(now) == list(state)
    for name, value in state.items():
        assert torch.equal(now[name], value), name


def check(model, call, layout, **options):
    """Every way in which the streamed model could differ."""
    with torch.no_grad():
        state = {name: value.clone() for name, value in model.state_dict().items()}
        want = [call(model) for _ in range(2)]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with attached(model, layout, **options) as stack:
        same_state(model, state)
        for expected in want:
            with torch.no_grad():
                same(call(model), expected)
        same_state(model, state)
        stats = stack.stats()["levels"]
        assert stats[0]["bytes_in"] > 0
        assert stats[-1]["used_mb"] > 0
        assert dict(model.named_parameters(remove_duplicate=False)).keys() == parameters.keys()
        stack.detach(model)
        assert [level["used_mb"] for level in stack.stats()["levels"]] == [0] * len(stats)
        with torch.no_grad():
            same(call(model), want[0])
    same_state(model, state)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter is parameters[name]
        assert type(parameter) is nn.Parameter


def outputs(result):
    """The tensors of a model's result."""
    if isinstance(result, torch.Tensor):
        return [result]
    values = (
        result.values()
        if isinstance(result, dict)
        else vars(result).values()
        if hasattr(result, "__dict__")
        else result
    )
    return [each for each in values if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name, layout):
    make, call = ZOO[name]
    check(make().eval(), lambda model: [each for one in call(model) for each in outputs(one)], layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_the_zoo_in_fp4(name, layout):
    make, call = ZOO[name]
    model = quantize(make(), FP4Config(format="nvfp4")).eval()
    check(model, call, layout, share=0.7)


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_more_and_fewer_slots(slots):
    check(llama(tie_word_embeddings=True).eval(), logits, "both", slots=slots)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generation_with_a_cache(layout):
    check(llama().eval(), lambda model: [model.generate(TOKENS, max_new_tokens=8, do_sample=False)], layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [llama, gpt2, t5], ids=["llama", "gpt2", "t5"])
def test_saved_while_streamed(make, layout, tmp_path):
    model = make().eval()
    with torch.no_grad():
        want = logits(model)
    model.save_pretrained(tmp_path / "before")
    with attached(model, layout):
        model.save_pretrained(tmp_path / "while")
    names = [sorted(each.name for each in (tmp_path / folder).iterdir()) for folder in ("before", "while")]
    assert names[0] == names[1]
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("before", "while")]
    assert sizes[0] == sizes[1]
    with torch.no_grad():
        same(logits(type(model).from_pretrained(tmp_path / "while").eval()), want)


WIDTH = 32


class Block(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Blocks(nn.Module):
    """Eight blocks, one after another; those below change what is needed."""

    def __init__(self, kind=Block, count=8):
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(count))
        self.order = list(range(count))

    def forward(self, x):
        for i in self.order:
            x = self.layers[i](x)
        return x


class Twice(Blocks):
    def forward(self, x):
        for layer in (*self.layers, *self.layers, self.layers[3], self.layers[3]):
            x = layer(x) * 0.5
        return x


class ReadsAnother(Blocks):
    """Reads parameters of blocks that do not run, by attribute and by references kept."""

    def __init__(self):
        super().__init__()
        self.kept = [layer.up.weight for layer in self.layers]

    def forward(self, x):
        for layer, kept in zip(self.layers, self.kept, strict=True):
            x = layer(F.linear(F.linear(x, kept), self.layers[0].down.weight) * 0.1)
        return F.linear(x, self.layers[-1].up.weight, self.layers[2].up.bias)


class ReadsWithin(nn.Module):
    """A block that reads many others of which it knows without owning them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(8))
        self.layers.append(_Reader(self.layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class _Reader(nn.Module):
    def __init__(self, others):
        super().__init__()
        self.own, self.others = nn.Linear(WIDTH, WIDTH), [layer.up for layer in others]

    def forward(self, x):
        return self.own(x + sum(F.linear(x, other.weight)[..., :WIDTH] for other in self.others))


class OfItsOwn(Blocks):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(small_models.noise(WIDTH))

    def forward(self, x):
        return super().forward(x * self.scale) * self.scale


class Returns(Block):
    def forward(self, x):
        return super().forward(x), self.up.weight, self.down.weight[1:3], {"of": [self.up.bias, self.down.weight.T]}


class GetsReturned(Blocks):
    def forward(self, x):
        kept = []
        for layer in self.layers:
            x, *rest = layer(x)
            kept.append(rest)
        for weight, rows, named in kept:
            x = x + F.linear(F.linear(x, weight), named["of"][1].T) * 0.01 + named["of"][0][:WIDTH] + rows[0, :WIDTH]
        return x


class ReturnsOutput(Block):
    def forward(self, x):
        return tf.modeling_outputs.BaseModelOutput(last_hidden_state=super().forward(x), hidden_states=self.up.weight)


class GetsOutput(Blocks):
    def forward(self, x):
        kept = []
        for layer in self.layers:
            result = layer(x)
            x = result.last_hidden_state
            kept.append(result.hidden_states)
        return F.linear(x, sum(kept))


class Transposed(Block):
    def __init__(self):
        super().__init__()
        self.up.weight = nn.Parameter(self.up.weight.detach().t().contiguous().t())
        self.flat = nn.Parameter(small_models.noise(WIDTH, 2)[:, 1])

    def forward(self, x):
        assert not self.up.weight.is_contiguous()
        assert self.flat.stride() == (2,)
        return super().forward(x) + self.flat


class Empty(Block):
    def __init__(self):
        super().__init__()
        self.nothing, self.none = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(3, 0))

    def forward(self, x):
        return super().forward(x) + self.nothing.sum() + self.none.sum()


class Mixed(Block):
    def __init__(self):
        super().__init__()
        self.of_half = nn.Parameter(small_models.noise(WIDTH, dtype=torch.float16))
        self.of_brain = nn.Parameter(small_models.noise(3, WIDTH, dtype=torch.bfloat16))
        self.of_double = nn.Parameter(small_models.noise(WIDTH, dtype=torch.float64))
        self.of_whole = nn.Parameter(torch.arange(WIDTH), requires_grad=False)
        self.of_turned = nn.Parameter(torch.view_as_complex(small_models.noise(WIDTH, 2)))
        self.mask = nn.Parameter(torch.arange(WIDTH) % 3 == 0, requires_grad=False)

    def forward(self, x):
        x = super().forward(x)[..., self.of_whole] + self.of_half + self.of_brain.sum(0) * self.mask
        return (x + self.of_double + self.of_turned.abs()).float()


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x)[0]


class OneStorage(Block):
    """Its parameters are views of one piece of memory, and two of them overlap."""

    def __init__(self):
        super().__init__()
        flat = torch.cat([self.up.weight.detach().flatten(), self.down.weight.detach().flatten()])
        self.up.weight = nn.Parameter(flat[: self.up.weight.numel()].view_as(self.up.weight))
        self.down.weight = nn.Parameter(flat[self.up.weight.numel() :].view_as(self.down.weight))
        self.row = nn.Parameter(flat[5 : 5 + WIDTH])

    def forward(self, x):
        return super().forward(x) + self.row


def transformer_encoder():
    """Has a fast path that a parameter of another class than torch's own would turn off."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


MODULES = {
    "blocks": Blocks,
    "twice in a forward": Twice,
    "reads another's parameters": ReadsAnother,
    "a block reads many others'": ReadsWithin,
    "a parameter of the parent": OfItsOwn,
    "returns its own parameters": lambda: GetsReturned(Returns),
    "returns its own in a ModelOutput": lambda: GetsOutput(ReturnsOutput),
    "not contiguous": lambda: Blocks(Transposed),
    "without elements": lambda: Blocks(Empty),
    "mixed dtypes": lambda: Blocks(Mixed),
    "attention": lambda: Blocks(Attends),
    "views of one storage": lambda: Blocks(OneStorage),
    "transformer encoder": transformer_encoder,
    "nested lists": lambda: nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(nn.Sequential(Block()))),
}  # fmt: skip
X = small_models.noise(3, 5, WIDTH, seed=7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, layout):
    check(MODULES[name]().eval(), lambda model: [model(X)], layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_that_has_the_only_slot_reads_others(layout):
    check(ReadsWithin().eval(), lambda model: [model(X)], layout, share=0.3, slots=1)


# Where level 1 holds a fraction of a block, blocks are taken apart into their own modules.
@pytest.mark.parametrize("make", [lambda: Blocks(Attends, 2), transformer_encoder, lambda: Blocks(Block, 2)])
def test_blocks_taken_apart(make):
    check(make().eval(), lambda model: [model(X)], "host", share=0.3)


def twins(make=Blocks, layout="host", **options):
    model = make().eval()
    return model, copy.deepcopy(model), attached(model, layout, **options)


layouts = pytest.mark.parametrize("layout", LAYOUTS)


@layouts
def test_depth_and_order_change_between_calls(layout):
    model, reference, streamed = twins(layout=layout)
    with streamed, torch.no_grad():
        for order in (
            [0, 1, 2],
            [0, 1, 2, 3, 4, 5, 6, 7],
            [7, 6, 5, 4, 3, 2, 1, 0],
            [3],
            [],
            [1, 1, 5, 1, 5, 5, 0],
            [2, 0, 7],
        ):
            model.order = reference.order = order
            for _ in range(2):
                same([model(X)], [reference(X)])


@layouts
def test_buffers_that_are_updated(layout):
    class Normed(Block):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x):
            return self.norm(super().forward(x).transpose(1, 2)).transpose(1, 2)

    model, reference, streamed = twins(lambda: Blocks(Normed), layout)
    model.train(), reference.train()
    with streamed, torch.no_grad():
        for _ in range(3):
            same([model(X)], [reference(X)])
        same_state(model, reference.state_dict())
    same_state(model, reference.state_dict())


@layouts
def test_a_block_that_changes_its_own_weight(layout):
    class Grows(Block):
        def forward(self, x):
            with torch.no_grad():
                self.up.weight.mul_(1.1)
            return super().forward(x)

    model, reference, streamed = twins(lambda: Blocks(Grows), layout)
    with streamed:
        for _ in range(3):
            with torch.no_grad():
                same([model(X)], [reference(X)])
        same_state(model, reference.state_dict())
    same_state(model, reference.state_dict())


@layouts
def test_loading_while_streamed(layout):
    model, reference, streamed = twins(layout=layout)
    fresh = Blocks().state_dict()
    with streamed, torch.no_grad():
        same([model(X)], [reference(X)])
        model.load_state_dict(fresh)
        reference.load_state_dict(fresh)
        for _ in range(3):
            same([model(X)], [reference(X)])
        same_state(model, fresh)
    same_state(model, fresh)


@layouts
def test_a_copy_of_a_streamed_model_is_a_model_of_its_own(layout):
    model, reference, streamed = twins(layout=layout)
    with streamed as stack, torch.no_grad():
        copied = copy.deepcopy(model)
        assert all(type(each) is nn.Parameter for each in copied.parameters())
        came = stack.stats()["levels"][0]["bytes_in"]
        same([copied(X)], [reference(X)])
        assert stack.stats()["levels"][0]["bytes_in"] == came
        for each in copied.parameters():
            each.zero_()
        same([model(X)], [reference(X)])
    assert not copied(X).equal(reference(X))


@layouts
def test_values_are_read_while_streamed(layout):
    model, reference, streamed = twins(layout=layout)
    reads = (
        lambda model: sum(each.sum() for each in model.parameters()),
        lambda model: nn.utils.parameters_to_vector(model.parameters()),
        lambda model: torch.cat([each.data.flatten() for each in model.parameters()]),
        lambda model: torch.stack([layer.up.weight for layer in model.layers]),
        lambda model: model.layers[0].up.weight @ model.layers[5].down.weight,
        lambda model: torch.tensor(model.layers[2].up.weight.tolist()),
    )
    with streamed:
        for read in reads:
            for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
                with mode():
                    assert torch.equal(read(model), read(reference))
                    same([model(X)], [reference(X)])
        kept = [read(model).detach() for read in reads]
        model(X)
        for value, read in zip(kept, reads, strict=True):
            assert torch.equal(value, read(reference))


@layouts
def test_arrays_of_numpy_keep_their_values(layout):
    model, reference, streamed = twins(layout=layout)
    model.requires_grad_(False)
    with streamed, torch.no_grad():
        arrays = [each.numpy() for each in model.parameters()]
        model(X)
        for array, each in zip(arrays, reference.parameters(), strict=True):
            assert (array == each.numpy()).all()


WRITES = {
    "mul_": lambda each: each.mul_(1.5),
    "add_": lambda each: each.add_(each, alpha=0.5),
    "copy_": lambda each: each.copy_(torch.ones_like(each)),
    "set an item": lambda each: each.__setitem__(0, 3.0),
    "set data": lambda each: setattr(each, "data", torch.full_like(each, 0.1)),
    "init": lambda each: nn.init.constant_(each, 0.2),
    "out": lambda each: torch.mul(each, 2, out=each),
}


@layouts
@pytest.mark.parametrize("write", WRITES)
def test_writes_go_through(write, layout):
    model, reference, streamed = twins(layout=layout)
    with streamed, torch.no_grad():
        same([model(X)], [reference(X)])
        for each in (*model.parameters(), *reference.parameters()):
            WRITES[write](each)
        for _ in range(2):
            same([model(X)], [reference(X)])
        same(list(model.parameters()), list(reference.parameters()))
        same_state(model, reference.state_dict())
    same_state(model, reference.state_dict())


# A view of what is away is a copy. What is written there must reach the parameter, or be refused.
LOSES = {
    "data": lambda each: each.data.mul_(1.5),
    "detach": lambda each: each.detach().mul_(1.5),
    "a row": lambda each: each[0].fill_(2.0),
    "a view": lambda each: each.view(-1).mul_(1.5),
}


@pytest.mark.parametrize("write", LOSES)
def test_no_write_is_lost_silently(write):
    model, reference, streamed = twins()
    with streamed, torch.no_grad():
        for each, other in zip(model.parameters(), reference.parameters(), strict=True):
            try:
                LOSES[write](each)
            except (InputError, RuntimeError):
                continue
            LOSES[write](other)
        same([model(X)], [reference(X)])


@pytest.mark.parametrize("slots", [1, 3])
def test_a_disk_of_just_the_right_size_takes_writes(slots):
    model = Blocks()
    with attached(model, "disk") as stack:
        used = stack.stats()["levels"]
    first, disk = used[0]["capacity_mb"], used[1]["used_mb"]
    levels = [{"capacity_mb": first, "device": "cpu"}, {"capacity_mb": disk, "device": "ssd"}]
    with VGPUStack({"levels": levels}) as stack, torch.no_grad():
        stack.attach(model)
        for each in model.parameters():
            each.fill_(0.5)
    assert all((each == 0.5).all() for each in model.parameters())


@layouts
def test_training_steps(layout):
    model, reference, streamed = twins(layout=layout)
    with streamed:
        for one in (model, reference):
            optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
            for _ in range(3):
                optimizer.zero_grad()
                one(X).square().mean().backward()
                nn.utils.clip_grad_norm_(one.parameters(), 0.1)
                optimizer.step()
        same(list(model.parameters()), list(reference.parameters()))
    same_state(model, reference.state_dict())


@layouts
def test_a_state_dict_outlives_the_stack(layout):
    model, reference, streamed = twins(layout=layout)
    with streamed as stack, torch.no_grad():
        state = model.state_dict()
        model(X)
        stack.detach(model)
        stack.attach(Blocks())  # takes the memory that is free now
        for name, value in reference.state_dict().items():
            assert torch.equal(state[name], value), name
    for name, value in reference.state_dict().items():
        assert torch.equal(state[name], value), name


def test_a_failed_state_dict_leaves_nothing_on_the_host():
    model, reference, streamed = twins()

    def fail(*_):
        raise ValueError("mine")

    with streamed, torch.no_grad():
        handle = model.layers[2].register_state_dict_post_hook(fail)
        with pytest.raises(ValueError, match="mine"):
            model.state_dict()
        handle.remove()
        same([model(X)], [reference(X)])


@layouts
def test_inference_mode(layout):
    model, reference, streamed = twins(layout=layout)
    with torch.inference_mode(), streamed:
        for _ in range(2):
            same([model(X)], [reference(X)])
        assert torch.equal(model.layers[1].up.weight.sum(), reference.layers[1].up.weight.sum())
    for one in (model, reference):
        one(X).sum().backward()
    same([each.grad for each in model.parameters()], [each.grad for each in reference.parameters()])


def test_moves_that_change_nothing_and_such_that_cannot_be():
    model, reference, streamed = twins()
    with streamed, torch.no_grad():
        model.float().cpu().to("cpu").train().eval()
        with pytest.raises(InputError, match="detach"):
            model.half()
        same([model(X)], [reference(X)])
        str(model), repr(model.layers[0].up.weight)
