# Two commands do everything on a fresh machine:  make demo   and   make test
PYTHON ?= python3
JOBS ?= $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
BIN := .venv/bin
DEMO ?= runs/demo

.PHONY: setup demo test check format clean

setup: .venv/.installed

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/.installed
	$(BIN)/blockdiff demo --out $(DEMO) $(DEMO_OPTIONS)

# One thread for each test process: two threads on two busy cores can be 50 times slower than one.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs build dist .pytest_cache .mypy_cache .ruff_cache
