# Three commands for users (app, demo, test), three for those who change the code (check, format, notebooks).
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: app demo test check format notebooks benchmark clean help

help:
	@echo "make demo    set up, fetch the embedded model, run every analysis, write reports/demo/report.html"
	@echo "make app     set up, fetch the embedded model, explore it in the browser"
	@echo "make test    set up, lint, check types, run all tests"
	@echo "make check   lint and types only"
	@echo "make benchmark  measure what capture costs, beside TransformerLens and nnsight (half an hour)"
	@echo "make format  let ruff format the code"
	@echo "make notebooks  run the notebooks and store what they show (five minutes)"

demo: $(VENV)/.base
	$(PY) -m probekit demo

app: $(VENV)/.app
	$(PY) -m probekit app

test: $(VENV)/.dev
	$(MAKE) check
	$(PY) -m pytest -q --durations=10 -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

notebooks: $(VENV)/.dev
	$(PY) notebooks/execute.py

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "probekit needs Python 3.11 or newer, found $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(PY) pyproject.toml constraints.txt
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e .
	@touch $@

$(VENV)/.app: $(PY) pyproject.toml constraints.txt
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[app]"
	@touch $(VENV)/.base $@

$(VENV)/.dev: $(PY) pyproject.toml constraints.txt
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	@touch $(VENV)/.base $(VENV)/.app $@

benchmark: $(VENV)/.base
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[compare]"
	$(PY) analyses/capture_benchmark.py --out reports/capture-benchmark

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
