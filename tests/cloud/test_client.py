"""Retries, waits, replicas and hedges; one deadline, one id."""

import threading
import time

import pytest
from clouds import CANARY, Clock, bearer, in_process

from apt_model.cloud.client import DEADLINE_HEADER, Client, Retry, Tally
from apt_model.cloud.deadline import Deadline
from apt_model.cloud.fake import Answer, FakeServer
from apt_model.cloud.transport import Request, Response
from apt_model.core.errors import CloudError, DeadlineError, RefusedError, WireError


class Script:
    """A transport that does what it is told, one step a request; the last step is repeated."""

    def __init__(self, *steps, name="https://a", clock=None):
        self.steps, self.name, self.clock, self.asked, self.closed = list(steps), name, clock, [], False

    def send(self, request, *, timeout, late=None):  # noqa: ARG002 - nothing is late here
        self.asked.append((request, timeout))
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if isinstance(step, float):
            time.sleep(step)
            step = 200
        if isinstance(step, Exception):
            if self.clock and isinstance(step, DeadlineError):
                self.clock.now += timeout
            raise step
        status, headers, body = step if isinstance(step, tuple) else (step, {}, b"{}")
        return Response(status=status, headers=headers, body=bytearray(body))

    def redact(self, text):
        return bearer().redact(text)

    def close(self):
        self.closed = True


GET = Request(method="GET", path="/v2")
BUSY = (429, {"retry-after": "0.5"}, b"{}")


def client(*transports, clock=None, **options):
    clock = clock or Clock()
    return Client(transports, clock=clock, sleep=clock.sleep, chance=lambda: 0.5, **options), clock


def test_the_first_retry_is_at_once_and_the_others_wait_longer_each():
    script = Script(CloudError("x"))
    asked, clock = client(script, retry=Retry(attempts=5, first=0.1, longest=0.3), breaker=None)
    tally = Tally()
    with pytest.raises(CloudError):
        asked.ask(GET, Deadline(10, clock), tally=tally)
    assert len(script.asked) == 3  # then its breaker is open
    assert clock.slept == pytest.approx([0.1 * 0.875])
    assert tally.retries == 2
    with pytest.raises(CloudError, match="left alone after failures, for another 15 s"):
        asked.ask(GET, Deadline(10, clock))
    assert len(script.asked) == 3


def test_retry_after_is_honoured_and_never_trips_the_breaker():
    script = Script(BUSY, (503, {"retry-after-ms": "20"}, b""), 200)
    asked, clock = client(script)
    assert asked.ask(GET, Deadline(10, clock)).status == 200
    assert clock.slept == [0.5, 0.02]
    for _ in range(5):
        script.steps = [BUSY]
        with pytest.raises(CloudError, match="answers 429"):
            asked.ask(GET, Deadline(10, clock))
    assert asked.endpoints[0].breaker.state == "closed"


@pytest.mark.parametrize("wait", ["3", "1000000", "nan", "-1", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_a_wait_beyond_patience_or_deadline_ends_it(wait):
    asked, clock = client(Script((429, {"retry-after": wait}, b"")))
    with pytest.raises(CloudError, match="429"):
        asked.ask(GET, Deadline(2, clock))
    assert sum(clock.slept) < 2
    with pytest.raises(CloudError, match="429"):
        asked.ask(GET, Deadline(20, clock), patience=0.0)


@pytest.mark.parametrize("status", [400, 401, 403, 413, 418])
def test_a_refusal_is_not_repeated_and_its_words_are_told_without_the_key(status):
    script = Script((status, {}, f'{{"error": "no \\u001b[31m key {CANARY}"}}'.encode()))
    asked, clock = client(script)
    for _ in range(4):
        with pytest.raises(RefusedError, match=f"https://a answers {status}: no  \\[31m key \\*\\*\\*") as caught:
            asked.ask(GET, Deadline(10, clock))
    assert CANARY not in str(caught.value)
    assert len(script.asked) == 4
    assert asked.endpoints[0].breaker.state == "closed"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"detail": [{"msg": "Input should be FP32"}]}', "Input should be FP32"),
        (b'{"error": "first", "detail": "second"}', "first"),
        (b'{"x": 1}', "answers 422$"),
        (b"[1]", "answers 422$"),
        (b"plain words", "plain words"),
    ],
)
def test_what_other_servers_say_is_told(body, said):
    asked, clock = client(Script((422, {}, body)))
    with pytest.raises(RefusedError, match=said):
        asked.ask(GET, Deadline(10, clock))


