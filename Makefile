# Needs only Python >= 3.11, make and a network index; everything else goes into .venv. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
UV := VIRTUAL_ENV=$(VENV) $(BIN)/uv
TREES := batchjob benchmarks jobs tests

# The lock is made for Linux; other systems resolve the same requirements afresh.
ifeq ($(shell uname -s),Linux)
REQUIREMENTS := --require-hashes --requirements requirements.lock
else
REQUIREMENTS := --extra dev --requirements pyproject.toml
endif

.DEFAULT_GOAL := help
.PHONY: help install lint audit format test test-long test-faults demo bench lock wheel clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

install: $(INSTALLED)  ## .venv with everything in it; does nothing where that is up to date

# uv itself comes through pip, with the version and hashes of the lock. uv does not read pip's settings, so an index
# that is set for pip only is handed on.
PIP_INDEX = $${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null)}
HAND_ON = UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$(PIP_INDEX)}"
# Where PYTHONDONTWRITEBYTECODE is set, as in many containers, each process would compile what it imports: seconds.
COMPILED := --compile-bytecode
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed; name one: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.lock
	@echo '$(UV) pip install $(COMPILED) $(REQUIREMENTS)'; $(HAND_ON) $(UV) pip install $(COMPILED) $(REQUIREMENTS)
	$(UV) pip install --offline --no-deps --no-build-isolation --editable .
	@touch $@

lint: $(INSTALLED) audit  ## ruff and mypy, both strict
	$(BIN)/ruff check $(TREES)
	$(BIN)/ruff format --check $(TREES)
	$(BIN)/mypy batchjob benchmarks tests
	@set -e; for folder in $(sort $(dir $(wildcard jobs/*/*.py))); do \
	  echo "$(BIN)/mypy $$folder"; $(BIN)/mypy $$folder; done

audit: $(INSTALLED)  ## known vulnerabilities of what the lock names, as far as osv.dev can be asked
	@$(BIN)/python -c 'import urllib.request as u; u.urlopen("https://api.osv.dev/v1/vulns/PYSEC-2018-66", timeout=5)' \
	  2>/dev/null || { echo "audit: osv.dev cannot be asked from here; the locks were not audited" >&2; exit 0; }; \
	  for lock in requirements.lock benchmarks/daft.lock; do $(BIN)/pip-audit --requirement $$lock --require-hashes \
	  --disable-pip --vulnerability-service osv --progress-spinner off || exit 1; done

format: $(INSTALLED)  ## ruff, writing
	$(BIN)/ruff check --fix $(TREES)
	$(BIN)/ruff format $(TREES)

test: $(INSTALLED)  ## the tests, in about ten minutes; longer ones below
	$(BIN)/python -m pytest

test-long: $(INSTALLED)  ## end-to-end tests that take minutes each
	$(BIN)/python -m pytest tests/long

test-faults: $(INSTALLED)  ## every promise as a figure: kills, faults, races; BATCHJOB_SEED=1, about 25 minutes
	$(BIN)/python -m pytest tests/faults --timeout 900

demo: $(INSTALLED)  ## handwritten digits, from pictures to Parquet, on a Ray started for it
	$(BIN)/python jobs/digits/make_data.py
	$(BIN)/python jobs/digits/train.py
	$(BIN)/batchjob run jobs/digits/digits.yaml
	$(BIN)/python jobs/digits/show.py

# Daft wants an older pyarrow than everything else here, so it lies in a folder that only its own runs see. Where it
# cannot be installed, the comparison says so and does without.
SIZE ?= small
$(VENV)/daft/.installed: $(INSTALLED) benchmarks/daft.lock
	-$(HAND_ON) $(UV) pip install --quiet $(COMPILED) --require-hashes --target $(@D) --requirements benchmarks/daft.lock && touch $@

bench: $(INSTALLED) $(VENV)/daft/.installed  ## beside Ray Data, Daft and a plain loop; SIZE=full takes hours
	$(BIN)/python -m benchmarks.compare --size $(SIZE)

lock: $(INSTALLED)  ## compile requirements.lock again, newest versions
	$(UV) pip compile --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --no-header --extra dev --quiet --output-file requirements.lock pyproject.toml
	echo daft | $(UV) pip compile --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --no-header --quiet --output-file benchmarks/daft.lock -

wheel: $(INSTALLED)  ## dist/batchjob-….whl, for cluster.yaml or for your own index
	rm -rf dist
	$(UV) build --wheel --offline --no-build-isolation

clean:  ## remove caches and what the jobs wrote; .venv stays
	rm -rf out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(TREES) -name __pycache__ -type d -prune -exec rm -rf {} +
