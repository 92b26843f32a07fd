# make demo: three LoRAs in one picture, three ways. make check: style, floors and the quick tests. make test: the whole suite.
# Each makes its own environment first.
# PYTHON: the Python to use (3.11 or newer). TORCH_INDEX: where PyTorch comes from, as for a machine without a GPU
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS)

.PHONY: demo check test lint bench clean

demo: $(VENV)/.product
	$(BIN)/medley demo

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest --quick $(PYTEST_ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/.test
	$(BIN)/python -m tests.bench.adapters

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "Medley needs Python 3.11 or newer; '$(PYTHON)' is not that. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.product: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing Medley into $(VENV) (the first time takes some minutes: PyTorch is large)"
	@if [ -n "$(TORCH_INDEX)" ]; then $(PIP) torch torchvision --index-url $(TORCH_INDEX); fi
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.product
	$(PIP) --editable '.[test,bench]'
	@touch $@
