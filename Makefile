# Every command of the workbook; `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed
# What neither trains nor reads a run. Of the other notebooks one run, by papermill, serves every check.
QUICK := $(addprefix notebooks/,00_start_here.ipynb 01_data_checks.ipynb A1_how_the_base_was_made.ipynb)
# Extra arguments of the command behind a target: make course ARGS="--set profile=sam3"
ARGS ?=

.PHONY: help setup course test lint lab notebooks bench experiment laboratory base data lock newest

help: ## list the commands
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMP) ## create .venv and install the exact versions of requirements.lock

# Runs again only when the lock or the project file changed since the last installation.
$(STAMP): requirements.lock pyproject.toml
	test -x $(RUN) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Set it with: make PYTHON=python3.12 ...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements.lock
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

course: $(STAMP) ## execute the whole course; executed notebooks and summary.json go to runs/course/
	$(RUN) -m helpers.course.run run $(ARGS)

# Offline on purpose: the course must need no download. First what is quick, on all cores.
test: $(STAMP) ## run every test, the notebooks included
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist loadfile -m "not notebook and not full_size"
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist worksteal -m notebook
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -q --nbval-lax --nbval-current-env --nbval-cell-timeout 900 $(QUICK)

lint: $(STAMP) ## check style, formatting and the stored form of the notebooks
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m helpers.course.run verify

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(RUN) -m jupyter lab --notebook-dir . notebooks/00_start_here.ipynb

notebooks: $(STAMP) ## run the notebooks with their defaults and store the outputs in notebooks/
	$(RUN) -m helpers.course.run refresh $(ARGS)

bench: $(STAMP) ## time the embedded base: vision pass, prompt pass, training step -> runs/bench.json
	$(RUN) -m data.benchmarks.measure $(ARGS)

# Both go on where they were stopped, and write their tables to data/experiments/ at the end.
experiment: $(STAMP) ## run the controlled experiment of notebook 06 (two to three hours on two cores)
	$(RUN) -m helpers.lab.experiment --publish $(ARGS)

laboratory: $(STAMP) ## plant every fault and diagnose it: the confusion matrix of notebook 06
	$(RUN) -m helpers.lab.confusion --publish $(ARGS)

base: $(STAMP) ## train the embedded base data/tiny_sam3 again, from nothing (hours on a CPU)
	$(RUN) -m data.tiny_sam3.make $(ARGS)

data: $(STAMP) ## generate data/wall_cracks again
	$(RUN) -m data.wall_cracks.make $(ARGS)

lock: ## write requirements.lock from the newest versions the ranges in pyproject.toml allow
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet '.[dev]'
	printf '%s\n' '# Exact versions of the whole environment, written by `make lock`. Install with' '# `pip install -r requirements.lock`; the ranges they were chosen from are in pyproject.toml.' > requirements.lock
	.venv-lock/bin/python -m pip freeze --all | grep -vE '^(pip==|sam3-lora-workbook)' | sed -E '/^(nvidia-|cuda-|triton)/s/$$/; sys_platform == "linux"/' >> requirements.lock
	rm -rf .venv-lock

newest: $(STAMP) ## upgrade .venv past the lock and the ranges, to see what the future breaks
	$(RUN) -m helpers.environment names | xargs $(RUN) -m pip install --quiet --upgrade --upgrade-strategy eager
