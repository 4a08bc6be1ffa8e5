"""The recipes of deploy/: they parse, and name only options, paths and ports that the server has."""

import json
import os
import re
import subprocess

import pytest
import yaml
from served import ROOT

from apt_model.cli.options import flags
from apt_model.cli.serve import Options
from apt_model.cloud.server.app import _OPEN

DEPLOY = ROOT / "deploy"
TEXTS = [path for path in sorted(DEPLOY.rglob("*")) if path.is_file()]
OTHERS = {
    "--build-arg",
    "--create-home",
    "--uid",
    "--index-url",
    "--interval",
    "--timeout",
    "--start-period",
    "--from-literal",
}


def test_configurations_parse():
    probes = set()
    for path in DEPLOY.rglob("*.json"):
        probes |= set(re.findall(r'"(?:path|url)": "(/[^"]*)"', path.read_text()))
        json.loads(path.read_text())
    (service,) = yaml.safe_load_all((DEPLOY / "kserve" / "inferenceservice.yaml").read_text())
    container = service["spec"]["predictor"]["containers"][0]
    assert container["ports"][0]["containerPort"] == 8080
    probes |= {container[f"{name}Probe"]["httpGet"]["path"] for name in ("readiness", "liveness")}
    probes.add(re.search(r"HEALTH_CHECK_PATH=(\S+)", (DEPLOY / "runpod" / "env").read_text())[1])
    assert {each for each in probes if not re.fullmatch(r"/v2(/models/\w+(/infer)?)?", each)} <= set(_OPEN)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_options_exist(path):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text())) - OTHERS
    assert named <= set(flags(Options))


@pytest.mark.parametrize("provider", ["modelarts", "runpod", "salad", "kserve"])
def test_recipes_say_what_they_are(provider):
    assert "Documentation-tested, not account-tested." in (DEPLOY / provider / "README.md").read_text()


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [
        ({}, "--allow-upload --store /srv/store --host 0.0.0.0 --port 8080 --token-env SERVE_KEY --name model -x"),
        (
            {"WEIGHTS": "/w/a.safetensors", "BLOCK": "mlp", "PORT": "81", "SERVE_HOST": "::", "NAME": "up"},
            "--block mlp --weights /w/a.safetensors --host :: --port 81 --token-env SERVE_KEY --name up -x",
        ),
    ],
)
def test_the_start(tmp_path, variables, arguments):
    (tmp_path / "apt-model").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "apt-model").chmod(0o755)
    base = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
    command = ["sh", str(DEPLOY / "start.sh"), "-x"]
    done = subprocess.run(command, env={**base, "SERVE_KEY": "k"}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["serve", *arguments.split()]
    without = subprocess.run(command, env=base, capture_output=True, text=True, check=False)
    assert without.returncode != 0
    assert "set SERVE_KEY" in without.stderr
