"""`CloudNPULinear`: right numbers, exact counters, gradients, and what happens when weights or servers change."""

import copy
import io
import logging
import threading
import time

import pytest
import torch
from clouds import CANARY, counts, in_process, in_threads, over_http, reference

from apt_model.cloud.backend import OIPBackend
from apt_model.cloud.client import DEADLINE_HEADER
from apt_model.cloud.fake import FakeServer
from apt_model.cloud.providers.maas import MaaSBackend
from apt_model.cloud.secret import Secret
from apt_model.core.errors import CloudError, ConfigError, DeadlineError, IntegrityError, RefusedError
from apt_model.optimization import CloudNPULinear

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "apt_model.cloud")


def infers(fake):
    return [each for each in fake.requests if each[1].endswith("/infer")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 2, 5)])
def test_it_is_nn_linear_computed_elsewhere(dtype, bias, shape):
    fake = FakeServer()
    with in_process(fake) as backend, torch.no_grad():
        layer = CloudNPULinear(5, 70, bias, cloud_backend=backend, fallback_local=False, dtype=dtype)
        x = torch.randn(shape, dtype=dtype)
        assert torch.equal(layer(x), reference(layer, x))
        assert counts(layer) == (1, 0, 0)
        assert layer(x).shape == (*shape[:-1], 70)


@pytest.mark.parametrize("whole_groups", [False, True])
def test_eight_bits_on_the_wire(whole_groups):
    fake = FakeServer(whole_groups=whole_groups)
    with in_process(fake) as backend, torch.no_grad():
        layer = CloudNPULinear(4096, 100, cloud_backend=backend, fallback_local=False, wire="int8g64")
        x = torch.randn(64, 4096)
        found, right = layer(x), reference(layer, x)
        assert float((found - right).norm() / right.norm()) < 0.02
        assert layer.get_stats()["bytes_sent"] / 64 <= 4232


def test_weights_go_up_once_and_a_forward_sends_none():
    fake = FakeServer()
    with in_process(fake) as backend, torch.no_grad():
        layer = CloudNPULinear(64, 64, cloud_backend=backend, fallback_local=False)
        x = torch.randn(2, 64)
        for _ in range(5):
            layer(x)
        puts = [each for each in fake.requests if each[0] == "PUT"]
        assert len(puts) == 1
        assert puts[0][3] > 64 * 64 * 4
        assert all(each[3] < 2 * 64 * 4 + 400 for each in infers(fake))
        assert not [each for each in fake.requests if "health" in each[1]][2:]  # asked once, not by forwards
        stats = layer.get_stats()
        assert stats["bytes_pushed"] == puts[0][3]
        assert stats["bytes_sent"] == sum(each[3] for each in infers(fake))
        twin = CloudNPULinear.from_linear(layer, cloud_backend=backend)
        twin(x)
        assert len([each for each in fake.requests if each[0] == "PUT"]) == 1


def test_an_id_is_new_each_forward_and_the_same_in_its_retries():
    faults = iter(["fail", None, None, "fail", None])
    fake = FakeServer(fault=lambda _: next(faults))
    seen = []
    infer = fake._guarded
    fake._guarded = lambda path, model, version, headers, body: (
        seen.append(body[: int(headers["inference-header-content-length"])]),
        infer(path, model, version, headers, body),
    )[1]
    with in_process(fake) as backend, torch.no_grad():
        layer = CloudNPULinear(4, 4, cloud_backend=backend, fallback_local=False)
        for _ in range(3):
            layer(torch.randn(1, 4))
        assert counts(layer) == (3, 0, 0)
        assert layer.get_stats()["retries"] == 2
    ids = [text.partition(b'"id":"')[2][:32] for text in seen]
    assert [ids.index(each) for each in ids] == [0, 0, 2, 3, 3]
    assert all(int(each[2][DEADLINE_HEADER.lower()]) <= 10_000 for each in infers(fake))


@pytest.mark.parametrize("wire", ["exact", "int8g64"])
def test_tokens_are_cut_to_the_body_limit(wire):
    fake = FakeServer(max_body=12_000, max_upload=1 << 20)
    with in_process(fake) as backend, torch.no_grad():
        layer = CloudNPULinear(64, 128, cloud_backend=backend, fallback_local=False, wire=wire)
        x = torch.randn(200, 64)
        found = layer(x)
        assert torch.equal(found, reference(layer, x)) or wire == "int8g64"
        assert len(infers(fake)) > 1
        assert len(set(fake.ids)) == len(infers(fake))
        assert counts(layer) == (1, 0, 0)
    fake = FakeServer(max_body=5000, max_upload=1 << 30)
    with in_process(fake) as backend, torch.no_grad():
        layer = CloudNPULinear(4096, 8, cloud_backend=backend, fallback_local=False)
        with pytest.raises(RefusedError, match="does not pass"):
            layer(torch.randn(1, 4096))
        assert counts(layer) == (0, 0, 1)


