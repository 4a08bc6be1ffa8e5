"""Random models in random stacks, used at random: every byte is that of a twin that is not streamed.

`APT_FUZZ_CASES=500:6000` runs other seeds than 0 to 499; what fails says which one to run alone.
"""

import contextlib
import copy
import itertools
import os
import random
import re
import threading
from pathlib import Path

import pytest
import torch
from random_models import StopError, draw
from small_models import noise

from apt_model.core.errors import CapacityError
from apt_model.optimization import VGPUStack
from apt_model.vgpu.level import Level
from apt_model.vgpu.units import MB, PAGE, padded

pytestmark = pytest.mark.usefixtures("quiet_vgpu")
FIRST, _, END = os.environ.get("APT_FUZZ_CASES", "0:500").partition(":")
GROUPS = 20
# On the way down from level 1; a "cpu" above them stands for the accelerator.
LAYOUTS = ([], ["ssd"], ["cpu"], ["cpu", "ssd"], ["cpu", "ssd"])
# How the error of each level names the least that would do.
LEAST = {
    "first": r"give level 1 at least ([\d.,]+) MB",
    "host": r"give the cpu level at least ([\d.,]+) MB",
    "disk": r"give the disk at least ([\d.,]+) MB",
}
ONLY = r"the model takes ([\d.,]+) MB, and the only level"


def same(ours, theirs, what):
    """Bytes, whatever they stand for."""
    assert (ours is None) == (theirs is None), what
    if ours is not None:
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), what
        # `contiguous` leaves one element with whatever stride it has, of which no view of bytes can be made.
        both = [each.detach().flatten().clone(memory_format=torch.contiguous_format) for each in (ours, theirs)]
        assert not ours.numel() or torch.equal(*(each.view(torch.uint8) for each in both)), what


@pytest.fixture
def counted(monkeypatch):
    """An account of every level, kept beside its own."""
    held, take, give = {}, Level.take, Level.give

    def takes(level, count, what):
        take(level, count, what)
        held[id(level)] = held.get(id(level), 0) + count
        assert 0 <= held[id(level)] <= level.capacity, what

    def gives(level, count):
        held[id(level)] -= count
        give(level, count)

    monkeypatch.setattr(Level, "take", takes)
    monkeypatch.setattr(Level, "give", gives)
    return held


class Pair:
    """A model, its twin, and whether the model is attached now."""

    def __init__(self, seed):
        (self.model, self.width), (self.twin, _) = draw(seed), draw(seed)
        self.own = dict(self.model.named_parameters(remove_duplicate=False))
        self.kinds = [type(each) for each in self.own.values()]
        self.attached = self.other_memory = False
        self.changes = 0

    def each(self):
        return self.model, self.twin

    def nbytes(self):
        """About what it takes: pages of each of its blocks."""
        parts = [list(layer.parameters()) for layer in self.twin.layers]
        around = [*self.twin.buffers(), *self.twin.parameters(recurse=False)]
        return sum(padded(sum(each.untyped_storage().nbytes() for each in part)) for part in (*parts, around))

    def same(self):
        """Parameters, gradients and buffers, read one by one."""
        ours, theirs = (dict(one.named_parameters(remove_duplicate=False)) for one in self.each())
        assert ours.keys() == theirs.keys() == self.own.keys()
        for name, each in theirs.items():
            assert ours[name] is self.own[name], name
            same(ours[name], each, name)
            same(ours[name].grad, each.grad, f"{name}.grad")
        self.same_state()
        for (name, ours), (_, theirs) in zip(*(one.named_buffers() for one in self.each()), strict=True):
            same(ours, theirs, name)

    def same_state(self):
        ours, theirs = (one.state_dict() for one in self.each())
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            same(ours[name], value, name)

    def plain(self):
        """As it was before any stack, bytes and objects."""
        self.same()
        assert [type(each) for each in self.own.values()] == self.kinds
        assert all(not m._forward_pre_hooks and not m._forward_hooks for m in self.model.modules())
        for ours, theirs in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            assert self.other_memory or ours.stride() == theirs.stride()
            assert self.other_memory or ours.storage_offset() == theirs.storage_offset()