def test_not_implemented_is_a_last_word():
    script = Script(501)
    asked, clock = client(script)
    for _ in range(5):
        with pytest.raises(RefusedError, match="answers 501"):
            asked.ask(GET, Deadline(10, clock))
    assert len(script.asked) == 5
    assert asked.endpoints[0].breaker.state == "closed"


def test_a_deadline_is_shared_by_all_attempts_and_told_to_the_server():
    clock = Clock()
    script = Script((503, {"retry-after": "1"}, b""), DeadlineError("late"), clock=clock)
    asked, _ = client(script, clock=clock)
    with pytest.raises(DeadlineError):
        asked.ask(GET, Deadline(3, clock))
    assert [timeout for _, timeout in script.asked] == [3, 2]
    assert [request.headers[DEADLINE_HEADER] for request, _ in script.asked] == ["3000", "2000"]
    assert clock.now == 103
    assert asked.endpoints[0].breaker.state == "open"  # it had most of the time, and is left alone at once


def test_what_little_time_was_left_does_not_speak_against_an_endpoint():
    clock = Clock()
    script = Script((503, {"retry-after": "2"}, b""), DeadlineError("late"), clock=clock)
    asked, _ = client(script, clock=clock)
    with pytest.raises(DeadlineError):
        asked.ask(GET, Deadline(3, clock))
    assert asked.endpoints[0].breaker.state == "closed"


def test_a_replica_is_asked_at_once():
    one, other = Script(CloudError("x")), Script(200, name="https://b")
    asked, clock = client(one, other)
    for _ in range(6):
        assert asked.ask(GET, Deadline(10, clock), patience=0.0).status == 200
    assert (len(one.asked), len(other.asked)) == (3, 6)  # then the first one's breaker is open
    assert clock.slept == []
    clock.now += 15
    one.steps = [200]
    asked.ask(GET, Deadline(10, clock))
    assert asked.endpoints[0].breaker.state == "closed"


def test_a_truncated_answer_is_asked_for_again():
    script = Script(WireError("ends after"), 200)
    asked, clock = client(script)
    assert asked.ask(GET, Deadline(10, clock)).status == 200


def test_what_is_late_is_asked_of_a_replica_and_the_first_answer_is_taken():
    one, other = Script(0.005), Script(200, name="https://b")
    asked = Client([one, other])
    for _ in range(8):
        asked.ask(GET, Deadline(5))
    one.steps = [1.0]
    tally = Tally()
    started = time.perf_counter()
    assert asked.ask(GET, Deadline(5), tally=tally).status == 200
    assert time.perf_counter() - started < 0.5
    assert (len(other.asked), tally.retries) == (1, 1)
    asked.close()
    assert one.closed
    assert not [each for each in threading.enumerate() if each.name.startswith("apt-cloud-hedge")]


def test_no_error_of_another_kind_leaves_a_probe_behind():
    script = Script(ZeroDivisionError())
    asked, clock = client(script)
    asked.endpoints[0].breaker.failure(severe=True)
    clock.now += 15
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            asked.ask(GET, Deadline(5, clock))


def test_a_server_that_was_down_is_asked_for_its_limits_again():
    """What it was believed to take in its absence is not believed for good."""
    fake, clock = FakeServer(max_body=12_000, max_upload=1 << 20), Clock()
    answer, fake.answer = fake.answer, lambda *_: Answer(503)
    with in_process(fake, clock=clock, retry=Retry(attempts=1)) as backend:
        assert not backend.is_available()
        assert backend.limits()[0] > 12_000
        fake.answer = answer
        assert not backend.is_available()
        clock.sleep(6)
        assert backend.limits() == (12_000, 12_000)
        assert backend.upload_limit() == 1 << 20
        clock.sleep(20)
        asked = len(fake.requests)
        assert backend.is_available()  # what it said is believed for longer
        assert backend.limits() == (12_000, 12_000)
        assert len(fake.requests) == asked
