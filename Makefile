# Everything sets itself up in .venv; a second run starts at once.
PYTHON ?= python3
PYTHONS ?= python3.12 python3.13
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
READY := $(VENV)/.ready
SPHINX := $(BIN)/sphinx-build -q -W --keep-going -d .cache/docs/doctrees
# Hard limits in seconds, so that a hanging part fails instead of eating the whole budget.
LINT_BUDGET := 60
TYPES_BUDGET := 240
DOCS_BUDGET := 60
TEST_BUDGET := 900
INTERPRET_BUDGET := 900
COMPILE_BUDGET := 720
SLOW_BUDGET := 7200

KERNEL_TESTS := $(addprefix tests/test_,kernels.py kernel_properties.py kernel_dropout.py compilers.py traffic.py \
	launches.py interpreter_tools.py bench_tools.py gates.py host_cost.py gpu.py gpu_overlap.py gpu_models.py plan_calls.py pipelined_buffers.py sanitize.py \
	bench_tune.py tile_trials.py down.py samples.py fold.py positions.py together.py drawn_kernels.py not_finite.py zero_sizes.py plan.py extended.py \
	column_parts.py residual_product.py image_along.py kernel_backward.py long_samples.py coverage.py \
	overlap.py waits.py plan_limits.py)
HUGGING_FACE_TESTS := $(addprefix tests/test_,peft.py peft_configs.py vlm.py vlm_generate.py towers.py visual_tokens.py vlm_training.py \
	peft_half.py peft_layers.py peft_several.py recording.py torch_encoders.py distributed.py quantised.py card.py huggingface_docs.py attach.py checkpoint.py text.py surroundings.py)

.PHONY: help setup demo demo-full demo-bundle study docs docs-built docs-current test test-all test-oldest test-quantised test-pythons \
	test-plain lint types clean

help:
	@echo "make demo       compare routes on real images, questions and weights (about 6 minutes)"
	@echo "make demo-full  the same, longer and with 3 seeds"
	@echo "make demo-bundle  data and weights of the demo in one file, for a machine without a network"
	@echo "make study      the study of docs/study: does routing help?"
	@echo "make docs       reference: HTML in .cache/docs/html, Markdown in docs/reference"
	@echo "make test       lint, types, reference, tests"
	@echo "make test-all   the slow tests too, and oldest and other versions"

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

# Does routing help? 236 trainings, two hours on two cores; goes on where it stopped.
study: $(READY)
	$(BIN)/python -m bench.study all

# What the demo needs on a machine without its data packages and without a network, as one file.
demo-bundle: $(READY)
	$(BIN)/python -m fused_route.training.demo.bundle

lint: $(READY)
	timeout $(LINT_BUDGET) $(BIN)/ruff check .
	timeout $(LINT_BUDGET) $(BIN)/ruff format --check .

types: $(READY)
	timeout $(TYPES_BUDGET) $(BIN)/mypy

# From scratch, because what is built already would not warn again.
docs-built: $(READY)
	rm -rf .cache/docs
	timeout $(DOCS_BUDGET) $(SPHINX) -b html docs/api .cache/docs/html
	timeout $(DOCS_BUDGET) $(SPHINX) -b markdown docs/api .cache/docs/markdown

docs: docs-built
	rm -rf docs/reference
	cp -r .cache/docs/markdown docs/reference

docs-current: docs-built
	@diff -r docs/reference .cache/docs/markdown > /dev/null \
		|| { echo "docs/reference is not what the docstrings say: run 'make docs' and commit it"; exit 1; }

# Three kinds of process: Triton interprets kernels, or compiles them, or neither.
test: lint types docs-current
	timeout $(TEST_BUDGET) $(BIN)/pytest -n 2 --dist loadfile --durations=5
	TRITON_INTERPRET=1 timeout $(INTERPRET_BUDGET) $(BIN)/pytest -n 2 --durations=5 -m '(interpret or gpu) and not slow'
	timeout $(COMPILE_BUDGET) $(BIN)/pytest --durations=5 -m 'compile and not slow'

test-all: lint types docs-current test-oldest test-quantised test-pythons
	timeout $(SLOW_BUDGET) $(BIN)/pytest --durations=10 -m 'not interpret and not compile'
	TRITON_INTERPRET=1 timeout $(SLOW_BUDGET) $(BIN)/pytest -n 2 --durations=10 -m 'interpret or gpu'
	timeout $(SLOW_BUDGET) $(BIN)/pytest --durations=10 -m compile

# The oldest versions that the project takes, for the part that depends on them most.
$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --editable . 'torch==2.11.*' 'triton==3.6.*' \
		'numpy<2.4' 'transformers==5.17.*' 'torchvision==0.26.*' 'peft==0.21.*' accelerate timm pillow \
		hypothesis pytest pytest-xdist tqdm
	@touch $@

test-oldest: $(OLDEST)/.ready
	TRITON_INTERPRET=1 timeout $(SLOW_BUDGET) $(OLDEST)/bin/pytest -n 2 -m 'interpret or gpu' $(KERNEL_TESTS)
	timeout $(SLOW_BUDGET) $(OLDEST)/bin/pytest -m 'compile and not slow' $(KERNEL_TESTS)
	timeout $(SLOW_BUDGET) $(OLDEST)/bin/pytest -n 2 $(HUGGING_FACE_TESTS)

# Quantised bases: packages that nothing else needs, beside the environment.
test-quantised: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .cache/quantised bitsandbytes torchao
	PYTHONPATH=.cache/quantised timeout $(TEST_BUDGET) $(BIN)/pytest tests/test_quantised.py

# The plain tests with other versions of Python, where this machine has them.
test-pythons:
	@for python in $(PYTHONS); do \
		if $$python -c 'import venv' 2>/dev/null; then \
			$(MAKE) --no-print-directory VENV=.venv-$$(basename $$python) PYTHON=$$python test-plain \
				|| exit 1; \
		else echo "no $$python here: its tests are left out"; fi; \
	done

test-plain: $(READY)
	timeout $(SLOW_BUDGET) $(BIN)/pytest -n 2 --dist loadfile

clean:
	rm -rf .venv .venv-* .cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
