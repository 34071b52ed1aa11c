# The two commands: `make demo` and `make test`. Both install into .venv first; nothing else is needed before them.
PYTHON ?= python3
DOCUMENTS ?=
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test lint clean

install: .venv/.installed

.venv/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check --quiet --editable ".[test]"
	@touch $@

demo: install
	python tools/demo.py $(if $(DOCUMENTS),--documents "$(DOCUMENTS)")

test: install lint
	python -m pytest --numprocesses 2 --dist worksteal

lint: install
	ruff check .
	ruff format --check .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
