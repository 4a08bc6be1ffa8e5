# Every target works on a fresh clone: the environment is made on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo compare test peers check format clean

# Set up, train the tiny preset on this Python's own library, evaluate on held-out files, write some text.
demo: .venv/.installed-plot
	rm -rf runs/demo
	$(BIN)/apt-model train --preset tiny --out runs/demo
	$(BIN)/apt-model eval runs/demo
	$(BIN)/apt-model generate runs/demo --prompt "def read_" --max-new-tokens 96 --do-sample --temperature 0.7 --seed 1

# The demo's model beside its plain twin, trained with the same budget (as long again).
compare: .venv/.installed-plot
	$(BIN)/apt-model eval runs/demo --compare

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8

# Independent servers and clients of the protocol, each in an environment of its own, and the tests that need them.
peers: .venv/.installed-dev .peers-mlserver/.installed .peers-kserve/.installed
	$(BIN)/python -m pytest -q tests/cloud/test_peer_mlserver.py tests/cloud/test_peer_kserve.py

.peers-%/.installed: tests/cloud/peers/%.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# Format, lint, types, layers and the fast tests.
check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/contract tests/unit

format: .venv/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/.installed-%: pyproject.toml scripts/setup.py
	$(PYTHON) scripts/setup.py --extras $*

clean:
	rm -rf .venv .peers-* runs
