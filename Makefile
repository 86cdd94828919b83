# Every target makes the virtual environment first. PYTHON is any Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

.PHONY: venv quickstart test test-slow quality style clean

venv: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

quickstart: venv  ## train a consistency model on handwritten digits, sample it, judge it (some minutes on a CPU)
	$(RUN) training/quickstart.py

test: venv quality  ## the tests, about ten minutes on two cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(PARALLEL)

test-slow: venv  ## the longer runs as well
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q $(PARALLEL) -m "slow or not slow"

quality: venv  ## what the linter says
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

style: venv  ## let the linter mend what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
