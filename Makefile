# `make help` lists the targets. Everything runs in .venv, which is built once and rebuilt only when
# pyproject.toml or constraints.txt changes, or when the checkout has moved.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Targets share .venv and the processor cores: under -j they still run one after the other.
.NOTPARALLEL:
.PHONY: help venv demo test check format bench clean distclean FORCE

PYTHON ?= python3
DEMO_CONFIG ?= configs/demo.yaml
DEMO_OUTPUT ?= runs/$(basename $(notdir $(DEMO_CONFIG)))
PYTEST_ARGS ?=
BENCH_ARGS ?=
PEERS := galore-torch==1.0 fira==1.0.2 apollo-torch==1.0.3 pytorch_optimizer==4.1.0 \
	q-galore-torch==1.0 badam==1.4 flora-opt==0.0.3 torchao==0.18.0 bitsandbytes==0.50.2

VENV := .venv
READY := $(VENV)/.ready
PEERS_READY := $(VENV)/.peers
BIN := $(VENV)/bin

# The caller's Python settings must not reach into the environment; pip's own index, proxy and
# certificate settings stay usable, only those that change where or what it installs are dropped.
CLEAN_ENV := env -u PYTHONPATH -u PYTHONHOME -u PYTHONSTARTUP -u PYTHONOPTIMIZE \
	-u VIRTUAL_ENV -u PYTEST_ADDOPTS -u MYPYPATH \
	-u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT -u PIP_USER -u PIP_NO_DEPS -u PIP_CONSTRAINT \
	-u PIP_REQUIREMENT -u PIP_EDITABLE -u PIP_DRY_RUN PYTHONNOUSERSITE=1
# Tests and demo use only what is installed: nothing may look for a model or data hub.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 \
	HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
RUN := $(CLEAN_ENV) $(OFFLINE)

# An editable install holds absolute paths, so the stamp names the checkout that it was made for.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
READY_NEEDS := FORCE
endif

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18
	@echo "  Variables: PYTHON=$(PYTHON) DEMO_CONFIG=$(DEMO_CONFIG) PYTEST_ARGS='$(PYTEST_ARGS)' BENCH_ARGS='$(BENCH_ARGS)'"

venv: $(READY) ## build .venv with the tested versions (instant when it is up to date)

$(READY): pyproject.toml constraints.txt $(READY_NEEDS)
	@$(CLEAN_ENV) $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "subspan needs Python 3.11 or later; name one with make PYTHON=..." >&2; exit 1; }
	@rm -f $(READY) $(PEERS_READY)
	@if [ ! -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(CLEAN_ENV) $(PYTHON) -m venv --clear $(VENV); fi
	@echo "Installing the tested versions into $(VENV) (a few minutes the first time)"
	@$(CLEAN_ENV) $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
	@$(CLEAN_ENV) $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		-e '.[train,test,dev]'
	@printf '%s\n' "$(CURDIR)" > $(READY)

demo: $(READY) ## AdamW, GaLore and Fira on real text; table and report.html
	@$(RUN) $(BIN)/subspan compare --config $(DEMO_CONFIG) --output $(DEMO_OUTPUT)
	@echo "Report: $(CURDIR)/$(DEMO_OUTPUT)/report.html"

# Two worker processes with one thread each: most tests are too small to use a second thread.
PYTEST := $(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
PARALLEL := -n 2 --dist worksteal

test: $(READY) ## all tests, the fast ones first, those that start several processes last
	@$(PYTEST) $(PARALLEL) -m "not slow and not distributed" $(PYTEST_ARGS)
	@# Exit status 5: no test that was asked for is marked so, which is no failure.
	@$(PYTEST) $(PARALLEL) -m "slow and not distributed" $(PYTEST_ARGS) || [ $$? -eq 5 ]
	@$(PYTEST) -m distributed $(PYTEST_ARGS) || [ $$? -eq 5 ]

check: $(READY) ## lint, format, types, generated docs
	@$(RUN) $(BIN)/ruff check .
	@$(RUN) $(BIN)/ruff format --check .
	@$(RUN) $(BIN)/mypy src
	@$(RUN) $(BIN)/python -m subspan.optim.document --check
	@$(RUN) $(BIN)/python -m subspan.optim.traffic --check

format: $(READY) ## apply the formatter and the safe lint fixes
	@$(RUN) $(BIN)/ruff check --fix .
	@$(RUN) $(BIN)/ruff format .

# Peers that are on no package index are cloned by hand: see docs/BENCHMARKS.md.
bench: $(READY) $(PEERS_READY) ## step time, state and memory against the peers; writes docs/BENCHMARKS.md
	@$(RUN) $(BIN)/python -m benchmarks --write $(BENCH_ARGS)

# Without their dependencies, so that the tested set stays as pinned. A peer that cannot be had
# becomes a row that says so.
$(PEERS_READY): $(READY) $(firstword $(MAKEFILE_LIST))
	@$(CLEAN_ENV) $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps $(PEERS) \
		&& touch $@ || echo "Some peers could not be installed; their rows will say so."

clean: ## remove caches and build leftovers (keeps .venv and runs/)
	rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## also remove .venv
	rm -rf $(VENV)
