# Everything sets itself up in .venv; a second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Hard limits in seconds, so that a hanging part fails instead of eating the whole budget.
LINT_BUDGET := 60
TYPES_BUDGET := 240
TEST_BUDGET := 600
INTERPRET_BUDGET := 420
COMPILE_BUDGET := 420
SLOW_BUDGET := 1800

.PHONY: help setup demo demo-full test test-all lint types clean

help:
	@echo "make demo       compare routes on real images, questions and weights (about 9 minutes)"
	@echo "make demo-full  the same, longer and with 3 seeds"
	@echo "make test       lint, types, tests"
	@echo "make test-all   the slow tests too"

setup: $(READY)

$(READY): pyproject.toml training/demo-packages.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r training/demo-packages.txt
	@touch $@

demo: $(READY)
	$(BIN)/fused-route demo

demo-full: $(READY)
	$(BIN)/fused-route demo --steps 1200 --seeds 3 --out runs/demo-full

lint: $(READY)
	timeout $(LINT_BUDGET) $(BIN)/ruff check .
	timeout $(LINT_BUDGET) $(BIN)/ruff format --check .

types: $(READY)
	timeout $(TYPES_BUDGET) $(BIN)/mypy

# Three kinds of process: Triton interprets kernels, or compiles them, or neither.
test: lint types
	timeout $(TEST_BUDGET) $(BIN)/pytest -n 2 --durations=5
	TRITON_INTERPRET=1 timeout $(INTERPRET_BUDGET) $(BIN)/pytest -n 2 --durations=5 -m 'interpret and not slow'
	timeout $(COMPILE_BUDGET) $(BIN)/pytest --durations=5 -m 'compile and not slow'

test-all: lint types
	timeout $(SLOW_BUDGET) $(BIN)/pytest --durations=10 -m 'not interpret and not compile'
	TRITON_INTERPRET=1 timeout $(SLOW_BUDGET) $(BIN)/pytest -n 2 --durations=10 -m interpret
	timeout $(SLOW_BUDGET) $(BIN)/pytest --durations=10 -m compile

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
