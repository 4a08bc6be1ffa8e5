"""A few thousand fuzz steps of one seed: benchmarks/cloud/fuzz.py takes a million."""

import random

import pytest
from fuzzing import Fuzzer, request_of

from apt_model.cloud import backend, dialect

STEPS = 4000


@pytest.fixture
def fuzzer(tmp_path):
    made = Fuzzer(tmp_path, seed=0)
    yield made
    made.backend.close()


def test_no_step_raises_anything_else(fuzzer):
    fuzzer.run(0, STEPS)
    found = fuzzer.found
    assert sum(found.values()) == STEPS
    # Faults of many kinds are made, and neither side refuses everything.
    assert len(fuzzer.words) > 40
    assert found["request", 200] > STEPS // 10
    assert found["request", 400] > STEPS // 10
    assert found["answer", "accepted"] > STEPS // 20
    assert {kind for side, kind in found if side == "answer"} == {
        "accepted", "WireError", "RefusedError", "CloudError",
    }  # fmt: skip


def test_a_seed_makes_the_same_steps_again(tmp_path):
    assert request_of(random.Random(5)) == request_of(random.Random(5))
    found = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        fuzzer = Fuzzer(folder, seed=7)
        fuzzer.run(100, 300)
        found.append((fuzzer.found, fuzzer.words))
    assert found[0] == found[1]


def test_a_step_that_fails_is_named(fuzzer, monkeypatch):
    """Each side with a reader that raises what is none of our errors."""

    def broken(*_, **__):
        raise KeyError("outputs")

    monkeypatch.setattr(dialect.wire, "decode_response", broken)
    with pytest.raises(AssertionError, match=r"step \d+ of seed 0: KeyError: 'outputs'"):
        fuzzer.run(0, 50)
    monkeypatch.undo()
    monkeypatch.setattr("apt_model.cloud.server.forwards.decode_request", broken)
    with pytest.raises(AssertionError, match=r"step 0 of seed 0: AssertionError"):
        fuzzer.run(0, 1)
    monkeypatch.undo()
    monkeypatch.setattr(backend, "_count", broken)
    with pytest.raises(AssertionError, match="KeyError"):
        fuzzer.run(0, 200)
