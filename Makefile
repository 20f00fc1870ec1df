# make        the environment in .venv          make test   the tests
# make demo   a real lens, measured             make lint   ruff
# make clean  removes .venv and caches; data/ and outputs/ stay
PYTHON := $(or $(PYTHON),$(shell command -v python3))
VENV := .venv
INSTALLED := $(VENV)/.installed
# Tools that are started by name (deepspeed, torchrun, ninja) are the environment's own.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export CXX

.PHONY: all demo test lint clean
all: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) tools/check_machine.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(VENV)/bin/python tools/prepare_demo.py
	$(VENV)/bin/python tools/run_pipeline.py config=conf/demo.yaml
	$(VENV)/bin/python tools/eval.py checkpoint=outputs/demo/best

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find $(wildcard megalens tools tests benchmarks) -name __pycache__ -prune -exec rm -rf {} +
