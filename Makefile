# `make` alone lists the targets. On a GPU machine where nothing can be installed, gpu, gpu-test and gpu-train run the
# checkout with the Python that is there: `make gpu-test PYTHON=/path/to/python3`.

PYTHON ?= python3
VENV ?= .venv
# the Triton that is installed where torch brings none
TRITON ?= 3.6.0
NEWEST_TRITON ?= 3.9.0
# the tiles were chosen for the oldest compiler: the newest one spills a few bytes in some of them, in
# the persistent convolution 40 of them beside the moments that conv2d_batch_norm asks for
NEWEST_COMPILE = tests/test_dry.py tests/test_launch.py tests/test_gpu_limits.py tests/test_gpu_limits_errors.py \
	tests/test_conv_tma_compiled.py tests/test_matmul_tma_compiled.py tests/test_matmul_tma_choice.py tests/test_matmul_tma_float32.py \
	tests/test_compile.py -k "not test_compile or (workloads and bf16 and not conv2d_batch_norm)"
# what another Triton does not change: layers, autograd, repeated calls, addresses, all over the same kernels
NOT_OF_TRITON = $(patsubst %,--ignore-glob=tests/test_%.py,compiled_writes course docs fuse* memory models moduleinfo \
	nn nodes* offsets opinfo repeats* replay transforms twins)
# processes of one test run: one for each core that this process may use, eight at most; or a number
JOBS ?= auto
# where what a GPU says is written
RESULTS ?= bench/results
# of the interpreter's rung: files that are left out, as pytest is told
IGNORED :=
# of `make gpu`: some of its sections, `conv,matmul` say; empty for all
SECTIONS ?=

BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALLED := $(VENV)/.installed
RUNGS := reference interpret compile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test $(RUNGS:%=test-%) test-newest newest-compile mutation check format gpu-test gpu-train clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## install into .venv, then train a model and its torch.nn twin on handwritten digits
	$(BIN)/tritorch train

test: $(INSTALLED) ## every rung that needs no GPU; one alone: make test-reference, test-interpret, test-compile
	@$(MAKE) --no-print-directory --keep-going $(RUNGS:%=test-%)

# a process either interprets kernels or compiles them, so each rung is a pytest run of its own
$(RUNGS:%=test-%): test-%: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --rung $* -n $(JOBS) $(if $(filter auto,$(JOBS)),--maxprocesses 8) $(IGNORED)

test-newest: ## the interpreter's rung of kernels, and the compiler on sm_90, with the newest Triton, in .venv-newest
	@$(MAKE) --no-print-directory --keep-going VENV=.venv-newest TRITON=$(NEWEST_TRITON) \
		IGNORED="$(NOT_OF_TRITON)" test-interpret newest-compile

newest-compile: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --rung compile -n $(JOBS) $(if $(filter auto,$(JOBS)),--maxprocesses 8) $(NEWEST_COMPILE)

test-python%: ## the reference rung with another Python, in a .venv of its own: make test-python3.10
	@$(MAKE) --no-print-directory VENV=.venv-python$* PYTHON=python$* test-reference

mutation: $(INSTALLED) ## which one-line defects of kernels the tests find, and which tritorch check finds
	$(BIN)/python -m tests.mutation.run

check: $(INSTALLED) ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## rewrite what `make check` would refuse and a tool can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu: ## on a GPU machine, nothing installed: everything it can tell, then the tables; SECTIONS=conv,matmul for some
	@export PYTHONPATH=. && \
	gpu=$$($(PYTHON) -m tritorch.bench.environment --gpu) && \
	set -x && \
	$(PYTHON) -m tritorch.bench.gpu --out "$(RESULTS)/$$gpu/$$(date -u +%Y-%m-%d)" $(addprefix --sections ,$(SECTIONS)) && \
	$(PYTHON) -m tritorch.bench.tables README.md bench/README.md docs/performance.md docs/predictions.md

gpu-test: ## on a GPU machine, nothing installed: the whole suite on the GPU, results to bench/results
	$(call on_gpu,pytest tests,tests)

gpu-train: ## on a GPU machine, nothing installed: the demo on the GPU, results to bench/results
	$(call on_gpu,tritorch train,train)

# $(1): module and arguments; $(2): what the result file is of. The time in the name keeps earlier results.
define on_gpu
@export PYTHONPATH=. && \
gpu=$$($(PYTHON) -m tritorch.bench.environment --gpu) && \
mkdir -p "$(RESULTS)/$$gpu" && \
set -x && \
$(PYTHON) -m $(1) --device cuda --json "$(RESULTS)/$$gpu/$$(date -u +%Y-%m-%dT%H%M%SZ)-$(2).json"
endef

clean: ## remove what the targets above made, results excepted
	rm -rf $(VENV) .venv-* build dist *.egg-info tritorch-report
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel torch
	@# a CUDA build of torch has brought its own triton by now, the CPU build none
	$(BIN)/python -m pip show --quiet triton 2>/dev/null || $(PIP) 'triton==$(TRITON); platform_system == "Linux"'
	$(PIP) --no-build-isolation --editable '.[plot,test]'
	@touch $@
