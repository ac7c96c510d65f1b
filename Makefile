# `make` alone lists the commands. Everything runs in $(VENV), made by tools/setup.sh on first use.
#   make run ARGS="steps=4000"      PYTHON=python3.12 make test      make test ARGS="-k shooting"

VENV ?= .venv
ARGS ?=
PY := $(VENV)/bin/python
# PYTHON on make's command line or in the environment names the interpreter; see tools/python.sh.
export PYTHON

# A setting of a program that is given to make would be ignored: `make run steps=20`. Names in
# capitals are make's own, or reach the programs as environment variables.
given := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
upper := A B C D E F G H I J K L M N O P Q R S T U V W X Y Z
unknown := $(filter-out $(addsuffix %,$(upper)),$(given))
ifneq ($(unknown),)
$(error make does not pass on $(firstword $(unknown)); type make $(MAKECMDGOALS) ARGS="$(firstword $(unknown))=$($(firstword $(unknown)))")
endif

.DEFAULT_GOAL := help
.PHONY: help setup run test check bench reproduce notebooks docs types compile gpu format clean

help: ## list these commands
	@echo "jaxpara: the commands (ARGS=\"...\" is passed on, PYTHON=... names the interpreter)"
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1|/' \
	  | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

setup: ## make or refresh the environment in .venv
	@sh tools/setup.sh $(VENV)

run: setup ## train the default language model (ARGS="steps=4000" and other Hydra overrides)
	$(PY) -m experiments.train $(if $(findstring experiment=,$(ARGS)),,experiment=lm) $(ARGS)

test: setup ## run the tests but for the slow ones (ARGS="-m slow"; ARGS=tests: all; ARGS="-k lora")
	$(PY) -m pytest -n 2 --dist loadfile $(or $(ARGS),-m "not slow")

check: setup ## ruff, types and the cheap tests, in three minutes
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu" --cheap $(ARGS)

types: setup ## the annotations of jaxpara checked while its fast tests run, by beartype
	$(PY) -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu and not untyped" \
	  --jaxtyping-packages=jaxpara,pallas_kernels,tests.check $(ARGS)

bench: setup ## solvers against lax.scan and others, then a training step (ARGS="suite=recurrence_full")
	$(PY) -m experiments.bench $(ARGS)
ifeq ($(ARGS),)
	$(PY) -m experiments.step_time
endif

reproduce: setup ## run every experiment, small, and check its figures (ARGS=full; ARGS="full lm")
	$(PY) -m experiments.reproduce $(ARGS)

notebooks: setup ## execute the notebooks and their assertions (ARGS=write keeps what they show)
ifeq ($(ARGS),write)
	$(PY) -m tools.notebooks
else
	$(PY) -m pytest -q tests/house/test_notebooks.py $(ARGS)
endif

docs: ## the site, in site/: `make docs ARGS=serve` shows it while you write
	@sh tools/setup.sh .venv-docs docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs $(or $(ARGS),build)

compile: ## compile every kernel for H100, TPU v5e and v6e; needs no device, Python 3.12 or newer
	@python="$${PYTHON:-$$(sh tools/python.sh 3.12 3.13 3.14)}" && \
	  PYTHON="$$python" sh tools/setup.sh .venv-compile compile
	.venv-compile/bin/python tools/compile_kernels.py $(ARGS)

gpu: ## on a machine with a GPU: the kernels' tests, then their benchmark; installs nothing
	@sh tools/gpu.sh $(ARGS)

format: setup ## format and sort imports
	$(PY) -m ruff check --fix --select I .
	$(PY) -m ruff format .

clean: ## remove the environments and caches, not the runs
	rm -rf .venv .venv-* site .jax_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
