"""Breaker, deadline and secret."""

import copy
import pickle

import pytest
from clouds import CANARY, Clock

from apt_model.cloud.breaker import Breaker
from apt_model.cloud.deadline import Deadline
from apt_model.cloud.secret import Auth, Secret
from apt_model.core.errors import ConfigError, DeadlineError


def test_it_opens_after_failures_in_a_row_and_doubles_up_to_a_minute():
    clock = Clock()
    breaker = Breaker(clock=clock)
    for _ in range(2):
        assert breaker.allow()
        breaker.failure()
    breaker.success()
    for _ in range(3):
        assert breaker.allow()
        assert breaker.state == "closed"
        breaker.failure()
    waits = []
    for _ in range(4):
        assert breaker.state == "open"
        assert not breaker.allow()
        waits.append(breaker.closed_in())
        clock.now += waits[-1]
        assert breaker.state == "half-open"
        assert breaker.allow()
        assert not breaker.allow()  # a single probe
        breaker.failure()
    assert waits == [15, 30, 60, 60]
    clock.now += 60
    assert breaker.allow()
    breaker.success()
    assert breaker.state == "closed"
    breaker.failure(severe=True)
    assert breaker.closed_in() == 15


def test_a_probe_given_up_lets_another_one_through():
    clock = Clock()
    breaker = Breaker(clock=clock)
    breaker.failure(severe=True)
    clock.now += 15
    assert breaker.allow()
    breaker.give_up()
    assert breaker.allow()


def test_what_was_on_its_way_when_it_opened_does_not_prolong_it():
    clock = Clock()
    breaker = Breaker(clock=clock)
    breaker.failure(severe=True)
    breaker.failure()
    assert breaker.closed_in() == 15


def test_a_deadline_counts_down_and_names_what_was_late():
    clock = Clock()
    deadline = Deadline(2, clock)
    clock.now += 1.5
    assert deadline.check("x") == pytest.approx(0.5)
    clock.now += 1
    assert deadline.left() == 0
    with pytest.raises(DeadlineError, match="https://host: no answer within 2 s, all attempts included"):
        deadline.check("https://host")


def test_a_key_is_shown_nowhere():
    secret = Secret(CANARY)
    auth = Auth("Authorization", secret, "Bearer ")
    for shown in (repr(secret), str(secret), f"{secret!r}", repr(auth), str(vars(Secret)), repr(copy.deepcopy(auth))):
        assert CANARY not in shown
    for each in (secret, auth):
        with pytest.raises(ConfigError) as caught:
            pickle.dumps(each)
        assert CANARY not in str(caught.value)
    assert auth.redact(f"no key {CANARY} here") == "no key *** here"
    assert auth.pair() == ("Authorization", f"Bearer {CANARY}")


def test_a_key_may_be_a_function_for_those_that_expire():
    keys = iter(["one", "two"])
    secret = Secret(lambda: next(keys))
    assert (secret.reveal(), secret.reveal()) == ("one", "two")


@pytest.mark.parametrize("key", ["", " ", "a b", "a\r\nX-Evil: 1", "\N{SNOWMAN}"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key):
    with pytest.raises(ConfigError) as caught:
        Secret(key)
    assert key.strip() == "" or key not in str(caught.value)
    with pytest.raises(ConfigError):
        Secret(lambda: key).reveal()
