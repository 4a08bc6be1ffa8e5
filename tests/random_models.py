"""Small models drawn from a seed: every kind of parameter and of tie that a stack has to keep as it is."""

import random

import torch
from small_models import noise
from torch import nn
from torch.nn import functional as F

from apt_model.optimization import FP4Config, quantize

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class StopError(Exception):
    """What a model raises where it is told to."""


class Raises(torch.autograd.Function):
    """Raises `StopError` in its backward while its model says so."""

    @staticmethod
    def forward(ctx, x, model):
        ctx.model = model
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.model.stops_backward:
            raise StopError
        return grad, None


class Mlp(nn.Module):
    def __init__(self, chance, width):
        super().__init__()
        hidden = chance.choice([1, 3, width, 4 * width, 128])
        self.norm = nn.LayerNorm(width) if chance.random() < 0.5 else nn.Identity()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=chance.random() < 0.5)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Looked(nn.Module):
    """An embedding of what its input comes to."""

    def __init__(self, chance, width):
        super().__init__()
        self.table = nn.Embedding(chance.choice([1, 7, 300]), width)

    def forward(self, x):
        return x + self.table(x.detach().abs().nan_to_num(0, 0, 0).sum(-1).mul(10).long() % len(self.table.weight))


class Convolved(nn.Module):
    """With buffers that training changes, one of them in no state_dict."""

    def __init__(self, chance, width):
        super().__init__()
        self.conv = nn.Conv1d(1, chance.randrange(1, 5), 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return x + self.norm(self.conv(x[:, None]).mean(1)) * 0.5 + self.calls.remainder(2)


class Odd(nn.Module):
    """Parameters of every size, type and stride."""

    def __init__(self, chance, width):
        super().__init__()
        made = {
            "nothing": lambda dtype: torch.empty(chance.choice([(0,), (3, 0)]), dtype=dtype),
            "scalar": lambda dtype: noise(1, dtype=dtype).reshape(()),
            "single": lambda dtype: noise(1, dtype=dtype),
            "square": lambda dtype: noise(width, width, dtype=dtype),
            "column": lambda dtype: noise(width, 3, dtype=dtype)[:, 1],
            "turned": lambda dtype: noise(5, width, dtype=dtype).t(),
            "offset": lambda dtype: noise(width + 7, dtype=dtype)[3 : 3 + width],
            "whole": lambda _: torch.randint(-9, 9, (width,), dtype=torch.int8),
        }
        for name in chance.sample(sorted(made), chance.randrange(1, 6)):
            value = made[name](chance.choice(FLOATS))
            self.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))

    def forward(self, x):
        for each in self._parameters.values():
            if each.shape == (x.shape[-1], x.shape[-1]):
                x = x + F.linear(x.to(each.dtype), each).to(x.dtype)
            elif each.shape == x.shape[-1:]:
                x = x + each.to(x.dtype) * 0.1
            else:
                x = x + each.sum().to(x.dtype) * 0.1
        return x


class Views(nn.Module):
    """Parameters that are overlapping views of one storage."""

    def __init__(self, chance, width):
        super().__init__()
        flat = noise(width * width + 9, seed=chance.randrange(99))
        self.weight = nn.Parameter(flat[: width * width].view(width, width))
        self.row = nn.Parameter(flat[5 : 5 + width])

    def forward(self, x):
        return F.linear(x, self.weight, self.row)


class Reads(nn.Module):
    """Reads another block's matrix without owning it, and has a list and a parameter of its own."""

    def __init__(self, chance, width, owner, name):
        super().__init__()
        self.other, self.scale = (owner, name), nn.Parameter(noise(width))
        self.parts = nn.ModuleList(Mlp(chance, width) for _ in range(chance.randrange(1, 3)))

    def forward(self, x):
        for part in self.parts:
            x = part(x * self.scale)
        return x + getattr(*self.other).float().sum() * 0.01


class Counts(nn.Module):
    """Writes to a parameter of its own while it runs."""

    def __init__(self, chance, width):
        super().__init__()
        self.count = nn.Parameter(torch.zeros(chance.choice([1, 2000])), requires_grad=False)
        self.next = Mlp(chance, width)

    def forward(self, x):
        with torch.no_grad():
            self.count.add_(0.1)
        return self.next(x) + self.count.sum()


class Nested(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleDict({f"b{i}": nn.Sequential(block) for i, block in enumerate(blocks)})

    def forward(self, x):
        for block in self.blocks.values():
            x = block(x)
        return x


class Model(nn.Module):
    """Its blocks in `order`, as far as it is not stopped."""

    def __init__(self, blocks, width, loose):
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.order, self.stops_at, self.stops_backward = list(range(len(blocks))), None, False
        self.register_buffer("mask", torch.ones(width))
        if loose:
            self.scale, self.head = nn.Parameter(noise(width)), nn.Linear(width, 3)
        self.loose = loose

    def forward(self, x):
        x = x * self.mask * self.scale if self.loose else x * self.mask
        for number, i in enumerate(self.order):
            if number == self.stops_at:
                raise StopError
            x = torch.tanh(self.layers[i](x))
            if number == len(self.order) // 2 and x.requires_grad:
                x = Raises.apply(x, self)
        return self.head(x) if self.loose else x


def matrices(blocks):
    """Of all blocks, with who owns each, and under which name."""
    return [
        (module, name)
        for block in blocks
        for module in block.modules()
        for name, each in module.named_parameters(recurse=False)
        if each.dim() == 2 and each.numel() and each.is_floating_point()
    ]


def block(chance, width, others):
    """One of any kind; `others` are those before it."""
    kind = chance.choice([Mlp, Looked, Convolved, Odd, Odd, Views, Reads, Counts, Nested, "fp4"])
    if kind == "fp4":
        made = Mlp(chance, width)
        return quantize(made, FP4Config(format="nvfp4")) if width % 16 == 0 and made.up.out_features % 16 == 0 else made
    if kind is Reads:
        found = matrices(others)
        return Reads(chance, width, *chance.choice(found)) if found else Mlp(chance, width)
    if kind is Nested:
        return Nested([block(chance, width, others) for _ in range(chance.randrange(1, 4))])
    return kind(chance, width)


def tie(chance, blocks):
    """Let two matrices of one shape be one parameter."""
    found = matrices(blocks)
    if found:
        owner, name = chance.choice(found)
        first = getattr(owner, name)
        twins = [(module, other) for module, other in found if getattr(module, other).shape == first.shape]
        module, other = chance.choice(twins)
        if getattr(module, other).dtype == first.dtype:
            setattr(module, other, first)


def draw(seed):
    """The model of a seed and the width of its inputs: the same bytes each time."""
    chance = random.Random(f"model {seed}")
    torch.manual_seed(chance.randrange(2**31))
    width = chance.choice([1, 3, 16, 32, 64, 80])
    blocks = []
    for _ in range(chance.randrange(1, 12)):
        blocks.append(block(chance, width, blocks))
    for _ in range(chance.choice([0, 0, 1, 3])):
        tie(chance, blocks)
    if chance.random() < 0.3:
        blocks.insert(chance.randrange(len(blocks)), chance.choice(blocks))
    model = Model(blocks, width, chance.random() < 0.5)
    frozen = chance.choice([0, 0, 0.5, 1])
    for each in model.parameters():
        if chance.random() < frozen:
            each.requires_grad_(False)
    return model.train(chance.random() < 0.5), width
