"""The mission's code, word for word: on ModelArts, on MaaS alone, on no cloud, and on one that dies on the way."""

import logging
import re
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from clouds import CANARY, counts, reference

import apt_model.optimization.vb_global as vb
from apt_model.cloud.fake import FakeServer
from apt_model.cloud.fake_http import serving
from apt_model.cloud.manager import get_cloud_npu_manager
from apt_model.cloud.providers.fakes import FakeGateway, FakeMaaS

# The keys and addresses are the account's; everything else stands as it was given.
SET_UP = """
import os
os.environ["HUAWEI_CLOUD_API_KEY"] = {key!r}
os.environ["HUAWEI_CLOUD_ENDPOINT"] = {endpoint!r}
os.environ["HUAWEI_CLOUD_MODEL"] = "deepseek-r1"
"""
CODE = """
import torch
import apt_model.optimization.vb_global as vb
from apt_model.optimization import enable_cloud_npu, get_cloud_npu_manager, CloudNPULinear

enable_cloud_npu("auto")
vb.enable()
manager = get_cloud_npu_manager()
backend = manager.get_backend("huawei")
layer = CloudNPULinear(
    in_features=768,
    out_features=3072,
    cloud_backend=backend,
    fallback_local=True
)
output = layer(torch.randn(32, 768))
stats = layer.get_stats()
print(stats["cloud_calls"], stats["local_calls"], stats["cloud_errors"], stats["cloud_ratio"])
print(stats["bytes_sent"], stats["bytes_received"])
print(manager.is_any_available(), manager.list_backends())
"""


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """The code writes to os.environ itself, and sets the process's policy."""
    for name in ("API_KEY", "ENDPOINT", "MODEL"):
        monkeypatch.setenv(f"HUAWEI_CLOUD_{name}", "")
    yield
    vb.disable()


def mission(endpoint=None):
    """The names that the code leaves: manager, backend, layer, output, stats."""
    names = {}
    text = CODE if endpoint is None else SET_UP.format(key=CANARY, endpoint=endpoint) + CODE
    exec(text, names)  # noqa: S102 - as a user's program
    assert names["output"].shape == (32, 3072)
    return names


def same(layer, forwards):
    """More forwards, each compared with the local layer's."""
    for _ in range(forwards):
        x = torch.randn(32, 768)
        torch.testing.assert_close(layer(x), reference(layer, x))


def modelarts(**options):
    return FakeGateway("modelarts", FakeServer(**options), key=CANARY, prefix="/v1/infers/abc")


def test_with_a_modelarts_service_that_holds_the_weights(capsys):
    gateway = modelarts()
    with serving(gateway) as served:
        found = mission(f"{served.url}/v1/infers/abc")
        stats, layer = found["stats"], found["layer"]
        assert (stats["cloud_calls"], stats["local_calls"], stats["cloud_errors"]) == (1, 0, 0)
        assert stats["cloud_ratio"] == 1.0
        assert 32 * 768 * 4 < stats["bytes_sent"] < 32 * 768 * 4 + 2000
        assert 32 * 3072 * 4 < stats["bytes_received"] < 32 * 3072 * 4 + 2000
        assert found["manager"].is_any_available()
        assert found["manager"].list_backends() == ["huawei"]
        assert found["backend"].is_available()
        assert layer._known.weights.version in {version for _, version in gateway.server.held}
        with torch.no_grad():
            same(layer, 5)
        assert counts(layer) == (6, 0, 0)
        assert CANARY not in capsys.readouterr().out
        found["manager"].close()


def test_with_maas_alone(caplog):
    fake = FakeMaaS(key=CANARY)
    with serving(fake) as served:
        found = mission(f"{served.url}/v1/chat/completions")
        assert found["backend"].capabilities == {"tokens"}
        assert found["manager"].is_any_available()
        same(found["layer"], 4)
        assert counts(found["layer"]) == (0, 5, 0)
        warned = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
        assert len(warned) == 1, warned
        assert "cannot run a layer" in warned[0]
        found["manager"].close()


def test_with_no_cloud_at_all(monkeypatch, caplog):
    for name in ("API_KEY", "ENDPOINT", "MODEL"):
        monkeypatch.delenv(f"HUAWEI_CLOUD_{name}")
    found = mission()
    assert found["backend"] is None
    assert (found["manager"].is_any_available(), found["manager"].list_backends()) == (False, [])
    same(found["layer"], 4)
    assert counts(found["layer"]) == (0, 5, 0)
    assert "there is no cloud backend: computed here" in caplog.text


def test_with_an_address_at_which_nobody_is(caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    found = mission(f"http://127.0.0.1:{port}/v1/infers/abc")
    assert (found["manager"].is_any_available(), found["manager"].list_backends()) == (False, ["huawei"])
    same(found["layer"], 4)
    assert counts(found["layer"]) == (0, 5, 0)
    assert len([each for each in caplog.records if each.levelno >= logging.WARNING and "cloud" in each.name]) == 1


def test_with_a_cloud_that_dies_between_two_forwards(caplog):
    caplog.set_level(logging.DEBUG)
    with serving(modelarts()) as served:
        found = mission(f"{served.url}/v1/infers/abc")
        served.close()
        with torch.no_grad():
            for _ in range(5):
                x = torch.randn(32, 768)
                assert torch.equal(found["layer"](x), reference(found["layer"], x))
        assert counts(found["layer"]) == (1, 5, 0)
        assert not found["manager"].is_any_available()
        assert CANARY not in caplog.text
        found["manager"].close()


def test_with_a_cloud_that_dies_while_it_computes():
    gateway = modelarts()
    with serving(gateway) as served:
        found = mission(f"{served.url}/v1/infers/abc")
        layer, x = found["layer"], torch.randn(32, 768)
        asked, gateway.server.seconds = len(gateway.server.ids), 0.5
        begun = threading.Event()
        gateway.server.fault = lambda _: begun.set()  # nothing else goes wrong

        def die():
            begun.wait(10)
            served.close()

        killer = threading.Thread(target=die)
        killer.start()
        started = time.monotonic()
        with torch.no_grad():
            assert torch.equal(layer(x), reference(layer, x))
        assert time.monotonic() - started < 5  # far from the deadline of 10 s
        killer.join()
        assert len(gateway.server.ids) > asked
        assert counts(layer) == (1, 1, 0)
        found["manager"].close()


def test_the_summarys_whole_example_uses_a_cloud_that_is_set_up(monkeypatch):
    """Its blocks run without a cloud in tests/integration/test_docs.py."""
    text = (Path(__file__).parents[2] / "docs" / "INTEGRATION_SUMMARY.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    gateway = modelarts()
    with serving(gateway) as served:
        monkeypatch.setenv("HUAWEI_CLOUD_API_KEY", CANARY)
        monkeypatch.setenv("HUAWEI_CLOUD_ENDPOINT", f"{served.url}/v1/infers/abc")
        names = {}
        for code in blocks:
            exec(code, names)  # noqa: S102 - our own documentation
        stats = names["head"].get_stats()
        assert (stats["cloud_calls"], stats["local_calls"], stats["backward_cloud"]) == (20, 0, 20)
        assert stats["bytes_pushed"] < 2 * names["head"].weight.nbytes  # once
        get_cloud_npu_manager().close()
