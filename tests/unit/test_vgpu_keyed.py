"""Tensors by name: whatever is put, moved, read and deleted, none is lost, none changes, and no level is exceeded."""

import random
import threading

import pytest
import torch
from torch import nn

from apt_model.core.errors import CapacityError, ConfigError, InputError, StorageError
from apt_model.optimization import VGPUStack

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float8_e4m3fn, torch.bool)
LAYOUTS = {
    "one": ["cpu"],
    "host": ["cpu", "cpu"],
    "disk": ["cpu", "ssd"],
    "both": ["cpu", "cpu", "ssd"],
}


def stack_of(kinds, *capacities):
    return VGPUStack(
        {"levels": [{"capacity_mb": mb, "device": kind} for kind, mb in zip(kinds, capacities, strict=True)]}
    )


def some(chance, most=12_000):
    shape = chance.choice([(), (0,), (1,), (chance.randrange(1, most),), (3, chance.randrange(1, most // 3))])
    made = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(chance.randrange(2**30)))
    return made.to(chance.choice(DTYPES))


def same(found, put):
    assert found.dtype == put.dtype
    assert found.shape == put.shape
    assert torch.equal(found.view(torch.uint8) if put.dim() else found, put.view(torch.uint8) if put.dim() else put)


def within(stack):
    for level in stack.stats()["levels"]:
        assert level["used_mb"] <= level["peak_mb"] <= level["capacity_mb"]


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_use(layout, seed):
    chance = random.Random(f"{layout} {seed}")
    kinds = LAYOUTS[layout]
    held = {}
    with stack_of(kinds, *(chance.uniform(0.01, 0.3) for _ in kinds)) as stack:
        for _ in range(60):
            key, what = str(chance.randrange(15)), chance.random()
            if what < 0.5:
                tensor = some(chance)
                try:
                    stack.put(key, tensor)
                except CapacityError:
                    pass
                else:
                    held[key] = tensor
            elif what < 0.8:
                if key in held:
                    same(stack.get(key), held[key])
                else:
                    with pytest.raises(KeyError):
                        stack.get(key)
            elif what < 0.9 and key in held:
                stack.delete(key)
                del held[key]
            elif held:
                stack.prefetch(chance.sample(sorted(held), min(3, len(held))))
            within(stack)
            assert len(stack) == len(held)
            assert all(key in stack for key in held)
        for key, tensor in held.items():
            same(stack.get(key), tensor)


@pytest.mark.parametrize("layout", ["host", "disk", "both"])
def test_8_threads(layout):
    """Each has keys of its own, which the others push from level to level."""
    kinds = LAYOUTS[layout]
    faults, kept = [], {}

    def work(number, stack):
        chance = random.Random(number)
        held = {}
        try:
            for _ in range(80):
                key, what = f"{number}-{chance.randrange(4)}", chance.random()
                if key not in held or what < 0.35:
                    tensor = some(chance, 4000)
                    stack.put(key, tensor)
                    held[key] = tensor
                elif what < 0.5:
                    stack.delete(key)
                    del held[key]
                    assert key not in stack
                else:
                    same(stack.get(key), held[key])
                stack.prefetch([key, f"{(number + 1) % 8}-{chance.randrange(4)}"])
            for key, tensor in held.items():
                same(stack.get(key), tensor)
            kept.update(held)
        except BaseException as fault:  # noqa: BLE001 - told below
            faults.append(fault)

    with stack_of(kinds, 0.05, *([0.05, 4] if len(kinds) == 3 else [4])) as stack:
        threads = [threading.Thread(target=work, args=(number, stack)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not faults
        within(stack)
        assert len(stack) == len(kept)
        for key, tensor in kept.items():
            same(stack.get(key), tensor)
        *upper, _ = stack.stats()["levels"]
        assert all(level["evictions"] > 0 for level in upper)
        for key in kept:
            stack.delete(key)
        assert [level["used_mb"] for level in stack.stats()["levels"]] == [0] * len(kinds)


def test_what_was_used_longest_ago_moves_down_and_comes_back():
    with stack_of(["cpu", "cpu"], 0.025, 1) as stack:
        for key in "abc":
            stack.put(key, torch.full((8000,), ord(key), dtype=torch.uint8))
        levels = stack.stats()["levels"]
        assert levels[0]["evictions"] == 0
        stack.get("a")
        stack.put("d", torch.zeros(8000, dtype=torch.uint8))
        assert stack.stats()["levels"][0]["evictions"] == 1
        before = stack.stats()["levels"][0]
        stack.get("a")
        assert stack.stats()["levels"][0]["hits"] == before["hits"] + 1
        assert stack.get("b").unique().tolist() == [ord("b")]
        assert stack.stats()["levels"][0]["misses"] == before["misses"] + 1


def test_a_copy_is_kept_and_a_copy_is_given():
    with stack_of(["cpu"], 1) as stack:
        tensor = torch.ones(10)
        stack.put("a", tensor)
        tensor.zero_()
        stack.get("a").zero_()
        assert torch.equal(stack.get("a"), torch.ones(10))
        for strange in (torch.arange(6).reshape(2, 3).T, torch.ones(1, 3)[:, 1], torch.ones(3)[1], torch.ones(3, 0)):
            stack.put("t", strange)
            assert torch.equal(stack.get("t"), strange)


def test_prefetch_brings_to_the_first_level():
    with stack_of(["cpu", "ssd"], 0.02, 1) as stack:
        stack.put("a", torch.ones(4000, dtype=torch.uint8))
        for key in "bcde":
            stack.put(key, torch.ones(4000, dtype=torch.uint8))
        stack.prefetch("a")
        stack._mover.shutdown()
        stack._mover = None
        hits = stack.stats()["levels"][0]["hits"]
        stack.get("a")
        assert stack.stats()["levels"][0]["hits"] == hits + 1


def test_a_damaged_file_is_an_error_that_names_the_key():
    with stack_of(["cpu", "ssd"], 0.005, 1) as stack:
        stack.put("mine", torch.ones(4000, dtype=torch.uint8))
        stack.put("other", torch.ones(4000, dtype=torch.uint8))
        (file,) = stack._memory.store.folder.glob("*.blob")
        content = bytearray(file.read_bytes())
        content[7] ^= 1
        file.write_bytes(content)
        with pytest.raises(StorageError, match="mine"):
            stack.get("mine")
        assert torch.equal(stack.get("other"), torch.ones(4000, dtype=torch.uint8))


def test_tensors_and_a_model_share_the_levels():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    x = torch.ones(1, 64)
    with torch.no_grad():
        expected = model(x)
    with stack_of(["cpu", "cpu"], 0.08, 0.4) as stack, torch.no_grad():
        stack.put("a", torch.ones(2000))
        stack.attach(model)
        assert torch.equal(model(x), expected)
        assert torch.equal(stack.get("a"), torch.ones(2000))
        within(stack)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({}, "levels"),
        ({"levels": []}, "at least one"),
        ({"levels": [{"capacity_mb": 1, "device": "ssd"}]}, "computes"),
        ({"levels": [{"capacity_mb": 0, "device": "cpu"}]}, "above 0"),
        ({"levels": [{"capacity_mb": 1, "device": "cpu", "speed": 1}]}, "speed_gbps"),
        ({"levels": [{"device": "cpu"}]}, "capacity_mb"),
        ({"levels": [{"capacity_mb": 1, "device": "cpu"}, {"capacity_mb": 1, "device": "cuda:0"}]}, "below the first"),
        ({"levels": [{"capacity_mb": 1, "device": "cpu", "path": "x"}]}, "only 'ssd' has files"),
        ({"levels": [{"capacity_mb": 1, "device": "cpu"}], "slots": 0}, "slots"),
        ({"levels": [{"capacity_mb": 1, "device": "cpu"}], "policy": "fifo"}, "policy"),
    ],
)
def test_configurations_that_are_refused(config, what):
    with pytest.raises(ConfigError, match=what):
        VGPUStack.from_config(config)


def test_memory_that_a_state_dict_held_is_there_for_tensors():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    with stack_of(["cpu", "cpu"], 0.06, 0.11) as stack:
        stack.attach(model)
        state = model.state_dict()
        stack.detach(model)
        large = torch.ones(20_000)
        with pytest.raises(CapacityError):
            stack.put("large", large)
        del state
        stack.put("large", large)
        same(stack.get("large"), large)


def test_what_cannot_be_put():
    with stack_of(["cpu"], 1) as stack:
        with pytest.raises(InputError, match="str"):
            stack.put(1, torch.ones(1))
        with pytest.raises(InputError, match="dense"):
            stack.put("a", torch.ones(2, 2).to_sparse())
        with pytest.raises(CapacityError, match="no level has room"):
            stack.put("a", torch.ones(10**6))
        assert len(stack) == 0
    with pytest.raises(InputError, match="closed"):
        stack.put("a", torch.ones(1))
