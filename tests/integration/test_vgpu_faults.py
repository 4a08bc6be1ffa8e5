"""What goes wrong while a model is streamed: it is said, nothing is lost, and the next call is right.

Where each fault of a list is put in (`disk` and `arena` are `unit/test_vgpu_disk.py` and `unit/test_vgpu_arena.py`):

| fault | tests |
|---|---|
| disk full while writing | disk: `a_full_disk_leaves_the_old_blob`; `a_full_disk_while_weights_are_written` |
| truncated file | disk: `a_truncated_file`; `a_damaged_file_...` |
| flipped byte | disk: `a_flipped_byte`; `a_damaged_file_...` |
| file changed since its index | disk: `a_folder_that_changed_since_its_index` |
| EINVAL on O_DIRECT | disk: `buffered_where_o_direct_is_refused` |
| pin refused | arena: `without_pinning_everything_works_and_it_is_said_once` |
| memory limit of a control group | `more_host_memory_than_the_machine_or_the_container_has` |
| pages that do not come | arena: `pages_that_do_not_come_leave_the_arena_as_it_was` |
| exception and KeyboardInterrupt | `a_forward_that_raises`, `a_backward_that_raises` |
| changed order of execution | `test_vgpu_zoo.py`: `depth_and_order_change_between_calls`; `test_vgpu_fuzz.py` |
| a dead reader thread | disk: `a_thread_that_dies_surfaces_in_the_waiting_call`; `threads_of_the_disk_that_die` |
| two processes on one store | disk: `one_store_a_folder`; `one_stack_a_folder` |
| SIGKILL while writing, between flush and index | `test_vgpu_killed.py` |
"""

import contextlib
import copy
import ctypes
import errno
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from small_models import noise
from torch import nn
from torch.nn import functional as F

from apt_model.core.errors import CapacityError, InputError, StorageError
from apt_model.core.system.host_memory import HostMemory
from apt_model.optimization import VGPUStack
from apt_model.vgpu import host_pages
from apt_model.vgpu.disk import DiskStore

pytestmark = pytest.mark.usefixtures("quiet_vgpu")
# Blocks of 0.26 MB, as errors speak of tenths of a MB.
WIDTH, DEPTH = 128, 8
X = noise(4, WIDTH, seed=1)
BELOW = {"host": ["cpu"], "disk": ["ssd"], "both": ["cpu", "ssd"]}
layouts = pytest.mark.parametrize("layout", BELOW)


class _Stops(torch.autograd.Function):
    """Raises in its backward what its module says."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.module.in_backward is not None:
            raise ctx.module.in_backward
        return grad, None


class Block(nn.Module):
    in_forward = in_backward = None

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        y = self.up(x)
        if self.in_forward is not None:
            raise self.in_forward
        return x + self.down(_Stops.apply(F.gelu(y), self))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


TOTAL = sum(each.nbytes for each in Model().parameters()) / 1e6


def config(layout, share=0.5, path=None, slots=3):
    sizes = {"cpu": TOTAL * 0.45 if layout == "both" else 99.0, "ssd": 99.0}
    levels = [{"capacity_mb": TOTAL * share, "device": "cpu"},
              *({"capacity_mb": sizes[kind], "device": kind} for kind in BELOW[layout])]  # fmt: skip
    if path is not None:
        levels[-1]["path"] = str(path)
    return {"levels": levels, "slots": slots}


@contextlib.contextmanager
def streamed(layout="host", **options):
    """A model, its twin as it was, and the stack; whatever happened, the model comes back whole."""
    model = Model()
    reference = copy.deepcopy(model)
    with VGPUStack(config(layout, **options)) as stack:
        stack.attach(model)
        yield model, reference, stack
        right(model, reference)
        stack.detach(model)
        assert used(stack) == [0] * len(stack.levels)
    unharmed(model, reference)


def used(stack):
    return [level["used_mb"] for level in stack.stats()["levels"]]


def right(model, reference):
    """Outputs, gradients and weights, twice."""
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(X), reference(X))
        for one in (model, reference):
            one.zero_grad()
            one(X).square().sum().backward()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def unharmed(model, reference):
    """A plain model again, without a hook."""
    right(model, reference)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert all(type(each) is nn.Parameter for each in model.parameters())
    assert not model._state_dict_hooks
    assert not model._state_dict_pre_hooks


def no_hooks_left():
    """On the stack of hooks of saved tensors, which is the thread's."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None


ERRORS = [ValueError("mine"), KeyboardInterrupt("mine"), SystemExit("mine")]
errors = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


