# Another Python: make test PYTHON=python3.12 (the environment is made anew when it changes,
# so give it one of its own: VENV=.venv312).
PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8000

python := $(VENV)/bin/python
venv   := $(PYTHON) tools/make_venv.py $(VENV)

.DEFAULT_GOAL := help
.PHONY: help run test test-slow check bench bench-quick lock clean venv

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20

run: venv ## serve the sample application on PORT (8000), with a PostgreSQL of its own
	@PORT=$(PORT) exec $(python) -m webapp

test: venv ## run the tests
	@$(python) -m pytest

test-slow: venv ## run the tests that take their time
	@$(python) -m pytest -m slow

check: venv ## lint, check the format and the types
	@$(python) -m ruff check
	@$(python) -m ruff format --check
	@$(python) -m mypy

bench: venv ## compare with the peers: tables and numbers under bench/results
	@$(python) -m pip install -q --disable-pip-version-check -r bench/requirements.txt
	@$(python) -m bench

bench-quick: venv ## the same in under a minute
	@$(python) -m pip install -q --disable-pip-version-check -r bench/requirements.txt
	@$(python) -m bench --quick

lock: ## write requirements.txt anew from the bounds in pyproject.toml
	@$(PYTHON) tools/lock.py

clean: ## remove the environment and the sample data
	@rm -rf .venv* .data .mypy_cache .ruff_cache .pytest_cache .hypothesis

venv:
	@$(venv) requirements.txt