class Case:
    """What is done with one seed."""

    def __init__(self, seed, counted):
        self.seed, self.chance, self.counted, self.steps = seed, random.Random(seed), counted, []
        self.pairs = [Pair(seed)]
        if self.chance.random() < 0.3:
            self.pairs.append(Pair(f"{seed} too"))
        self.below = self.chance.choice(LAYOUTS)
        self.total = sum(each.nbytes() for each in self.pairs)
        shares = {"cpu": (0.02, 0.6 if "ssd" in self.below else 1.5), "ssd": (0.3, 2)}
        self.sizes = [self.size(0.02, 0.9 if self.below else 1.5), *(self.size(*shares[kind]) for kind in self.below)]
        self.slots = self.chance.choice([1, 2, 3, 3, 5])
        self.policy = self.chance.choice(["cyclic", "cyclic", "lru", "frequency"])
        self.keys = {}
        self.kept = []
        self.stack = None

    def size(self, low, high):
        return max(PAGE, int(self.chance.uniform(low, high) * self.total))

    def start(self):
        levels = [{"capacity_mb": size / MB, "device": kind}
                  for size, kind in zip(self.sizes, ["cpu", *self.below], strict=True)]  # fmt: skip
        self.stack = VGPUStack({"levels": levels, "slots": self.slots, "policy": self.policy})

    def story(self):
        """What to run again, and what it does."""
        return "\n  ".join((
            f"again: APT_FUZZ_CASES={self.seed}:{self.seed + 1} pytest {Path(__file__).name}",
            f"levels {['cpu', *self.below]} of {self.sizes} bytes, {self.slots} slots, {self.policy}", *self.steps,
        ))  # fmt: skip

    # --- attaching

    def attach_all(self):
        """All models, each with what the errors say that it takes."""
        for pair in self.pairs:
            tries = 0
            while not self.attach(pair):
                tries += 1
                assert tries < 5, "the least that an error named is refused again and again"

    def attach(self, pair):
        """Whether it is attached, else the level that was named has what was named."""
        before = self.used()
        try:
            self.stack.attach(pair.model)
        except CapacityError as error:
            pair.plain()
            assert self.used() == before
            self.give_least(error)
            return False
        pair.attached = True
        return True

    def give_least(self, error):
        """A stack with the least that the error names."""
        text = f"{error.message} {error.remedy}"
        named = [(level, found) for level, pattern in LEAST.items() if (found := re.search(pattern, text))]
        if not named:
            found = re.search(ONLY, text)
            assert found, text
            named = [("first", found)]
        (level, found), *_ = named
        ((number, least),) = [(self.number(level), int(float(found[1].replace(",", "")) * MB))]
        self.steps.append(f"{level} is given {least}, and had {self.sizes[number]}")
        assert least > self.sizes[number], text
        others = [each for each in self.pairs if each.attached]
        # In a new stack the models before would take more, too: of level 1 and the disk this one is given it instead.
        self.sizes[number] = least + 2 * self.total if others and level == "host" else least
        if others and level != "host":
            self.widen(level, least)
            return
        self.end()
        self.start()
        for each in others:
            self.stack.attach(each.model)

    def widen(self, level, least):
        memory = self.stack._memory
        found = memory.first if level == "first" else memory.disk
        found.capacity = least
        if level == "disk":
            memory.store.capacity = least

    def number(self, level):
        return {"first": 0, "host": 1, "disk": len(self.sizes) - 1}[level]

    # --- what is looked at after each step

    def used(self):
        return [level.used for level in self.stack.levels]

    def look(self):
        """The level's account, ours, and those of what is behind it."""
        with self.stack._lock:  # or tensors that were asked for ahead are on their way
            self.look_now()

    def look_now(self):
        memory = self.stack._memory
        for level, size in zip(self.stack.levels, self.sizes, strict=True):
            assert level.used == self.counted.get(id(level), 0) <= level.peak <= level.capacity <= size
        if memory.arena is not None:
            assert memory.arena.used == memory.host.used <= memory.arena.capacity <= memory.host.capacity
            assert memory.arena.committed <= memory.host.capacity
        if memory.store is not None:
            files = sum(path.stat().st_size for path in memory.store.folder.glob("*.blob"))
            empty = PAGE * sum(not value.numel() for value in self.keys.values())  # a page in the account, and no bytes
            assert files == memory.store.used <= memory.disk.used <= memory.store.used + empty
            assert memory.store.used <= memory.store.peak <= memory.disk.capacity
        assert len(self.stack) == len(self.keys)

    # --- steps

    def run(self):
        self.start()
        try:
            self.attach_all()
            for _ in range(self.chance.randrange(4, 10)):
                pair = self.chance.choice(self.pairs)
                step = self.chance.choice(STEPS)
                self.steps.append(f"{step.__name__} of {self.pairs.index(pair)}")
                step(self, pair)
                self.look()
            self.steps.append("end")
            for key, value in self.keys.items():
                same(self.stack.get(key), value, key)
        except BaseException:
            with contextlib.suppress(Exception):
                self.stack.close(restore=False)
            raise
        self.end()
        for pair in self.pairs:
            pair.attached = False
            pair.plain()
            forward(self, pair)

    def end(self):
        """Everything goes back, by detaching or by closing."""
        self.kept.clear()
        if self.chance.random() < 0.5:
            for pair in self.pairs:
                if pair.attached:
                    self.stack.detach(pair.model)
            for key in self.keys:
                self.stack.delete(key)
            self.keys.clear()
            self.stack.stats()
            assert self.used() == [0] * len(self.sizes)
        self.keys.clear()
        self.stack.close()
        assert self.used() == [0] * len(self.sizes)