@errors
@pytest.mark.parametrize(("layout", "slots"), [("host", 1), ("disk", 3), ("both", 2)])
def test_a_forward_that_raises(layout, slots, error):
    with streamed(layout, slots=slots) as (model, reference, stack):
        before = used(stack)
        for number in (0, 5):
            model.layers[number].in_forward = error
            for mode in (torch.no_grad, torch.enable_grad):
                with mode(), pytest.raises(type(error), match="mine"):
                    model(X)
            model.layers[number].in_forward = None
            assert used(stack) == before
            right(model, reference)
        assert no_hooks_left()


@errors
@pytest.mark.parametrize("slots", [1, 3])
def test_parts_are_called_after_a_forward_that_raised(slots, error):
    """The model's own forward does not begin: nothing that was open may be in the way."""
    with streamed(slots=slots) as (model, reference, _):
        for _ in range(3):
            model.layers[5].in_forward = error
            with torch.no_grad(), pytest.raises(type(error), match="mine"):
                model(X)
            with torch.no_grad(), pytest.raises(type(error), match="mine"):
                model.layers[5](X)
            model.layers[5].in_forward = None
            with torch.no_grad():
                for ours, theirs in zip(model.layers, reference.layers, strict=True):
                    assert torch.equal(ours(X), theirs(X))


@errors
@pytest.mark.parametrize(("layout", "slots"), [("host", 1), ("disk", 3), ("both", 2)])
def test_a_backward_that_raises(layout, slots, error):
    with streamed(layout, slots=slots) as (model, reference, stack):
        before = used(stack)
        for number in (0, 5):
            loss = model(X).square().sum()
            model.layers[number].in_backward = error
            with pytest.raises(type(error), match="mine"):
                loss.backward()
            model.layers[number].in_backward = None
            assert used(stack) == before
            right(model, reference)
        loss = model(X).square().sum()
        model.layers[2].in_backward = error
        with pytest.raises(type(error), match="mine"):
            loss.backward()
        model.layers[2].in_backward = None
        del loss


