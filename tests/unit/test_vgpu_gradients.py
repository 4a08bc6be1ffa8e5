"""Gradients through a streamed model are those of the model as it was, bit for bit, however slots are used again."""

import contextlib
import copy

import pytest
import torch
from small_models import noise
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from apt_model.core.errors import AptError
from apt_model.optimization import VGPUStack
from apt_model.vgpu.values import Values

pytestmark = pytest.mark.usefixtures("quiet_vgpu")
WIDTH, DEPTH = 16, 10
X = noise(4, WIDTH, seed=1)


class Block(nn.Module):
    """Its gradients need its weights in many kinds of nodes; `extra` is a LoRA-like addition from outside."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.scale, self.calls = nn.Parameter(noise(WIDTH)), 0

    def forward(self, x, extra=None):
        self.calls += 1
        y = self.up(self.norm(x) * self.scale)
        if extra is not None:
            y = y + x @ extra[0] @ extra[1]
        with torch.enable_grad():
            return x + self.down(F.silu(y) * y.tanh())


class Model(nn.Module):
    """Blocks, of which the first and the last and one between may share weights."""

    def __init__(self, *, tied=False, checkpointed=None):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        self.checkpointed = checkpointed
        if tied:
            self.layers[4].up.weight = self.layers[-1].up.weight = self.layers[0].up.weight

    def forward(self, x, extras=()):
        for i, layer in enumerate(self.layers):
            extra = extras[i] if extras else None
            if self.checkpointed is None:
                x = layer(x, extra)
            else:
                x = checkpoint(layer, x, extra, use_reentrant=self.checkpointed == "reentrant")
        return x


@contextlib.contextmanager
def streamed(model, layout="host", slots=3, share=0.5):
    total = sum(each.untyped_storage().nbytes() for each in model.parameters()) / 1e6
    below = {"host": [(99, "cpu")], "disk": [(99, "ssd")], "both": [(total * 0.45, "cpu"), (99, "ssd")]}[layout]
    levels = [{"capacity_mb": mb, "device": device} for mb, device in ((total * share, "cpu"), *below)]
    with VGPUStack({"levels": levels, "slots": slots}) as stack:
        stack.attach(model)
        (held,) = stack._models.values()
        # Else slots would not be used again between a block's forward and its backward.
        assert sum(home != 0 for home in held.layout.plan.homes) > 1.5 * held.layout.plan.slots
        yield stack


def extras():
    return [
        tuple(noise(*shape, seed=i).mul(0.1).requires_grad_() for shape in ((WIDTH, 2), (2, 64))) for i in range(DEPTH)
    ]


def gradients(model, step, train=True):
    """Of the input, of what is added, and of all weights, after `step`."""
    model.zero_grad()
    model.requires_grad_(train)
    x, added = X.clone().requires_grad_(), extras()
    step(model, x, added)
    found = [x.grad, *(each.grad for pair in added for each in pair), *(each.grad for each in model.parameters())]
    assert all(each is None or each.isfinite().all() for each in found)
    return found


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


def once(model, x, added):
    model(x, added).square().sum().backward()


def accumulated(model, x, added):
    once(model, x, added)
    model(x * 2, added).sum().backward()


def retained(model, x, added):
    loss = model(x, added).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def two_forwards(model, x, added):
    first = model(x, added)
    (first * model(x * 0.5, added)).sum().backward()


def without_extras(model, x, added):
    model(x).square().sum().backward()


def within_no_grad(model, x, added):
    with torch.no_grad():
        y = model(x, added)  # whose blocks switch gradients on
    y.square().sum().backward()


def by_grad(model, x, added):
    wanted = [
        x,
        *(each for pair in added for each in pair),
        *(each for each in model.parameters() if each.requires_grad),
    ]
    found = torch.autograd.grad(model(x, added).square().sum(), wanted, allow_unused=True)
    for each, grad in zip(wanted, found, strict=True):
        each.grad = grad


def of_one_by_grad(model, x, added):
    loss = model(x, added).square().sum()
    (x.grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    (added[3][0].grad,) = torch.autograd.grad(loss, added[3][0])


def after_another_forward(model, x, added):
    loss = model(x, added).square().sum()
    with torch.no_grad():
        model(x)
    for layer in reversed(model.layers):
        layer(x)
    loss.backward()


def with_weights_in_the_loss(model, x, added):
    penalty = sum(each.square().sum() for each in model.parameters())
    (model(x, added).square().sum() + penalty * x.sum()).backward()


def with_another_weight(model, x, added):
    y = F.linear(model(x, added), model.layers[0].up.weight * model.layers[6].up.weight)
    y.square().sum().backward()


def reads_during_backward(model, x, added):
    y = model(x, added)
    y.register_hook(lambda grad: grad + 0 * model.layers[5].up.weight.detach().sum())
    y.square().sum().backward()


STEPS = [once, accumulated, retained, two_forwards, without_extras, within_no_grad, by_grad, of_one_by_grad,
         after_another_forward, with_weights_in_the_loss, with_another_weight, reads_during_backward]  # fmt: skip
layouts = pytest.mark.parametrize("layout", ["host", "disk", "both"])


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("train", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@layouts
def test_a_slot_that_is_used_again_changes_no_gradient(layout, tied, train, step):
    model = Model(tied=tied)
    want = gradients(copy.deepcopy(model), step, train)
    with streamed(model, layout):
        for _ in range(2):
            assert equal(gradients(model, step, train), want)
        model.zero_grad()
    assert equal(gradients(model, step, train), want)


def test_that_test_can_fail(monkeypatch):
    model = Model()
    want = gradients(copy.deepcopy(model), once, train=False)
    # Without its version, of which autograd would notice that it has changed.
    monkeypatch.setattr(Values, "pack", lambda _, _around, tensor: tensor.data if tensor.requires_grad else tensor)
    monkeypatch.setattr(Values, "unpack", lambda _, tensor: tensor)
    with streamed(model, "disk"):
        assert not equal(gradients(model, once, train=False), want)


@pytest.mark.parametrize("slots", [1, 2, 6])
@layouts
def test_more_and_fewer_slots(layout, slots):
    model = Model()
    want = gradients(copy.deepcopy(model), two_forwards)
    with streamed(model, layout, slots=slots, share=0.65 if slots == 6 else 0.5):
        assert equal(gradients(model, two_forwards), want)


@pytest.mark.parametrize("train", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", ["reentrant", "not"])
@pytest.mark.parametrize("step", [once, accumulated, two_forwards], ids=lambda step: step.__name__)
@layouts
def test_checkpointed(layout, step, kind, train):
    model = Model(checkpointed=kind)
    reference = copy.deepcopy(model)
    want = gradients(reference, step, train)
    with streamed(model, layout):
        assert equal(gradients(model, step, train), want)
    # As often as without a stack: what is checkpointed is not kept but computed again.
    assert [layer.calls for layer in model.layers] == [layer.calls for layer in reference.layers]


def test_hooks_of_the_callers_see_what_is_saved():
    """As in `torch.autograd.graph.save_on_cpu`: activations go through them, in as many calls of either."""
    counts = []
    model = Model()
    for context in (contextlib.nullcontext(), streamed(model)):
        count = [0, 0]

        def packed(tensor, count=count):
            count[0] += 1
            return tensor.clone()

        def unpacked(tensor, count=count):
            count[1] += 1
            return tensor

        with context:
            model.requires_grad_(False)
            with torch.autograd.graph.saved_tensors_hooks(packed, unpacked):
                loss = model(X.clone().requires_grad_()).square().sum()
            loss.backward()
        counts.append(count)
    weights = 5 * DEPTH  # which the stack keeps by itself where they are streamed
    for ours, theirs in zip(counts[1], counts[0], strict=True):
        assert theirs - weights <= ours <= theirs


@layouts
def test_gradients_of_gradients(layout):
    model = Model()

    def step(model, x, added):
        (grad,) = torch.autograd.grad(model(x, added).square().sum(), x, create_graph=True)
        grad.square().sum().backward()

    want = gradients(copy.deepcopy(model), step)
    with streamed(model, layout):
        assert equal(gradients(model, step), want)


class _Product(torch.autograd.Function):
    """Takes all saved tensors first and computes then."""

    @staticmethod
    def forward(ctx, x, v, w):
        ctx.save_for_backward(x, v, w)
        return x @ v.t() @ w.t()

    @staticmethod
    def backward(ctx, grad):
        x, v, w = ctx.saved_tensors
        return grad @ w @ v, (grad @ w).t() @ x, grad.t() @ (x @ v.t())


@pytest.mark.parametrize("kind", ["function", "product", "linear"])
@pytest.mark.parametrize("slots", [2, 3])
@layouts
def test_a_node_with_weights_of_two_blocks(layout, slots, kind):
    class Two(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.own, self.other = nn.Linear(WIDTH, WIDTH, bias=False), [other]

        def forward(self, x):
            v, w = self.own.weight, self.other[0].weight
            if kind == "function":
                return _Product.apply(x, v, w)
            return F.linear(x, v * w) if kind == "product" else F.linear(F.linear(x, v), w)

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.sources = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
            self.layers = nn.ModuleList(Two(each) for each in self.sources)

        def forward(self, x, _added):
            for layer, source in zip(self.layers, self.sources, strict=True):
                x = source(layer(x))
            return x

    model = Chain()
    reference = Chain()
    reference.load_state_dict(model.state_dict())
    want = gradients(reference, once)
    with streamed(model, layout, slots=slots):
        for _ in range(3):
            assert equal(gradients(model, once), want)


def test_weights_that_change_before_backward_are_noticed():
    model = Model()
    with streamed(model):
        loss = model(X).square().sum()
        with torch.no_grad():
            for each in model.parameters():
                each.mul_(2)
        with pytest.raises((RuntimeError, AptError)):
            loss.backward()


@layouts
def test_backward_after_detaching(layout):
    """Right, or an error that says what to do; never what lies in memory that is somebody else's by then."""
    model = Model()
    want = gradients(copy.deepcopy(model), once)

    def step(model, x, added):
        loss = model(x, added).square().sum()
        stack.detach(model)
        stack.attach(other)
        loss.backward()

    other = Model()
    with streamed(model, layout) as stack:
        try:
            found = gradients(model, step)
        except AptError as error:
            told = error
        else:
            told = None
            assert equal(found, want)
        assert told is None or "attach" in str(told)


@layouts
def test_training_after_inference_mode(layout):
    model = Model()
    want = gradients(copy.deepcopy(model), once)
    with streamed(model, layout):
        with torch.inference_mode():
            model(X)
            for each in model.parameters():
                each.sum()
        assert equal(gradients(model, once), want)


def test_hooks_on_parameters_see_them_while_they_are_away():
    model = Model()
    reference = copy.deepcopy(model)
    with streamed(model):
        for one in (model, reference):
            for each in one.parameters():
                each.register_post_accumulate_grad_hook(_descend)
            once(one, X, ())
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.grad is None


def _descend(parameter):
    with torch.no_grad():
        parameter.sub_(parameter.grad, alpha=0.1)
    parameter.grad = None