@pytest.mark.parametrize("path", ["cloud", "local"])
def test_gradients_are_nn_linears(path):
    fake = FakeServer(fault=lambda _: None if path == "cloud" else "fail")
    with in_process(fake) as backend:
        layer = CloudNPULinear(6, 9, cloud_backend=backend)
        x = torch.randn(4, 3, 6, requires_grad=True)
        (layer(x) ** 2).sum().backward()
        found = [x.grad, layer.weight.grad, layer.bias.grad]
        plain = torch.nn.Linear(6, 9)
        plain.load_state_dict(layer.state_dict())
        other = x.detach().clone().requires_grad_()
        (plain(other) ** 2).sum().backward()
        for one, two in zip(found, [other.grad, plain.weight.grad, plain.bias.grad], strict=True):
            torch.testing.assert_close(one, two)
        assert layer.get_stats()["backward_cloud"] == (path == "cloud")


def test_a_backward_that_fails_elsewhere_is_computed_here_or_raises():
    for fallback in (True, False):
        fake = FakeServer(fault=lambda path: "fail" if ".bwd" in path else None)
        with in_process(fake) as backend:
            layer = CloudNPULinear(6, 9, cloud_backend=backend, fallback_local=fallback)
            x = torch.randn(4, 6, requires_grad=True)
            y = layer(x)
            if not fallback:
                with pytest.raises(CloudError):
                    y.sum().backward()
                continue
            y.sum().backward()
            torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, 6).detach())
            assert layer.get_stats()["backward_local"] == 1
            assert counts(layer) == (1, 0, 0)


def test_weights_in_training_stay_here_and_are_pushed_again_afterwards():
    fake = FakeServer()
    with in_process(fake) as backend:
        layer = CloudNPULinear(6, 9, cloud_backend=backend)
        x = torch.randn(4, 6)
        layer(x).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        assert torch.equal(layer(x), reference(layer, x))
        assert counts(layer) == (1, 1, 0)
        assert layer.get_stats()["local_reasons"] == {"weights in training": 1}
        with torch.no_grad():
            assert torch.equal(layer(x), reference(layer, x))
        assert counts(layer) == (2, 1, 0)
        assert len(fake.held) == 2
        layer.load_state_dict(torch.nn.Linear(6, 9).state_dict())
        with torch.no_grad():
            assert torch.equal(layer(x), reference(layer, x))
        layer.weight.data.mul_(2)  # past torch's counter
        layer.refresh()
        with torch.no_grad():
            assert torch.equal(layer(x), reference(layer, x))
        assert len(fake.held) == 4


def test_a_server_that_forgot_the_weights_is_given_them_again():
    fake = FakeServer()
    with in_process(fake) as backend, torch.no_grad():
        layer = CloudNPULinear(6, 9, cloud_backend=backend, fallback_local=False)
        x = torch.randn(4, 6)
        layer(x)
        fake.held.clear()
        assert torch.equal(layer(x), reference(layer, x))
        assert counts(layer) == (2, 0, 0)
        fake.held.clear()
        shy = CloudNPULinear.from_linear(layer, cloud_backend=backend, fallback_local=False, push=False)
        with pytest.raises(RefusedError, match="does not hold apt-linear"):
            shy(x)


@pytest.mark.parametrize("fallback", [True, False])
def test_a_lying_server_is_not_believed(fallback):
    fake = FakeServer()
    fake.kinds["linear"] = lambda _, tensors, x: x @ (tensors["weight"] * 1.02).T
    with in_process(fake) as backend, torch.no_grad():
        layer = CloudNPULinear(64, 64, False, cloud_backend=backend, fallback_local=fallback)
        x = torch.randn(4, 64)
        if fallback:
            assert torch.equal(layer(x), reference(layer, x))
            assert layer.get_stats()["errors"] == {"IntegrityError": 1}
        else:
            with pytest.raises(IntegrityError):
                layer(x)
        trusting = CloudNPULinear.from_linear(layer, cloud_backend=backend, verify=False)
        assert not torch.equal(trusting(x), reference(layer, x))


