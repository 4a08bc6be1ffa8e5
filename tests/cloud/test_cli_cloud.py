"""`apt-model cloud`: status, push, test and chat against a fake, and no key anywhere."""

import json

import pytest
import torch
from clouds import CANARY
from safetensors.torch import save_file

from apt_model.cli.main import main
from apt_model.cloud.fake import FakeServer
from apt_model.cloud.fake_http import serving


@pytest.fixture
def fake(monkeypatch):
    made = FakeServer(key=CANARY)
    with serving(made) as served:
        monkeypatch.setenv("APT_CLOUD_ENDPOINT", served.url)
        monkeypatch.setenv("APT_CLOUD_API_KEY", CANARY)
        yield made


def told(capsys, *args):
    code = main(["cloud", *args])
    out, err = capsys.readouterr()
    assert CANARY not in out + err
    return code, out, err


def test_status(fake, capsys):
    code, out, _ = told(capsys, "status")
    assert code == 0
    assert "a server of one's own, tensors, available: fake 1 (http://127.0.0.1:" in out
    assert "huawei" in out
    code, out, _ = told(capsys, "--format", "json")
    assert [each["available"] for each in json.loads(out)["clouds"]] == [False, False, False, True]


def test_status_without_any(capsys):
    code, out, _ = told(capsys, "status")
    assert code == 8
    assert out.count("not set up") == 4


def test_push_once(fake, capsys, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"weight": torch.randn(4, 4)}, path, {"kind": "linear", "config": "{}"})
    code, out, _ = told(capsys, "push", "--file", str(path))
    assert code == 0
    assert "apt-linear, version " in out
    assert len(fake.held) == 1
    assert "it held them already" in told(capsys, "push", "--file", str(path))[1]
    bare = tmp_path / "bare.safetensors"
    save_file({"weight": torch.randn(4, 4)}, bare)
    assert "do not name the kind" in told(capsys, "push", "--file", str(bare))[2]
    assert told(capsys, "push", "--file", str(bare), "--kind", "linear", "--format", "json")[0] == 0
    assert told(capsys, "push", "--file", str(tmp_path / "none"))[0] == 2
    assert "missing: --file" in told(capsys, "push")[2]


def test_a_round_trip(fake, capsys):
    code, out, err = told(capsys, "test", "--width", "64", "--forwards", "5")
    assert (code, err) == (0, "")
    assert "ms median" in out
    assert "it held" not in out
    found = json.loads(told(capsys, "test", "--width", "64", "--forwards", "5", "--format", "json")[1])["clouds"][0]
    assert found["forwards"] == 5
    assert found["bytes_pushed"] == 0  # the same weights, from the same seed
    assert found["worst_error"] < 1e-4
    assert "--rows: expected 1 or more" in told(capsys, "test", "--rows", "0")[2]


def test_chat_needs_a_cloud_that_chats(fake, capsys):
    assert "missing: --prompt" in told(capsys, "chat")[2]
    code, _, err = told(capsys, "chat", "--prompt", "hello")
    assert code == 8
    assert "takes tokens" in err


def test_chat(monkeypatch, capsys):
    import apt_model.cloud.providers.maas as module
    from apt_model.cloud.providers.fakes import FakeMaaS

    maas = FakeMaaS(key=CANARY)
    with serving(maas) as served:
        monkeypatch.setenv("HUAWEI_CLOUD_API_KEY", CANARY)
        monkeypatch.setenv("HUAWEI_CLOUD_ENDPOINT", f"{served.url}/v1/chat/completions")
        monkeypatch.setenv("HUAWEI_CLOUD_MODEL", "deepseek-r1")
        monkeypatch.setattr(module.MaaSBackend, "chat", lambda self, prompt, **_: f"{self.model}: {prompt}")
        code, out, _ = told(capsys, "chat", "--prompt", "hello")
        assert (code, out) == (0, "deepseek-r1: hello\n")