@pytest.mark.parametrize("error", [StorageError("the disk is full"), KeyboardInterrupt(), MemoryError()], ids=repr)
@pytest.mark.parametrize("layout", ["disk", "both"])
@pytest.mark.parametrize("call", [1, 3])
def test_a_disk_that_fails_while_attaching(layout, call, error, monkeypatch):
    model = Model()
    reference = copy.deepcopy(model)
    write, calls = DiskStore.write, []

    def fails(store, *arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise error
        write(store, *arguments)

    with VGPUStack(config(layout)) as stack:
        with monkeypatch.context() as patch:
            patch.setattr(DiskStore, "write", fails)
            with pytest.raises(type(error)):
                stack.attach(model)
        assert len(calls) == call
        unharmed(model, reference)
        assert used(stack) == [0] * len(stack.levels)
        assert stack._memory.store.used == 0
        stack.attach(model)
        right(model, reference)
    unharmed(model, reference)


def files(stack):
    return sorted(stack._memory.store.folder.glob("*.blob"))


def keys(stack):
    return {stack._memory.store.place_of(key)[0]: key for key in stack._memory.store}


def flip(path):
    with path.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {"flipped": flip, "cut": cut, "gone": lambda path: path.unlink()}
damages = pytest.mark.parametrize("damage", DAMAGES)


def twice(model):
    """What is there already when a file is damaged is not read the first time."""
    for _ in range(2):
        model(X)


@damages
@pytest.mark.parametrize(("layout", "many"), [("disk", False), ("both", True)])
def test_a_damaged_file_while_streaming(layout, damage, many):
    with streamed(layout) as (model, reference, stack):
        right(model, reference)
        before = used(stack)
        damaged = files(stack) if many else files(stack)[1:2]
        names = keys(stack)
        whole = {path: path.read_bytes() for path in damaged}
        for path in damaged:
            DAMAGES[damage](path)
        for _ in range(2):
            for mode in (torch.no_grad, torch.enable_grad):
                with mode(), pytest.raises(StorageError) as caught:
                    twice(model)
                assert any(repr(names[path]) in str(caught.value) for path in damaged)
        assert used(stack) == before
        assert no_hooks_left()
        for path, content in whole.items():
            path.write_bytes(content)
        right(model, reference)


@damages
@pytest.mark.parametrize("layout", ["disk", "both"])
def test_a_damaged_file_in_backward(layout, damage):
    with streamed(layout) as (model, reference, stack):
        loss = model(X).square().sum()
        whole = {path: path.read_bytes() for path in files(stack)}
        for path in whole:
            DAMAGES[damage](path)
        with pytest.raises(StorageError, match=r"blob "):
            loss.backward()
        for path, content in whole.items():
            path.write_bytes(content)
        model.zero_grad()
        right(model, reference)


@damages
@pytest.mark.parametrize("layout", ["disk", "both"])
@pytest.mark.parametrize("by", ["detach", "close"])
def test_a_damaged_file_while_detaching(layout, damage, by):
    """Nothing is given up of what is still whole: with the file repaired the model comes back."""
    model = Model()
    reference = copy.deepcopy(model)
    stack = VGPUStack(config(layout))
    stack.attach(model)
    right(model, reference)
    path = files(stack)[-1]
    content = path.read_bytes()
    DAMAGES[damage](path)
    end = (lambda: stack.detach(model)) if by == "detach" else stack.close
    with pytest.raises(StorageError, match=re.escape(keys(stack)[path])):
        end()
    path.write_bytes(content)
    right(model, reference)
    end()
    unharmed(model, reference)
    stack.close()


@pytest.mark.parametrize("layout", ["host", "disk"])
def test_a_level_1_that_is_too_small(layout):
    model = Model()
    reference = copy.deepcopy(model)
    least = 0.001
    with VGPUStack(config(layout, share=least / TOTAL)) as stack:
        with pytest.raises(CapacityError, match="level 1") as caught:
            stack.attach(model)
        unharmed(model, reference)
        assert used(stack) == [0, 0]
        with pytest.raises(InputError, match="not attached"):
            stack.detach(model)
    (found,) = re.findall(r"give level 1 at least ([\d.,]+) MB", caught.value.remedy)
    least = float(found.replace(",", ""))
    assert 0 < least < TOTAL
    with VGPUStack(config(layout, share=least / TOTAL)) as stack:
        stack.attach(model)
        right(model, reference)
    unharmed(model, reference)


@pytest.mark.parametrize("kind", ["cpu", "ssd"])
def test_a_lower_level_that_is_too_small(kind):
    model = Model()
    reference = copy.deepcopy(model)

    def levels(least):
        return {"levels": [{"capacity_mb": TOTAL / 2, "device": "cpu"}, {"capacity_mb": least, "device": kind}]}

    with VGPUStack(levels(0.01)) as stack:
        with pytest.raises(CapacityError) as caught:
            stack.attach(model)
        unharmed(model, reference)
        assert used(stack) == [0, 0]
    (found,) = re.findall(r"give the (?:cpu level|disk) at least ([\d.,]+) MB", caught.value.remedy)
    with VGPUStack(levels(float(found.replace(",", "")))) as stack:
        stack.attach(model)
        right(model, reference)
    unharmed(model, reference)


def test_two_models_share_the_levels():
    one, other = Model(), Model()
    twins = copy.deepcopy((one, other))
    with VGPUStack(config("host", share=1.02)) as stack:
        stack.attach(one)
        with pytest.raises(CapacityError, match="level 1") as caught:
            stack.attach(other)
        unharmed(other, twins[1])
        right(one, twins[0])
    (found,) = re.findall(r"give level 1 at least ([\d.,]+) MB", caught.value.remedy)
    with VGPUStack(config("host", share=float(found.replace(",", "")) / TOTAL)) as stack:
        stack.attach(one)
        stack.attach(other)
        for _ in range(2):
            right(one, twins[0])
            right(other, twins[1])
        stack.detach(one)
        right(other, twins[1])
    unharmed(one, twins[0])
    unharmed(other, twins[1])


@layouts
def test_attached_twice(layout):
    with streamed(layout) as (model, reference, stack):
        before = used(stack)
        with pytest.raises(InputError, match="attached"):
            stack.attach(model)
        with VGPUStack(config("host", share=3)) as other, pytest.raises(InputError, match="attached"):
            other.attach(model)
        with pytest.raises(InputError, match="attached"):
            stack.attach(model.layers[2])
        with pytest.raises(InputError, match="attached"):
            stack.attach(nn.Sequential(Block(), model))
        assert used(stack) == before
        right(model, reference)


def test_a_stranger_and_a_closed_stack():
    model, stranger = Model(), Model()
    reference = copy.deepcopy(model)
    stack = VGPUStack(config("host"))
    with pytest.raises(InputError, match="not attached"):
        stack.detach(stranger)
    stack.attach(model)
    with pytest.raises(InputError, match="not attached"):
        stack.detach(stranger)
    right(model, reference)
    stack.detach(model)
    with pytest.raises(InputError, match="not attached"):
        stack.detach(model)
    stack.attach(model)
    stack.close()
    stack.close()
    unharmed(model, reference)
    with pytest.raises(InputError, match="closed"):
        stack.attach(model)
    with pytest.raises(InputError, match=r"closed|not attached"):
        stack.detach(model)
    stack.stats()


@layouts
def test_no_thread_file_or_folder_stays(layout):
    before = set(threading.enumerate())
    opened = len(list(Path("/proc/self/fd").iterdir()))
    model = Model()
    with VGPUStack(config(layout)) as stack:
        stack.attach(model)
        model(X)
        folder = stack._memory.store.folder if stack._memory.store is not None else None
    assert set(threading.enumerate()) <= before
    assert len(list(Path("/proc/self/fd").iterdir())) <= opened
    assert folder is None or not folder.exists()
    # Also where attaching fails.
    with pytest.raises(CapacityError), VGPUStack(config(layout, share=0.0001)) as stack:
        stack.attach(model)
    assert set(threading.enumerate()) <= before


def test_one_stack_a_folder(tmp_path):
    with VGPUStack(config("disk", path=tmp_path)) as stack:
        model = Model()
        stack.attach(model)
        with pytest.raises(StorageError, match=re.escape(f"{tmp_path} is in use")):
            VGPUStack(config("disk", path=tmp_path))
        model(X)
        stack.detach(model)
    # What an earlier stack left is nobody's model.
    with VGPUStack(config("disk", path=tmp_path)) as stack:
        reference = copy.deepcopy(model)
        stack.attach(model)
        right(model, reference)


def test_a_folder_in_which_a_stack_died_is_used_again(tmp_path):
    with VGPUStack(config("disk", path=tmp_path)) as stack:
        model = Model()
        reference = copy.deepcopy(model)
        stack.attach(model)
        stack._memory.store.flush()
        for path in tmp_path.iterdir():
            if path.name != "lock":
                (tmp_path.parent / path.name).write_bytes(path.read_bytes())
                os.utime(tmp_path.parent / path.name, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    for path in tmp_path.parent.glob("*.*"):
        if path.is_file():
            path.rename(tmp_path / path.name)
    with VGPUStack(config("disk", path=tmp_path)) as stack:
        stack.attach(model)
        right(model, reference)
        stack.detach(model)
        stack.attach(model)
        right(model, reference)
    unharmed(model, reference)


def test_threads_that_call_at_the_same_time():
    """One after another, or refused: never a wrong result."""
    results, failures = [], []
    with streamed() as (model, reference, _):
        with torch.no_grad():
            want = reference(X)

        def call():
            try:
                with torch.no_grad():
                    results.extend([torch.equal(model(X), want) for _ in range(10)])
            except (InputError, CapacityError) as error:
                failures.append(error)

        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert all(results)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def exact_disk():
    """A stack whose disk has room for what is there, and not for a second copy of a block."""
    with VGPUStack(config("disk")) as stack:
        stack.attach(Model())
        (share, level) = TOTAL * 0.5, stack.stats()["levels"][1]["used_mb"]
    return VGPUStack({"levels": [{"capacity_mb": share, "device": "cpu"}, {"capacity_mb": level, "device": "ssd"}]})


@pytest.mark.parametrize("room", ["ample", "exact"])
@pytest.mark.parametrize("where", ["outside", "in a forward"])
def test_a_full_disk_while_weights_are_written(monkeypatch, room, where):
    """The write is refused; the weight is what it was, no slot is lost, and later writes go through."""
    model = Model()
    reference = copy.deepcopy(model)
    grows = [False]

    def grow(module, _):
        if grows[0]:
            with torch.no_grad():
                module.up.weight.mul_(2)

    stack = exact_disk() if room == "exact" else VGPUStack(config("disk"))
    with stack:
        stack.attach(model)
        handles = [layer.register_forward_pre_hook(grow) for layer in model.layers]
        (held,) = stack._models.values()
        streamed = [layer for layer in model.layers if type(layer.up.weight) is not nn.Parameter]
        assert len(streamed) > 2
        for layer in streamed:
            with monkeypatch.context() as patch, torch.no_grad():
                patch.setattr(os, "posix_fallocate", full)
                grows[0] = True
                with pytest.raises(StorageError, match="No space left"):
                    layer.up.weight.mul_(2) if where == "outside" else layer(X)
                grows[0] = False
            assert all(place.pins == 0 for place in held.places.all)
            assert used(stack)[1] * 1e6 == stack._memory.store.used
        for handle in handles:
            handle.remove()
        right(model, reference)
        with torch.no_grad():
            for one in (model, reference):
                for each in one.parameters():
                    each.mul_(2)
        right(model, reference)
        stack.detach(model)
        assert used(stack) == [0, 0]
    unharmed(model, reference)


def kill_threads(pool):
    """Each dies when it takes up its next piece, which goes with it."""
    for thread in pool._started:
        assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


@pytest.mark.parametrize("pool", ["_readers", "_writers"])
def test_threads_of_the_disk_that_die(pool):
    """Whoever waits for one is told, and the next is served by others."""
    with streamed("disk") as (model, reference, stack):
        right(model, reference)
        store, twin = stack._memory.store, model.layers[5].up.weight
        kill_threads(getattr(store, pool))
        use = (lambda: twice(model)) if pool == "_readers" else lambda: twin.mul_(1)
        with torch.no_grad(), pytest.raises(StorageError, match="thread that serves the disk has died"):
            use()
        for _ in range(3):  # of each read that was asked for ahead who needs it is told once
            with torch.no_grad(), contextlib.suppress(StorageError):
                use()
        right(model, reference)
        with torch.no_grad():
            twin.mul_(1)
        right(model, reference)
        assert not getattr(store, pool).died()


LIMITS = {
    "cgroup v2": ("sys/fs/cgroup/box/memory.max", "sys/fs/cgroup/box/memory.current", "cgroup2 rw"),
    "cgroup v1": ("mem/box/memory.limit_in_bytes", "mem/box/memory.usage_in_bytes", "cgroup cgroup rw,memory"),
    "MemAvailable": None,
}


@pytest.fixture(params=LIMITS)
def with_30_mb(request, tmp_path, monkeypatch):
    """A machine of 1 GB in which something leaves 30 MB."""
    found = LIMITS[request.param]
    (tmp_path / "proc/self").mkdir(parents=True)
    available = 30_000 if found is None else 900_000
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1000000 kB\nMemAvailable: {available} kB\n")
    if found is not None:
        limit, usage, kind = found
        point = limit.split("/box/")[0]
        version = "0::" if kind.startswith("cgroup2") else "4:memory:"
        (tmp_path / "proc/self/cgroup").write_text(f"{version}/box\n")
        (tmp_path / "proc/self/mountinfo").write_text(f"30 25 0:26 / /{point} rw - {kind}\n")
        (tmp_path / limit).parent.mkdir(parents=True)
        (tmp_path / limit).write_text(f"{50_000 * 1024}\n")
        (tmp_path / usage).write_text(f"{20_000 * 1024}\n")
    monkeypatch.setattr(host_pages, "_HOST", HostMemory(tmp_path))


def test_more_host_memory_than_the_machine_or_the_container_has(with_30_mb):
    """Refused when the stack is made: nothing is brought for which the kernel would kill the process."""
    levels = [{"capacity_mb": TOTAL / 2, "device": "cpu"}, {"capacity_mb": 31, "device": "cpu"}]
    with pytest.raises(CapacityError, match=r"control group's memory limit, leaves 30\.7 MB free") as caught:
        VGPUStack({"levels": levels})
    (most,) = re.findall(r"give them at most ([\d.]+) MB in all", caught.value.remedy)
    levels[1]["capacity_mb"] = float(most) - TOTAL / 2
    model = Model()
    reference = copy.deepcopy(model)
    with VGPUStack({"levels": levels}) as stack:
        stack.attach(model)
        right(model, reference)
    unharmed(model, reference)


def test_memory_of_a_state_dict_that_is_gone_is_there_again():
    model = Model()
    stack = VGPUStack(config("host"))
    stack.attach(model)
    state = model.state_dict()
    stack.detach(model)
    assert used(stack)[1] > 0
    del state
    assert used(stack) == [0, 0]
    stack.attach(model)
    state = model.state_dict()
    stack.close()
    del state
    assert used(stack) == [0, 0]


def test_a_write_to_a_view_that_the_disk_refuses_is_not_forgotten(monkeypatch):
    """It is brought to where the weight lives when something else is read, and again until that works."""
    with streamed("disk") as (model, reference, _), torch.no_grad():
        row, other = model.layers[5].up.weight.detach()[1], model.layers[4].up.weight
        row.fill_(3)
        reference.layers[5].up.weight[1].fill_(3)
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(StorageError, match="No space left"):
                other.sum()
        other.sum()
        del row
        assert torch.equal(model.layers[5].up.weight, reference.layers[5].up.weight)
