# Two commands do everything on a fresh machine:  make demo   and   make test
PYTHON ?= python3
JOBS ?= $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
BIN := .venv/bin
DEMO ?= runs/demo

.PHONY: setup demo test browser check format docs dist clean

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
test: check browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

# The report is tried in a real browser; where none can be had, those tests are skipped and say so.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
	  test "$$(id -u)" = 0 && export DEBIAN_FRONTEND=noninteractive && \
	  apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 || \
	  echo "no chromium, and it could not be installed: the report's browser tests will be skipped"

check: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The documentation as a site, in site/; any broken link or anchor is an error.
docs: .venv/.installed-dev
	$(BIN)/python docs/make_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

dist: .venv/.installed-dev
	$(BIN)/python -m build

clean:
	rm -rf .venv runs build dist site .pytest_cache .mypy_cache .ruff_cache
