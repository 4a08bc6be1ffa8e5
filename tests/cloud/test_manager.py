"""What the environment says becomes backends and a report."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from clouds import CANARY

import apt_model.optimization.vb_global as vb
from apt_model.cloud.fake import FakeServer
from apt_model.cloud.providers.fakes import FakeGateway, FakeInternet, FakeQueue
from apt_model.core import env
from apt_model.core.errors import CloudError, ConfigError
from apt_model.optimization import enable_cloud_npu, get_cloud_npu_manager

ROOT = Path(__file__).parents[2]
HUAWEI = "modelarts.example"


def set_up(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def internet(**more):
    gateway = FakeGateway("modelarts", FakeServer(), key=CANARY, prefix="/v1/infers/abc")
    return FakeInternet({HUAWEI: gateway, **more})


def huawei(monkeypatch, **more):
    set_up(monkeypatch, HUAWEI_CLOUD_API_KEY=CANARY, HUAWEI_CLOUD_ENDPOINT=f"https://{HUAWEI}/v1/infers/abc", **more)


def test_nothing_is_set_up():
    report = enable_cloud_npu("auto")
    manager = get_cloud_npu_manager()
    assert report.available == []
    assert str(report).splitlines() == [
        "huawei: not set up: HUAWEI_CLOUD_API_KEY and HUAWEI_CLOUD_ENDPOINT are not set",
        "runpod: not set up: RUNPOD_API_KEY and RUNPOD_ENDPOINT_ID are not set",
        "salad: not set up: SALAD_ENDPOINT is not set",
        "own: not set up: APT_CLOUD_ENDPOINT is not set",
    ]
    assert (manager.list_backends(), manager.get_backend("huawei"), manager.is_any_available()) == ([], None, False)
    with pytest.raises(ConfigError, match="SALAD_ENDPOINT is not set"):
        enable_cloud_npu("salad")
    for call in (enable_cloud_npu, manager.get_backend):
        with pytest.raises(ConfigError, match="huawei, runpod, salad, own, got 'azure'"):
            call("azure")


def test_all_of_them(monkeypatch):
    huawei(monkeypatch)
    set_up(
        monkeypatch, RUNPOD_API_KEY=CANARY, RUNPOD_ENDPOINT_ID="abc123", SALAD_API_KEY=CANARY,
        SALAD_ENDPOINT="https://salad.example", APT_CLOUD_ENDPOINT="https://own.example/x", APT_CLOUD_API_KEY=CANARY,
    )  # fmt: skip
    net = internet(
        **{
            "abc123.api.runpod.ai": FakeGateway("runpod", FakeServer(), key=CANARY),
            "salad.example": FakeGateway("salad", FakeServer(), key=CANARY),
            "own.example": FakeGateway("own", FakeServer(), key=CANARY, prefix="/x"),
        }
    )
    report = enable_cloud_npu(connector=net)
    manager = get_cloud_npu_manager()
    assert report.available == manager.list_backends() == ["huawei", "runpod", "salad", "own"]
    assert CANARY not in str(report) + repr(report) + repr(manager) + repr(manager.describe())
    assert manager.is_any_available()
    backend = manager.get_backend("salad")
    assert enable_cloud_npu(connector=net).available == report.available
    assert manager.get_backend("salad") is backend  # nothing changed, so it stays connected
    monkeypatch.setenv("SALAD_API_KEY", "another")
    assert "salad" not in enable_cloud_npu(connector=net).available
    assert manager.get_backend("salad") is not backend
    with pytest.raises(CloudError, match="answers 401"):
        enable_cloud_npu("salad", connector=net)


def test_runpods_queue_is_found_where_its_load_balancer_is_not(monkeypatch):
    set_up(monkeypatch, RUNPOD_API_KEY=CANARY, RUNPOD_ENDPOINT_ID="abc123")
    report = enable_cloud_npu("runpod", connector=FakeInternet({"api.runpod.ai": FakeQueue(FakeServer(), key=CANARY)}))
    assert report.found[0].provider == "RunPod queue"
    monkeypatch.setenv("RUNPOD_ENDPOINT_ID", "evil.example/x")
    assert "expected an endpoint's id" in str(enable_cloud_npu())
    monkeypatch.setenv("RUNPOD_ENDPOINT_ID", "nowhere")
    assert "not available" in str(enable_cloud_npu(connector=FakeInternet({})))


@pytest.mark.parametrize("way", ["x-auth-token", "AppCode", "apikey"])
def test_huaweis_way_of_giving_the_key(monkeypatch, way):
    huawei(monkeypatch, HUAWEI_CLOUD_AUTH=way)
    gateway = FakeGateway("modelarts", FakeServer(), key=CANARY, way=way.lower(), prefix="/v1/infers/abc")
    assert enable_cloud_npu("huawei", connector=FakeInternet({HUAWEI: gateway})).available == ["huawei"]
    monkeypatch.setenv("HUAWEI_CLOUD_AUTH", "basic")
    assert "expected one of bearer" in str(enable_cloud_npu(connector=internet()))


def test_replicas_stand_after_a_comma(monkeypatch):
    set_up(monkeypatch, APT_CLOUD_ENDPOINT="https://one.example, https://two.example", APT_CLOUD_API_KEY=CANARY)
    net = FakeInternet({"two.example": FakeGateway("own", FakeServer(), key=CANARY)})
    report = enable_cloud_npu("own", connector=net)
    assert report.found[0].endpoints == ("https://one.example", "https://two.example")


def test_an_address_that_is_no_safe_one_is_told_without_its_value(monkeypatch):
    huawei(monkeypatch)
    for bad in (f"http://evil.example/{CANARY}", f"https://user:{CANARY}@h/", CANARY):
        monkeypatch.setenv("HUAWEI_CLOUD_ENDPOINT", bad)
        text = str(enable_cloud_npu())
        assert text.startswith("huawei: not set up")
        assert CANARY not in text


def test_the_guides_table_of_clouds_is_the_list():
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    for each in env.CLOUDS:
        assert f"| `{each.name}` | {each.takes} | {each.does} |" in text


def test_the_banner_names_what_is_connected(monkeypatch):
    huawei(monkeypatch)
    enable_cloud_npu(connector=internet())
    assert vb.status()["cloud_npu"] == {"configured": ["huawei"]}


def test_threads_see_one_manager(monkeypatch):
    huawei(monkeypatch)
    net = internet()
    found = []

    def work():
        enable_cloud_npu(connector=net)
        found.append(get_cloud_npu_manager().get_backend("huawei"))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len({id(each) for each in found}) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_goes_on(tmp_path):
    """A lock that another thread holds while the process forks is free in the child."""
    code = (
        "import os, threading\n"
        "from apt_model.cloud.manager import enable_cloud_npu, get_cloud_npu_manager\n"
        "manager = get_cloud_npu_manager()\n"
        "manager._lock.acquire(); manager._connecting.acquire()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    enable_cloud_npu('auto'); os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