def test_inputs_that_no_server_takes_are_computed_here():
    with in_process() as backend, torch.no_grad():
        layer = CloudNPULinear(4, 4, cloud_backend=backend, fallback_local=False)
        assert layer(torch.randn(0, 4)).shape == (0, 4)
        for wrong in (torch.randn(2, 5), torch.randn(2, 4, dtype=torch.float64)):
            with pytest.raises(RuntimeError):
                layer(wrong)
        assert counts(layer) == (0, 1, 2)
        double = CloudNPULinear(4, 4, cloud_backend=backend, dtype=torch.float64)
        assert double(torch.randn(2, 4).double()).dtype == torch.float64
        eight = CloudNPULinear(4, 4, cloud_backend=backend, wire="int8g64")
        assert eight(torch.full((1, 4), float("inf"))).shape == (1, 4)
        assert counts(eight) == (0, 1, 0)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("verify", [True, False])
def test_under_autocast_it_is_nn_linear_under_autocast(cast, verify):
    fake = FakeServer()
    with in_process(fake) as backend:
        layer = CloudNPULinear(64, 48, cloud_backend=backend, fallback_local=False, verify=verify)
        plain = torch.nn.Linear(64, 48)
        plain.load_state_dict(layer.state_dict())
        x = torch.randn(5, 64)
        found = []
        for each in (layer, plain):
            own = x.clone().requires_grad_()
            with torch.autocast("cpu", cast):
                y = each(own)
                y.float().square().sum().backward()
            found.append([y, own.grad, each.weight.grad, each.bias.grad])
        for one, two in zip(*found, strict=True):
            assert one.dtype == two.dtype
            torch.testing.assert_close(one, two, rtol=0.02, atol=0.02)
        assert torch.equal(found[0][0], found[1][0])
        assert counts(layer) == (1, 0, 0)
        assert layer.get_stats()["backward_cloud"] == 1
        with torch.no_grad(), torch.autocast("cpu", cast):
            assert torch.equal(layer(x.to(cast)), plain(x.to(cast)))
        layer(x)  # in fp32 they are other weights, and not in training
        assert counts(layer) == (3, 0, 0)
        assert {each.tensors["weight"].dtype for each in fake.held.values()} == {cast, torch.float32}


def test_a_backward_under_autocast_that_fails_elsewhere_is_computed_here():
    fake = FakeServer(fault=lambda path: "fail" if ".bwd" in path else None)
    with in_process(fake) as backend:
        layer, x = CloudNPULinear(8, 6, cloud_backend=backend), torch.randn(3, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x).float().sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1), rtol=0.02, atol=0.02)
        assert layer.get_stats()["backward_local"] == 1


def test_counters_are_exact_under_threads():
    numbers = iter(range(10_000))
    lock = threading.Lock()

    def fault(_):
        with lock:
            return ("fail", "stale", None, None)[next(numbers) % 4]

    fake = FakeServer(fault=fault, max_inflight=3)
    with in_process(fake) as backend, torch.no_grad():
        layer = CloudNPULinear(8, 8, cloud_backend=backend)
        wrong = []

        def work(seed):
            x = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
            for _ in range(25):
                if not torch.allclose(layer(x), reference(layer, x), atol=1e-5):
                    wrong.append(seed)  # noqa: PERF401 - a thread that fails says so at once

        in_threads(work, 6)
        assert not wrong
        cloud, local, raised = counts(layer)
        assert (cloud + local, raised) == (150, 0)
        stats = layer.get_stats()
        assert stats["cloud_errors"] == local == sum(stats["errors"].values())
        assert stats["cloud_ratio"] == cloud / 150


def test_a_server_that_is_killed_costs_a_few_milliseconds():
    with over_http() as (fake, served, backend), torch.no_grad():
        layer = CloudNPULinear(64, 64, cloud_backend=backend)
        x = torch.randn(4, 64)
        layer(x)
        fake.seconds = 0.3
        threading.Timer(0.1, served.close).start()
        started = time.perf_counter()
        assert torch.equal(layer(x), reference(layer, x))
        assert time.perf_counter() - started < 0.5
        for _ in range(5):
            layer(x)
        assert counts(layer) == (1, 6, 0)
        assert layer.get_stats()["breaker"] == ["open"]


