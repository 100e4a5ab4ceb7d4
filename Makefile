# make quickstart   set up and search a small network (the README's first command)
# make test         set up and run the quick tests
# make lint         set up and run ruff and mypy
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread per test process: two processes that each use both cores only get in each other's way.
TEST_ENV := OMP_NUM_THREADS=1 MLFLOW_DISABLE_TELEMETRY=true

.PHONY: quickstart test test-slow lint clean

quickstart: $(VENV)/installed
	$(BIN)/paretorch search configs/digits.yaml

test: $(VENV)/installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

test-slow: $(VENV)/installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/lint && ln -sfn "$(CURDIR)" $(VENV)/lint/paretorch
	MYPYPATH=$(VENV)/lint $(BIN)/mypy -p paretorch

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "paretorch needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build *.egg-info
