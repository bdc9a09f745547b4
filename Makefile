# pjv2: `make demo` shows the main job, `make test` runs everything. PYTHON=python3.x chooses the interpreter.

SHELL := /bin/bash
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c '$(SUPPORTED)' >/dev/null 2>&1 && { echo $$p; exit; }; done)
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test check coverage bench docs mutants peers install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "pjv2 needs Python 3.11, 3.12 or 3.13: install one, or say PYTHON=/path/to/python" >&2; exit 2; fi
	@if [ ! -x $(BIN)/python ]; then $(PYTHON) -m venv $(VENV); fi
	@echo "installing pjv2 and what it needs into $(VENV) …" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lab,bdk,dev]'
	@touch $@

demo: install
	@$(BIN)/pjv2 $(if $(JSON),--json) demo

test: install
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

check: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/unit/test_imports.py

# Branch coverage of the pure layers; measuring it slows everything down, so the suite itself runs without.
coverage: install
	@$(BIN)/python -m pytest -q -n $(JOBS) tests/unit/wire tests/unit/psbt tests/unit/session \
		--cov=pjv2.wire --cov=pjv2.psbt --cov=pjv2.session --cov-branch --cov-report=term:skip-covered --cov-fail-under=95

bench: install
	@for b in tests/bench/bench_*.py; do $(BIN)/python $$b $(if $(JSON),--json) || exit 1; done

# Rewrites the generated parts of the documents; a test compares them with what stands in the tree.
docs: install
	@$(BIN)/python -m tests.docs_generator --write

# Takes each guard away in turn and demands that the suite goes red.
mutants: install
	@$(BIN)/python -m tests.mutants $(ONLY)

# The real programs that tests/peers runs against, installed in the user's cache; without them those tests skip.
peers: install
	@$(BIN)/python -m tests.peers.install --jobs $(JOBS) $(ONLY)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
