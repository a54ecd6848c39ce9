# Another Python: make test PYTHON=python3.12 (the environment is made anew when it changes,
# so give it one of its own: VENV=.venv312).
PYTHON ?= python3
VENV   ?= .venv
PORT   ?= 8000

python := $(VENV)/bin/python
peers  := $(VENV)-bench/bin/python
sphinx := $(VENV)-docs/bin/python -m sphinx

# One lock for every supported Python and machine. Without UPGRADE what is pinned stays pinned.
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

dev: venv ## the same, and start again what serves whenever a source changes
	@PORT=$(PORT) exec $(python) -m webapp --reload

cluster: venv ## the same over a primary, a standby and PgBouncer, without containers
	@PORT=$(PORT) exec $(python) -m webapp.cluster

test: venv ## run the tests, four files at a time
	@$(python) -m pytest --numprocesses 4 --dist loadfile

test-slow: venv ## run the tests that take their time
	@$(python) -m pytest -m slow

check: venv ## lint, check the format and the types
	@$(python) -m ruff check
	@$(python) -m ruff format --check
	@$(python) -m mypy

manifests: venv-manifests ## check all that is for Kubernetes and Grafana against their schemas
	@$(VENV)-manifests/bin/python tools/check_manifests.py ops/kubernetes docs/probes.md \
	    ops/grafana/dashboards/*.json

docs: venv-docs ## build the documentation into docs/_build/html; a warning is an error
	@$(VENV)-docs/bin/python tools/write_docs.py
	@$(sphinx) --fail-on-warning --keep-going --nitpicky --quiet --builder html docs docs/_build/html

bench: venv-bench ## compare with the peers, ONLY=recovery for one: results under bench/results
	@$(peers) -m bench $(ONLY)

bench-quick: venv-bench ## the same in under a minute
	@$(peers) -m bench --quick

lock: venv-lock ## write the requirements.txt files anew, UPGRADE=--upgrade for newer versions
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
