# make demo: creates .venv with what the demo needs and runs it.  make test: installs everything, runs every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Two cores, many small tensors: one thread per process is faster and repeatable.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check faults test-s3 slow gpu lint format install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[test,lint,ray,track]'
	touch $(STAMP) $(DEMO_STAMP)

# Only what the demo needs: no web server, no Ray, no linters, no test tools.
$(DEMO_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[demo]'
	touch $(DEMO_STAMP)

demo: $(DEMO_STAMP)
	$(BIN)/kd-cache demo --out demo-out

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

check: lint
	$(BIN)/pytest -n 2 -m 'not faults and not slow'

test: check

faults: $(STAMP)
	$(BIN)/pytest -n 2 -m faults

# Starts Ceph's object gateway on loopback; says which Debian packages it needs, and installs none.
test-s3: $(STAMP)
	$(BIN)/python tests/run_on_gateway.py

slow: $(STAMP)
	$(BIN)/pytest -m slow

# On a machine with a GPU; each part writes its page to gpu-out. DATA: a folder with CIFAR-100.
DATA ?= data/cifar100
# Installs nothing, because such machines often have no network: .venv if there is one, else $(PYTHON).
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py --out gpu-out --data $(DATA)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache demo-out
