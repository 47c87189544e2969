# make demo    train two styles on the embedded base and draw the grid (a few minutes on two cores)
# make test    lint, types and all tests
# make lint    ruff and mypy only
# make bench   the measurements of benchmarks/
#
# Everything is installed into .venv. Without an NVIDIA driver the versions are those of constraints-cpu.txt.
# TORCH may name another build, e.g. make TORCH="torch==2.13.0 --index-url URL-OF-THE-CPU-BUILDS" test

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LIBRARY := lora_vision train_scripts pipelines

ifeq (,$(shell nvidia-smi -L 2>/dev/null))
CONSTRAINTS := -c constraints-cpu.txt
TORCH ?= torch==2.13.0
else
TORCH ?= torch
endif

.DEFAULT_GOAL := test
.PHONY: demo test lint bench

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: a bare `torch` may bring gigabytes of CUDA packages.
$(VENV)/installed: $(BIN)/python pyproject.toml constraints-cpu.txt
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable . $(CONSTRAINTS)
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]' $(CONSTRAINTS)
	touch $@

demo: $(VENV)/installed
	$(BIN)/python train_scripts/demo.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(LIBRARY)

test: lint
	$(BIN)/python -m pytest -q

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/blend.py
	$(BIN)/python benchmarks/train_style_vs_peft.py --data lora_vision/pictures/blueprint --output runs/versus
	$(BIN)/python benchmarks/base_quality.py --work runs/base
