"""`apt-model doctor` on a machine with a sound GPU: nothing is called broken, and everything was tried."""

import pytest
import torch

from apt_model.cli.diagnosis.diagnose import diagnose
from apt_model.cli.diagnosis.system import here

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_sound_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("APT_DEVICE", raising=False)
    made = diagnose(here(), str(tmp_path))
    print(f"{made.seconds:.2f} s", made.probes, made.facts, *made.findings, sep="\n")
    assert [each for each in made.findings if each.severity == "broken"] == []
    facts = made.facts
    assert facts["device"]["kind"] == "cuda"
    assert facts["matmul_s"] > 0
    assert facts["triton_kernel_s"] > 0
    assert 0 < facts["pinned_bytes"] <= facts["pinned_tried_bytes"]
    assert {each["end"] for each in made.probes} == {"exit"}


def test_a_hidden_gpu_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    made = diagnose(here(), str(tmp_path))
    assert [each.code for each in made.findings if each.severity == "broken"] == ["APT-D24"]


def test_a_gpu_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("APT_DEVICE", "cuda:99")
    made = diagnose(here(), str(tmp_path))
    assert "APT-D61" in {each.code for each in made.findings}
