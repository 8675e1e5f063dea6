# Two commands for a person: `make demo` and `make test`.  Each sets up everything that it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# A few threads a rank: tests and the demo run several ranks on this machine.  The compile cache lives in the
# project's folder, so that a second run is warm.
export OMP_NUM_THREADS ?= 1
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test test-all lint format cuda-check models bench clean

help:
	@echo "make demo        train, check and run a small Mixtral over 2 ranks       ARGS='--ranks 4 --model olmoe'"
	@echo "make test        the tests, but those marked slow                       ARGS='-k dispatch'"
	@echo "make test-all    all tests: also whole models through Inductor, minutes each"
	@echo "make lint        ruff, mypy, clang-format      (make format mends what can be mended)"
	@echo "make cuda-check  compile every kernel with nvcc; registers and spills"
	@echo "make models      a tiny instance of every MoE family against the one-process model; writes docs/models.md"
	@echo "make bench       the benchmarks that this machine can run"
	@echo "make clean       remove .venv, caches and build folders"

# One stamp a set of extras; bootstrap.py makes .venv if there is none, and finds or installs torch.
$(VENV)/have-%: pyproject.toml setup.py scripts/bootstrap.py $(wildcard epops/csrc/*)
	@$(PYTHON) scripts/bootstrap.py $(subst -,$(comma),$*)
	@touch $@
comma := ,

demo: $(VENV)/have-hf
	@$(BIN)/epops demo $(ARGS)

test: $(VENV)/have-test-hf
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(VENV)/have-test-hf
	@$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/have-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/python scripts/cuda_format.py --check

format: $(VENV)/have-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@$(BIN)/python scripts/cuda_format.py

cuda-check:
	@$(PYTHON) scripts/cuda_check.py $(ARGS)

models: $(VENV)/have-test-hf
	@$(BIN)/python scripts/make_models.py $(ARGS)

bench: $(VENV)/have-hf-bench
	@$(BIN)/epops bench $(ARGS)

clean:
	rm -rf $(VENV) .cache build dist epops.egg-info .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
