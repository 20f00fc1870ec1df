# make        the environment in .venv          make test    every test
# make demo   a real lens, measured             make quick   the fast tests: under 2 minutes on 2 cores
# make lint   style, imports, types             make lowest  the fast tests on the oldest versions that setup.py promises
# make fuzz   the property tests with new inputs, for FUZZ_MINUTES (10)
# make clean  removes the environments and caches; data/ and outputs/ stay
PYTHON := $(or $(PYTHON),$(shell command -v python3))
VENV := .venv
INSTALLED := $(VENV)/.installed
LOWEST := .venv-lowest
# Tools that are started by name (deepspeed, torchrun, ninja) are the environment's own.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export CXX
FUZZ_MINUTES := 10

.PHONY: all demo test quick lowest fuzz lint clean
all: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) tools/check_machine.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

$(LOWEST)/.installed: setup.py pyproject.toml constraints-lowest.txt
	$(PYTHON) tools/check_machine.py
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -c constraints-lowest.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(VENV)/bin/python tools/prepare_demo.py
	$(VENV)/bin/python tools/run_pipeline.py config=conf/demo.yaml
	$(VENV)/bin/python tools/eval.py checkpoint=outputs/demo/best

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

quick: $(INSTALLED)
	$(VENV)/bin/python -m pytest --quick

lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest --quick

fuzz: $(INSTALLED)
	$(VENV)/bin/python tests/fuzz.py $(FUZZ_MINUTES)

lint: $(INSTALLED)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(LOWEST) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	rm -rf .hypothesis
	find $(wildcard megalens tools tests benchmarks) -name __pycache__ -prune -exec rm -rf {} +
