# To use another Python: make test PYTHON=python3.12 VENV=.venv312
# (With the same VENV, each change of PYTHON would build the environment again.)
PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8000

python := $(VENV)/bin/python
peers  := $(VENV)-bench/bin/python
sphinx := $(VENV)-docs/bin/python -m sphinx

# One lock for all supported Pythons and machines. Without UPGRADE, pinned versions do not change.
compile    := $(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.11 \
    --generate-hashes --annotation-style line --custom-compile-command "make lock" $(UPGRADE)
consistent := --constraint requirements.txt

.DEFAULT_GOAL := help
.PHONY: help run dev cluster test test-slow check manifests docs bench bench-quick lock clean \
    venv venv-bench venv-docs venv-lock venv-manifests

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20

run: venv ## serve the sample application on PORT (8000), with a PostgreSQL of its own
	@PORT=$(PORT) exec $(python) -m webapp

dev: venv ## the same, with a restart of gunicorn whenever a source changes
	@PORT=$(PORT) exec $(python) -m webapp --reload

cluster: venv ## the same with a primary, a standby and PgBouncer, without containers
	@PORT=$(PORT) exec $(python) -m webapp.cluster

test: venv ## run the tests, four files at a time
	@$(python) -m pytest --numprocesses 4 --dist loadfile

test-slow: venv ## run the slow tests
	@$(python) -m pytest -m slow

check: venv ## lint, and check format and types
	@$(python) -m ruff check
	@$(python) -m ruff format --check
	@$(python) -m mypy

manifests: venv-manifests ## check the files for Kubernetes and Grafana against their schemas
	@$(VENV)-manifests/bin/python tools/check_manifests.py ops/kubernetes docs/probes.md \
	    ops/grafana/dashboards/*.json

docs: venv-docs ## build the documentation into docs/_build/html; warnings are errors
	@$(VENV)-docs/bin/python tools/write_docs.py
	@$(sphinx) --fail-on-warning --keep-going --nitpicky --quiet --builder html docs docs/_build/html

bench: venv-bench ## compare with the peers (one benchmark: ONLY=recovery); see bench/results
	@$(peers) -m bench $(ONLY)

bench-quick: venv-bench ## a small version of each benchmark, in under a minute
	@$(peers) -m bench --quick

lock: venv-lock ## write the requirements.txt files (newer versions: UPGRADE=--upgrade)
	@$(compile) pyproject.toml --all-extras --group dev --output-file requirements.txt
	@$(compile) pyproject.toml --all-extras $(consistent) --output-file webapp/requirements.txt
	@$(compile) pyproject.toml --all-extras --group embedded --group bench $(consistent) \
	    --output-file bench/requirements.txt
	@$(compile) pyproject.toml --all-extras --group docs $(consistent) \
	    --output-file docs/requirements.txt
	@$(compile) --group manifests $(consistent) --output-file ops/kubernetes/requirements.txt
	@$(compile) --group lock --output-file tools/requirements.txt

clean: ## remove the environments and the sample data in .data
	@rm -rf .venv* .data docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis

venv:
	@$(PYTHON) tools/make_venv.py $(VENV) requirements.txt

venv-bench:
	@$(PYTHON) tools/make_venv.py $(VENV)-bench bench/requirements.txt

venv-docs:
	@$(PYTHON) tools/make_venv.py $(VENV)-docs docs/requirements.txt

venv-manifests:
	@$(PYTHON) tools/make_venv.py $(VENV)-manifests ops/kubernetes/requirements.txt

venv-lock:
	@$(PYTHON) tools/make_venv.py $(VENV)-lock tools/requirements.txt
