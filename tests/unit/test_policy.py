import dataclasses
import threading

import pytest

from apt_model.core.errors import ConfigError, InputError
from apt_model.core.policy import FollowsPolicy, Policy, current_policy, set_policy


@pytest.fixture(autouse=True)
def _no_policy():
    set_policy(None)
    yield
    set_policy(None)


def test_there_is_none_until_one_is_set_and_none_after_it_is_cleared():
    assert current_policy() is None
    policy = Policy(mode="balanced")
    set_policy(policy)
    assert current_policy() is policy
    set_policy(None)
    assert current_policy() is None


def test_it_holds_in_every_thread():
    set_policy(Policy(mode="balanced", precision="fp32"))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(current_policy()))
    thread.start()
    thread.join()
    assert seen == [Policy(mode="balanced", precision="fp32")]


def test_it_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy(mode="balanced").precision = "bf16"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("mode", "ludicrous", "'balanced', 'speed', 'memory', 'full'"),
        ("precision", "fp16", "'auto', 'fp32', 'bf16'"),
        ("activation_checkpointing", True, "'auto', 'on', 'off'"),
        ("fp4", True, "'auto', 'on', 'off'"),
    ],
)
def test_a_value_that_cannot_be_met_is_an_error_that_names_the_option(option, value, expected):
    with pytest.raises(ConfigError, match=rf"Policy\.{option}: expected one of {expected}, got {value!r}"):
        Policy(**{"mode": "balanced", option: value})


@pytest.mark.parametrize("value", ["balanced", {"mode": "balanced"}, True])
def test_only_a_policy_can_be_set(value):
    with pytest.raises(InputError, match="expected a Policy or None"):
        set_policy(value)
    assert current_policy() is None


@pytest.mark.parametrize(
    ("precision", "native_bf16", "resolved"),
    [
        ("auto", True, "bf16"),
        ("auto", False, "fp32"),
        ("bf16", False, "bf16"),
        ("bf16", True, "bf16"),
        ("fp32", True, "fp32"),
        ("fp32", False, "fp32"),
    ],
)
def test_precision_follows_the_device_unless_it_is_named(precision, native_bf16, resolved):
    assert Policy(mode="balanced", precision=precision).resolve_precision(native_bf16=native_bf16) == resolved


@pytest.mark.parametrize(
    ("choice", "activation_bytes", "recomputed"),
    [("auto", 99, False), ("auto", 100, False), ("auto", 101, True), ("on", 0, True), ("off", 10**15, False)],
)
def test_activations_are_recomputed_when_they_would_not_fit(choice, activation_bytes, recomputed):
    policy = Policy(mode="balanced", activation_checkpointing=choice)
    assert policy.resolve_checkpointing(activation_bytes=activation_bytes, free_bytes=100) is recomputed


def test_a_model_that_follows_is_known_by_its_method():
    class Follower:
        def apply_policy(self, policy):
            self.policy = policy

    assert isinstance(Follower(), FollowsPolicy)
    assert not isinstance(object(), FollowsPolicy)
