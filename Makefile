PYTHON ?= python3
VENV ?= .venv

# JAX compiles with several threads for each worker, so few workers are enough.
PYTEST_FLAGS ?= -q -n logical --maxprocesses=4 --dist=worksteal
PY = $(VENV)/bin/python
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
# The environment is complete, and made by this interpreter, if this file is there.
STAMP = $(VENV)/.complete-$(VERSION)

# Pyright's wrapper would ask the network for a newer release of itself.
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1

.DEFAULT_GOAL := help
.PHONY: help test lint pytest test-long test-tpu fuzz faults format demo env clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Each target first makes the environment that it needs, from Python >= 3.11 and pip alone."
	@echo "PYTHON=$(PYTHON) picks the interpreter, VENV=$(VENV) the folder, ARGS=... goes to the program."

test: lint pytest  ## lint, types and all tests but those marked long or tpu

lint: $(STAMP)  ## ruff (rules and format) and pyright
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet .
	@$(PY) -m pyright --pythonpath $(PY)

pytest: $(STAMP)  ## the tests alone, e.g. make pytest ARGS='-k masks'
	@$(PY) -m pytest $(PYTEST_FLAGS) $(ARGS)

# As users run it: other tests compile with little optimisation, which takes half the time.
test-long: export XLA_FLAGS += --xla_backend_optimization_level=3
test-long: $(STAMP)  ## tests that take minutes to compile, and whole jobs, fully optimised
	@$(PY) -m pytest $(PYTEST_FLAGS) -m long $(ARGS)

test-tpu: $(STAMP)  ## programs and kernels through the TPU's compiler, which needs no TPU
	@$(PY) -c 'import libtpu' 2>/dev/null || $(PY) -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt 'jax[tpu]'
	@$(PY) -m pytest $(PYTEST_FLAGS) -m tpu $(ARGS)

fuzz: $(STAMP)  ## 2,400 random attention cases against the float64 oracle
	@$(PY) -m pytest $(PYTEST_FLAGS) -m fuzz $(ARGS)

faults: $(STAMP)  ## break training jobs for real, and count what survived
	@$(PY) -m tests.faults $(ARGS)

format: $(STAMP)  ## rewrite the files in the project's format
	@$(PY) -m ruff check --quiet --fix .
	@$(PY) -m ruff format .

demo: $(STAMP)  ## experiments/flow.py: what attention does, in numbers and a picture
	@$(PY) -m experiments.flow $(ARGS)

env: $(STAMP)  ## the environment alone

clean:  ## remove environments, caches and builds; keeps runs/
	rm -rf .venv .venv-* dist build *.egg-info .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Removing the old stamps first means that an install that stops halfway is not taken for complete.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(VERSION)" || { echo "error: '$(PYTHON)' does not run; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: '$(PYTHON)' is Python $(VERSION); Python 3.11 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: '$(PYTHON)' has no venv module; install it (on Debian: the package python3-venv)" >&2; exit 1; }
	@test ! -e "$(VENV)" || test -f "$(VENV)/pyvenv.cfg" || { echo "error: $(VENV) exists and is no virtual environment; remove it, or choose: make VENV=folder" >&2; exit 1; }
	@rm -f $(VENV)/.complete-*
	@if test "$$($(PY) -c 'import pip, sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)" = "$(VERSION)"; then \
	  echo "updating $(VENV) with Python $(VERSION) to pyproject.toml and constraints.txt"; \
	else \
	  echo "creating $(VENV) with Python $(VERSION) and the pinned packages, about a minute"; \
	  $(PYTHON) -m venv --clear $(VENV); \
	fi
	@$(PY) -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -e '.[dev]'
	@touch $@
