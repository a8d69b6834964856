# Every command of the workbook; `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed
# uv installs in a fraction of pip's time; without it pip does.
UV := $(shell command -v uv 2>/dev/null)
# make setup TORCH=cpu leaves the CUDA libraries out (see notebooks/README.md).
TORCH ?=
# nbval runs this one cell by cell; tests/test_notebooks_run.py executes all by papermill.
QUICK := notebooks/00_start_here.ipynb
# Extra arguments of the command behind a target: make course ARGS="--set profile=sam3"
ARGS ?=
# Dozens of processes import the same thousands of modules: they are compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup course test lessons browser site lint lab notebooks bench experiment laboratory base data lock newest

help: ## list the commands
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMP) ## create .venv and install the exact versions of requirements.lock

# Runs again only when the lock or the project file changed since the last installation.
$(STAMP): requirements.lock pyproject.toml
	test -x $(RUN) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "You need Python 3.11 or newer, this is " + sys.version.split()[0] + ". Set it with: make PYTHON=python3.12 ...")'
ifdef UV
	test -x $(RUN) || uv venv --quiet --seed --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
	$(LOCKED) | uv pip install --quiet --python $(RUN) $(if $(TORCH),--torch-backend $(TORCH)) --requirement -
	uv pip install --quiet --python $(RUN) --no-deps --no-build-isolation --editable .
else
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(LOCKED) | $(RUN) -m pip install --quiet --requirement /dev/stdin
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
endif
	touch $@

# What is installed: the lock, without the CUDA libraries if another build of torch is asked for.
LOCKED = grep -vE '^(\#$(if $(TORCH),|nvidia-|cuda-|triton))' requirements.lock

# One thread each: notebooks run side by side, and small tensors gain nothing from a second thread.
course: $(STAMP) ## execute the whole course; executed notebooks, summary.json and card.html go to runs/course/
	OMP_NUM_THREADS=1 $(RUN) -m notebooks.run run $(ARGS)

# Offline on purpose: the course must need no download. Long notebooks start first, files of quick
# tests fill the gaps, so that all cores are busy to the end (see tests/conftest.py).
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n logical --no-loadscope-reorder

test: $(STAMP) ## run the tests, among them the quick lessons
	$(PYTEST) --nbval-lax --nbval-current-env --nbval-cell-timeout 900 tests $(QUICK) $(ARGS)

lessons: $(STAMP) ## run the long lessons and the solutions, and compare their marked outputs
	$(PYTEST) -m lesson tests/test_notebooks_run.py $(ARGS)

# Chromium comes from the system (Debian: apt install chromium), its driver from PyPI.
browser: $(STAMP) ## open pages and lessons in a real browser, headless
	$(if $(UV),uv pip install --quiet --python $(RUN),$(RUN) -m pip install --quiet) 'playwright>=1.50,<2'
	$(PYTEST) -m browser tests/test_browser.py tests/test_lab.py tests/test_site.py $(ARGS)

# Sphinx is for this target alone. The lock constrains what it shares with the rest of .venv.
site: $(STAMP) ## write the course as a static site to runs/site/html, from the stored outputs
	$(if $(UV),uv pip install --quiet --python $(RUN),$(RUN) -m pip install --quiet) --constraint requirements.lock 'sphinx>=9,<10' 'myst-nb>=1.4,<2' 'furo>=2025.12,<2027'
	rm -rf runs/site
	$(RUN) -m sphinx -q -W --keep-going -b html -c notebooks/site -d runs/site/doctrees $(ARGS) . runs/site/html

lint: $(STAMP) ## check style, formatting, imports and the stored form of the notebooks
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(RUN) -m notebooks.run verify

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(RUN) -m jupyter lab --notebook-dir . notebooks/00_start_here.ipynb

notebooks: $(STAMP) ## run the notebooks with their defaults and store the outputs in notebooks/
	$(RUN) -m data.make_cheat_sheet
	$(RUN) -m data.make_drawings
	OMP_NUM_THREADS=1 $(RUN) -m notebooks.run refresh $(ARGS)

bench: $(STAMP) ## time training and detection case by case; numbers go to runs/benchmarks/
	$(RUN) -m data.benchmarks.measure $(ARGS)

# Both go on where they were stopped, and write their tables to data/experiments/ at the end. The
# experiment runs on several machines with ARGS="--scheduler ADDRESS", see data/experiments/README.md.
experiment: $(STAMP) ## run the controlled experiment of notebooks 06 and 09 (about eight hours on two cores)
	$(RUN) -m data.experiments.make --publish $(ARGS)

laboratory: $(STAMP) ## plant every fault and diagnose it twice (about an hour on two cores)
	$(RUN) -m data.experiments.make_confusion --publish $(ARGS)

base: $(STAMP) ## train the embedded base data/tiny_sam3 again, from nothing (hours on a CPU)
	$(RUN) -m data.tiny_sam3.make $(ARGS)

data: $(STAMP) ## generate data/wall_cracks and data/known_things again, the same files from the same seed
	$(RUN) -m data.wall_cracks.make $(ARGS)
	$(RUN) -m data.known_things.make $(ARGS)
	$(RUN) -m data.patients.make

lock: ## write requirements.lock from the newest versions the ranges in pyproject.toml allow
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet '.[dev]'
	printf '%s\n' '# Exact versions of the whole environment, written by `make lock`. Install with' '# `pip install -r requirements.lock`; the ranges they were chosen from are in pyproject.toml.' > requirements.lock
	.venv-lock/bin/python -m pip freeze --all | grep -vE '^(pip==|sam3-lora-workbook)' | sed -E '/^(nvidia-|cuda-|triton)/s/$$/; sys_platform == "linux"/' >> requirements.lock
	rm -rf .venv-lock

newest: $(STAMP) ## upgrade .venv past the lock and the ranges, to see what the future breaks
	$(RUN) -m helpers.environment | xargs $(RUN) -m pip install --quiet --upgrade --upgrade-strategy eager