def inputs(case, pair):
    return noise(3, pair.width, seed=case.chance.randrange(9))


def reorder(case, pair):
    """Some blocks again, some not at all, or in another order."""
    count = len(pair.twin.layers)
    order = [case.chance.randrange(count) for _ in range(case.chance.randrange(0, 2 * count))]
    if case.chance.random() < 0.6:
        order = list(range(count))[: case.chance.randrange(count + 1) or None]
    for one in pair.each():
        one.order = order


def forward(case, pair):
    reorder(case, pair)
    x = inputs(case, pair)
    for _ in range(case.chance.randrange(1, 3)):
        with case.chance.choice([torch.no_grad, torch.inference_mode])():
            same(*(one(x) for one in pair.each()), "output")


def train(case, pair):
    """Gradients of one or several forwards, and a step along them."""
    pair.changes += 1
    again = case.chance.random() < 0.5
    rounds = case.chance.randrange(1, 3)
    for _ in range(rounds):
        reorder(case, pair)
        x = inputs(case, pair)
        results = []
        for one in pair.each():
            y = one(x.clone().requires_grad_())
            if again:
                with torch.no_grad():
                    one(x)
            results.append(y)
        same(*results, "output")
        if not (again and one.training):
            for y in results:
                y.square().sum().backward()
    pair.same()
    if case.chance.random() < 0.7:
        for one in pair.each():
            if next(one.parameters(), None) is not None:
                torch.optim.SGD(one.parameters(), lr=0.01).step()
                one.zero_grad()
        pair.same()


def one_block(case, pair):
    x, i = inputs(case, pair), case.chance.randrange(len(pair.twin.layers))
    with torch.no_grad():
        same(*(one.layers[i](x) for one in pair.each()), "output of a block")


READS = (
    lambda each: each.float().sum(),
    lambda each: each.data.clone(),
    lambda each: each.detach().cpu(),
    lambda each: each.t() if each.dim() < 3 else each,
    lambda each: torch.tensor(each.detach().double().tolist()),
    lambda each: torch.stack([each.float(), each.float()]),
)


def read(case, pair):
    ours, theirs = (list(one.parameters()) for one in pair.each())
    for i in case.chance.sample(range(len(ours)), min(3, len(ours))):
        call = case.chance.choice(READS)
        with case.chance.choice([torch.no_grad, torch.enable_grad, torch.inference_mode])():
            same(call(ours[i]), call(theirs[i]), f"parameter {i}")


WRITES = (
    lambda each: each.mul_(2),
    lambda each: each.copy_(each.flip(0) if each.dim() else each),
    lambda each: each.__setitem__(..., 1),
    lambda each: setattr(each, "data", torch.full_like(each, 0.5)),
    lambda each: each.zero_(),
    lambda each: torch.add(each, each, out=each),
)


def writes_of(parameters, i):
    """Not all are for all: new `data` ends what views of one storage share, but not where they are streamed."""
    if parameters[i].dtype == torch.float8_e4m3fn:
        return WRITES[2:3]
    shared = [each.untyped_storage().data_ptr() for each in parameters].count(
        parameters[i].untyped_storage().data_ptr()
    )
    return WRITES if shared == 1 else WRITES[:3]


