# `make help` lists the targets. Each target first creates the virtual environment. PYTHON is Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

FLOORS := .venv-floors
SITE := .venv-docs
TREE := build/types
FLOORS_TESTS := tests/test_requirements.py tests/test_pixels.py tests/hub/test_lookup.py \
	tests/engine/test_data.py tests/engine/test_tables.py tests/engine/test_card.py tests/pipelines/test_consistency.py

# Oracles that run in less than a minute: closed forms, golden numbers, stock schedulers.
FAST_TESTS := tests/core tests/schedulers tests/test_layout.py tests/test_results.py \
	$(filter-out %/test_every_objective.py,$(wildcard tests/objectives/test_*.py))

.PHONY: help venv quickstart shapes check oracles test test-wide test-slow test-floors docs help-pages quality lint types style clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create the virtual environment with all packages for the tests

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

quickstart: venv  ## train, sample and evaluate a model of handwritten digits (a few minutes on a CPU)
	$(RUN) training/quickstart.py

shapes: venv  ## distil a small text-to-image model and judge it (under 25 minutes on two cores; QUICK=1: under 4)
	$(RUN) benchmarks/shapes.py $(if $(QUICK),--quick --output_dir runs/shapes_quick)

check: venv quality oracles  ## run the linter, the type checker and the fast oracles (less than a minute)

oracles: venv
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(PARALLEL) $(FAST_TESTS)

test: venv quality  ## run the linter, the type checker and all tests except wide and slow ones (a few minutes)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(PARALLEL)

test-wide: venv  ## run further cases of the same tests, such as every method instead of representative ones
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(PARALLEL) -m "wide and not slow"

test-slow: venv  ## run all tests, including the slow ones
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(PARALLEL) -m "slow or not slow"

$(FLOORS)/.installed: setup.py constraints-floors.txt
	$(PYTHON) -m venv --clear $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet --disable-pip-version-check \
		"torch==$$(sed -n 's/^torch==//p' constraints-floors.txt)"
	$(FLOORS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-floors.txt \
		-e ".[demo]" pytest pytest-timeout pytest-xdist
	touch $@

test-floors: $(FLOORS)/.installed  ## run some tests with the lowest package versions that setup.py allows
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest -q $(PARALLEL) $(FLOORS_TESTS)

$(SITE)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv --clear $(SITE)
	$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		mkdocs mkdocs-material "mkdocstrings[python]" ruff
	touch $@

docs: $(SITE)/.installed  ## build the documentation in build/docs and check its links
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --quiet
	@echo "Open build/docs/index.html"

help-pages: venv  ## write the help pages in training/help from the parsers of the scripts
	$(RUN) -m cm_diffusers.engine.help_pages

quality: venv lint types  ## run the linter and the type checker

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The type checker needs the pipelines inside the package, where a wheel has them.
types: venv
	rm -rf $(TREE)
	mkdir -p $(TREE)
	cp -Rp cm_diffusers pipelines $(TREE)
	mv $(TREE)/cm_diffusers/pipelines.py $(TREE)/pipelines/__init__.py
	mv $(TREE)/pipelines $(TREE)/cm_diffusers
	cd $(TREE) && $(abspath $(RUN)) -m mypy --config-file $(abspath pyproject.toml) --cache-dir $(abspath .mypy_cache) \
		-p cm_diffusers.core -p cm_diffusers.objectives -p cm_diffusers.schedulers -p cm_diffusers.pipelines

style: venv  ## fix the style as far as the linter can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## delete the environments and build folders
	rm -rf $(VENV) $(FLOORS) $(SITE) build dist *.egg-info .mypy_cache