def test_a_hung_server_never_goes_past_the_deadline():
    fault = [None]
    fake = FakeServer(fault=lambda _: fault[0])
    with over_http(fake) as (_, _, backend), torch.no_grad():
        layer = CloudNPULinear(64, 64, cloud_backend=backend, fallback_local=False, deadline_s=0.3)
        x = torch.randn(4, 64)
        layer(x)
        fault[0] = "hang"
        started = time.perf_counter()
        with pytest.raises(DeadlineError):
            layer(x)
        assert 0.25 < time.perf_counter() - started < 0.6
        started = time.perf_counter()
        with pytest.raises(CloudError, match="left alone"):
            layer(x)
        assert time.perf_counter() - started < 0.1


def test_chat_alone_is_local_with_one_warning_or_an_error_that_says_what_to_deploy(caplog):
    caplog.set_level(logging.WARNING, "apt_model.cloud")
    chat = MaaSBackend("https://x/v1", Secret(CANARY), "m", transport=None)
    layer = CloudNPULinear(4, 4, cloud_backend=chat)
    for _ in range(3):
        layer(torch.randn(2, 4))
    assert counts(layer) == (0, 3, 0)
    assert len(caplog.records) == 1
    assert "takes messages and returns tokens" in caplog.text
    with pytest.raises(ConfigError, match="apt-model serve"):
        CloudNPULinear(4, 4, cloud_backend=chat, fallback_local=False)
    with pytest.raises(ConfigError, match="there is no cloud backend"):
        CloudNPULinear(4, 4, cloud_backend=None, fallback_local=False)
    assert CANARY not in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"wire": "int4"}, "expected wire to be one of exact, int8g64"),
        ({"deadline_s": 0}, "expected deadline_s above 0"),
        ({"cloud_backend": "huawei"}, "expected a backend of get_cloud_npu_manager"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        CloudNPULinear(4, 4, **{"cloud_backend": None, **options})


def test_losing_is_said_once(caplog):
    caplog.set_level(logging.WARNING, "apt_model.cloud")
    fake = FakeServer()
    fake.seconds = 0.01
    with in_process(fake) as backend, torch.no_grad():
        layer = CloudNPULinear(4, 4, cloud_backend=backend)
        for _ in range(10):
            layer(torch.randn(2, 4))
        assert counts(layer) == (10, 0, 0)
    assert [each.getMessage().count("offloading loses") for each in caplog.records] == [1]


def test_a_state_dict_is_plain_and_copies_share_the_connection():
    fake = FakeServer(key=CANARY)
    with in_process(fake) as backend, torch.no_grad():
        layer = CloudNPULinear(4, 4, cloud_backend=backend)
        assert list(layer.state_dict()) == ["weight", "bias"]
        assert isinstance(layer, torch.nn.Linear)
        x = torch.randn(2, 4)
        layer(x)
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(x), layer(x))
        assert counts(twin) == (1, 0, 0)
        assert twin._offload.backend is backend
        with pytest.raises(ConfigError, match="not pickled") as caught:
            torch.save(layer, io.BytesIO())
        for text in (str(caught.value), repr(layer), repr(backend), str(backend.describe()), str(layer.get_stats())):
            assert CANARY not in text


def test_the_key_is_in_no_log_no_error_and_no_traceback(caplog):
    import traceback

    caplog.set_level(logging.DEBUG)
    fake = FakeServer(key="another")
    from clouds import bearer

    from apt_model.cloud.transport import InProcess

    backend = OIPBackend([InProcess(fake, auth=bearer())])
    layer = CloudNPULinear(4, 4, cloud_backend=backend, fallback_local=False)
    with pytest.raises(RefusedError) as caught:
        layer(torch.randn(2, 4))
    text = "".join(traceback.format_exception(caught.value)) + caplog.text
    CloudNPULinear(4, 4, cloud_backend=backend)(torch.randn(2, 4))
    assert "answers 401" in text
    assert CANARY not in text + caplog.text + repr(backend.health())
    backend.close()


def test_compile_leaves_it_as_it_is():
    with in_process() as backend, torch.no_grad():
        layer = CloudNPULinear(4, 4, cloud_backend=backend, fallback_local=False)
        compiled = torch.compile(torch.nn.Sequential(layer, torch.nn.ReLU()), backend="eager")
        x = torch.randn(2, 4)
        assert torch.equal(compiled(x), reference(layer, x).relu())
        assert counts(layer) == (1, 0, 0)