def write(case, pair):
    pair.changes += 1
    ours, theirs = (list(one.parameters()) for one in pair.each())
    with torch.no_grad():
        for i in case.chance.sample(range(len(ours)), min(3, len(ours))):
            call = case.chance.choice(writes_of(theirs, i))
            call(ours[i])
            call(theirs[i])
            pair.other_memory |= call is WRITES[3]  # which a streamed parameter is given only as values
    pair.same()


def state(case, pair):
    """Kept for a while, and what it was as long as nobody writes."""
    pair.same_state()
    case.kept.append((pair, pair.changes, pair.model.state_dict()))
    for other, changes, kept in case.kept:
        for name, each in other.twin.named_parameters() if changes == other.changes else ():
            if not name.endswith(".count"):  # which a forward changes, too
                same(kept[name], each, name)


def copied(case, pair):
    """A model of its own, which is not streamed."""
    ours, x = copy.deepcopy(pair.model), inputs(case, pair)
    theirs = copy.deepcopy(pair.twin)
    with torch.no_grad():
        same(ours(x), theirs(x), "output of a copy")


def changed_bytes(value):
    return value.clone() if value.dtype.itemsize == 1 else value * 2


def load(case, pair):
    pair.changes += 1
    changed = {name: changed_bytes(value) for name, value in pair.twin.state_dict().items()}
    for one in pair.each():
        one.load_state_dict(changed)
    pair.same()


def attach_again(case, pair):
    if pair.attached:
        case.stack.detach(pair.model)
        pair.attached = False
        pair.plain()
    try:
        case.stack.attach(pair.model)
    except CapacityError:  # a key or another model has what it had
        pair.plain()
        assert case.keys or len(case.pairs) > 1 or case.kept
    else:
        pair.attached = True


def stopped(case, pair):
    """In the middle of a forward, or of the backward of one."""
    reorder(case, pair)
    x = inputs(case, pair).requires_grad_()
    number = case.chance.randrange(len(pair.twin.order) + 1)
    if case.chance.random() < 0.5:
        for one in pair.each():
            one.stops_at = number
            with contextlib.suppress(StopError):
                one(x)
            one.stops_at = None
    else:
        for one in pair.each():
            y = one(x).square().sum()
            one.stops_backward = True
            with contextlib.suppress(StopError):
                y.backward()
            one.stops_backward = False
    pair.same()
    for one in pair.each():
        one.zero_grad()


def mode(case, pair):
    to = case.chance.random() < 0.5
    for one in pair.each():
        one.train(to)


def foresee(case, pair):
    if not pair.attached:
        before = case.used()
        with contextlib.suppress(CapacityError):
            case.stack.plan(pair.model, tokens=4)
        assert case.used() == before


def keyed(case, _):
    for _ in range(6):
        key, what = f"k{case.chance.randrange(5)}", case.chance.random()
        if what < 0.5:
            dtype = case.chance.choice([torch.float32, torch.bfloat16])
            value = noise(case.chance.randrange(3000), seed=len(case.keys), dtype=dtype)
            with contextlib.suppress(CapacityError):
                case.stack.put(key, value)
                case.keys[key] = value
        elif what < 0.7 and key in case.keys:
            case.stack.delete(key)
            del case.keys[key]
        elif what < 0.8:
            case.stack.prefetch(list(case.keys))
        elif key in case.keys:
            same(case.stack.get(key), case.keys[key], key)
    case.look()


STEPS = (
    forward, forward, train, train, one_block, read, write, state, load, attach_again, copied, stopped, mode, foresee,
    keyed,
)  # fmt: skip
SEEDS = range(int(FIRST), int(END))


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_stacks(group, counted, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(threading.enumerate())
    opened = len(list(Path("/proc/self/fd").iterdir()))
    for seed in itertools.islice(SEEDS, group, None, GROUPS):
        counted.clear()
        case = Case(seed, counted)
        try:
            case.run()
            assert set(threading.enumerate()) <= before
            assert not list(tmp_path.glob("apt-*"))
            assert len(list(Path("/proc/self/fd").iterdir())) <= opened
        except Exception as error:
            raise AssertionError(f"{error!r}\n{case.story()}") from error
