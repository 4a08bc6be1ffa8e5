"""Importing what a command line or a notebook's first cell needs loads nothing heavy and prints nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "triton", "tyro", "rich", "numpy", "tokenizers", "safetensors", "matplotlib", "tensorboard"}
HEAVY |= {"transformers", "peft", "accelerate"}
LEAN = [
    "apt_model",
    "apt_model.cloud.identity",
    "apt_model.cloud.server.config",
    "apt_model.cloud.wire",
    "apt_model.cli.diagnosis.diagnose",
    "apt_model.cli.diagnosis.redact",
    "apt_model.cli.doctor_text",
    "apt_model.core.env",
    "apt_model.core.errors",
    "apt_model.core.fp4_storage",
    "apt_model.core.policy",
    "apt_model.core.system",
    "apt_model.core.tensor_folders",
    "apt_model.integrations",
    "apt_model.integrations.fp4_schemes",
    "apt_model.integrations.quantize_config",
    "apt_model.modeling.configuration",
    "apt_model.modeling.generation_config",
    "apt_model.optimization",
    "apt_model.optimization.fp4_config",
    "apt_model.optimization.vb_global",
    "apt_model.trainer.config",
    "apt_model.trainer.corpus",
    "apt_model.trainer.presets",
    "apt_model.trainer.runs",
    "apt_model.vgpu.headers",
    "apt_model.vgpu.least",
    "apt_model.vgpu.report",
    "apt_model.integrations.hub",
]


def heavy_after(statement):
    """The heavy packages that are loaded after `statement` in a new process; it must print nothing."""
    code = f"{statement}\nimport json, sys; print(json.dumps(sorted({HEAVY} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert not done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", LEAN)
def test_it_loads_nothing_heavy(module):
    assert heavy_after(f"import {module}") == []


def test_looking_at_names_loads_nothing_heavy():
    code = (
        "import apt_model, apt_model.optimization as o; dir(apt_model), o.__all__, o.vb_global, apt_model.__version__"
    )
    assert heavy_after(code) == []


def test_configuring_loads_nothing_heavy():
    assert heavy_after("from apt_model import APTModelConfiguration as C; C(d_model=768, num_heads=12).to_dict()") == []


@pytest.mark.parametrize("statement", ["import apt_model.modeling.apt_model", "from apt_model import APTModel"])
def test_it_can_fail(statement):
    assert "torch" in heavy_after(statement)
