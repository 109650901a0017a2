# make demo: environment, install, the whole job on real data.  make test: environment, install, every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Two cores, many small tensors: one thread per process is faster and repeatable.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check faults lint format install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint,ray,track]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/kd-cache demo --out demo-out

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

check: lint
	$(BIN)/pytest -n 2 -m 'not faults'

test: check

faults: $(STAMP)
	$(BIN)/pytest -n 2 -m faults

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache demo-out
