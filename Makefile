# Two commands: `make demo` (the main job, end to end) and `make test` (all tests). Every target does its set-up itself.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   := launch/configs/demo.yaml
# Two expert-parallel ranks, or one on a machine with one GPU.
RANKS  := $$(python -m shodh.core.devices --ranks 2)

# Each worker imports everything anew and takes a test file after the other; 2 GB of memory each.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo gpu test test-all test-fast test-cluster lint types docs notebooks install clean

install: $(STAMP)

$(STAMP): requirements.lock setup.py pyproject.toml $(wildcard shodh/ops/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python tools/generate_data.py --regime open_channel porous_media --grid 32 --trajectories 22 --split 12 2 8 --frames 16 --out data/demo
	export PATH="$(CURDIR)/$(BIN):$$PATH" && ranks=$(RANKS) && \
	deepspeed --num_gpus $$ranks launch/train_tokenizer.py --config $(DEMO) --resume auto && \
	deepspeed --num_gpus $$ranks launch/pretrain.py --config $(DEMO) --set parallel.ep_size=$$ranks --resume auto
	$(BIN)/python launch/evaluate.py --run runs/demo

# The same on one GPU, at 64^3 and with 20,000 steps.
gpu: $(STAMP)
	$(BIN)/python tools/generate_data.py --device cuda --regime open_channel porous_media --grid 64 --trajectories 22 --split 12 2 8 --frames 16 --out data/gpu
	$(BIN)/python launch/train_tokenizer.py --config launch/configs/gpu_64.yaml --resume auto
	$(BIN)/python launch/pretrain.py --config launch/configs/gpu_64.yaml --resume auto
	$(BIN)/python launch/evaluate.py --run runs/gpu-64

test: $(STAMP)
	$(PYTEST)

# With every stage of ZeRO and every layout of ranks, not one of each: what CI runs.
test-all: $(STAMP)
	$(PYTEST) -m "exhaustive or not exhaustive"

# A minute: no ranks, no commands, no solvers.
test-fast: $(STAMP)
	$(PYTEST) tests/unit -m "not slow and not distributed and not exhaustive"

# Launchers, SLURM, ssh and their faults with the real programs, where they are installed; some minutes.
test-cluster: $(STAMP)
	PYTHON=$(BIN)/python bash tests/cluster/run.sh

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(STAMP)
	$(BIN)/mypy

$(VENV)/.docs: $(STAMP) docs/requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.lock
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Shorter than a reader's: fewer steps, the same cells.
notebooks: $(VENV)/.docs
	SHODH_NOTEBOOK_STEPS=16 $(BIN)/python -m pytest --timeout=900 --nbmake --nbmake-timeout=600 --override-ini=testpaths=docs/notebooks docs/notebooks

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
