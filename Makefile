# make setup   .venv with what running needs        make test    the whole CPU test suite
# make demo    from raw text to a trained BLT       make check   format, lint, types, import contracts
# make check-cuda  one step on CUDA without a GPU: shipped configurations against bounds on memory (TORCH=2.13.0)
# make test-full   every layout too, about an hour      make test-oldest   interop with the oldest transformers
# make soak    an hour of kills, stops and signals      make format
.PHONY: help setup setup-dev demo test test-full soak test-oldest check check-cuda format

VENV_PYTHON := .venv/bin/python
OLDEST := from blt_titan.hf.model_card import OLDEST_TRANSFORMERS; print(OLDEST_TRANSFORMERS)

help:
	@sed -n '1,5s/^# //p' Makefile

setup: .venv/.installed-demo
setup-dev: .venv/.installed-dev

.venv/.installed-%: pyproject.toml scripts/constraints.txt scripts/setup.sh
	@scripts/setup.sh $*

demo: setup
	@OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(VENV_PYTHON) -m blt_titan demo

# One worker for each core, four at most: ranks of distributed tests come on top. A file's tests stay in one worker, because
# they share what its fixtures start.
PYTEST := $(VENV_PYTHON) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test: setup-dev
	$(PYTEST) -m "not full"

test-full: setup-dev
	$(PYTEST) -m "not soak"

soak: setup-dev
	$(VENV_PYTHON) -m pytest -s -m soak tests/integration/test_soak.py

# Beside the newest, which is in .venv, and before it on the path.
.venv/.installed-oldest: .venv/.installed-dev blt_titan/hf/model_card.py
	rm -rf .venv/oldest
	$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/oldest \
		transformers==$$($(VENV_PYTHON) -c "$(OLDEST)")
	touch $@

test-oldest: .venv/.installed-oldest
	TRANSFORMERS_RELEASE=$$($(VENV_PYTHON) -c "$(OLDEST)") PYTHONPATH=$(CURDIR)/.venv/oldest \
		$(PYTEST) -m "not slow" tests/hf

check: setup-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright --pythonpath $(VENV_PYTHON)
	.venv/bin/lint-imports
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict

TORCH ?= 2.13.0
check-cuda:
	@TORCH=$(TORCH) scripts/check_cuda.sh

format: setup-dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
