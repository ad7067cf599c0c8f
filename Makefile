# One environment in .venv, made on first use; every target below works on a fresh machine.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup demo bench test lint types tests docs wheel clean

setup: $(READY)

$(READY): setup.cfg pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint .ci/constraints.txt torch
	$(PIP) install --quiet --constraint .ci/constraints.txt --editable '.[triton,examples,docs,dev]'
	touch $@

# The whole pipeline on the embedded corpus; prints the table and where the report is.
demo: $(READY)
	$(BIN)/python -m examples.meld --synthetic --output runs/demo

# Every operator on whatever the machine has; prints which targets are met.
bench: $(READY)
	$(BIN)/python -m benchmarks

test: lint types tests docs wheel

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/sphinx-lint docs README.rst examples

types: $(READY)
	$(BIN)/mypy

# A process for each core, a file of tests at a time; in the order of collection, since the few slow
# files lie in its middle, where others still fill the other cores.
tests: $(READY)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadscope --no-loadscope-reorder

docs: $(READY)
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html
	$(BIN)/sphinx-build -W -b doctest docs docs/_build/doctest

# The wheel, in an environment of its own, with torch and einops alone.
wheel: $(READY)
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv --clear dist/venv
	dist/venv/bin/python -m pip --disable-pip-version-check install --quiet \
	    --constraint .ci/constraints.txt dist/*.whl
	cd dist && venv/bin/python ../tests/check_wheel.py

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info
