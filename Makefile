# Requires Python >= 3.11, make and a package index; everything else is installed into .venv. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
UV := VIRTUAL_ENV=$(VENV) $(BIN)/uv
TEST_PROCESSES ?= 2
TREES := batchjob benchmarks docs jobs tests

# The lock is made for Linux; other systems resolve the same requirements without it.
ifeq ($(shell uname -s),Linux)
REQUIREMENTS := --require-hashes --requirements requirements.lock
else
REQUIREMENTS := --extra dev --requirements pyproject.toml
endif

.DEFAULT_GOAL := help
.PHONY: help install docs docs-pages docs-serve lint audit format test test-fast test-slow test-faults demo bench lock wheel clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

install: $(INSTALLED)  ## install everything into .venv; does nothing if it is up to date

# uv itself is installed by pip, with the version and hashes of the lock. uv does not read pip's settings, so an index
# that is configured for pip only is passed on.
PIP_INDEX = $${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null)}
INDEX_FOR_UV = UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$(PIP_INDEX)}"
# With PYTHONDONTWRITEBYTECODE set, as in many containers, each process would compile every module it imports, which
# takes seconds. Therefore bytecode is compiled at installation.
COMPILED := --compile-bytecode
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed; name one: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.lock
	@echo '$(UV) pip install $(COMPILED) $(REQUIREMENTS)'; $(INDEX_FOR_UV) $(UV) pip install $(COMPILED) $(REQUIREMENTS)
	$(UV) pip install --offline --no-deps --no-build-isolation --editable .
	@touch $@

# mkdocs-material advertises its successor otherwise.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
lint: $(INSTALLED) audit  ## run ruff and mypy, both strict; check that the documentation is whole and up to date
	$(BIN)/ruff check $(TREES)
	$(BIN)/ruff format --check $(TREES)
	$(BIN)/mypy batchjob benchmarks docs tests
	@set -e; for folder in $(sort $(dir $(wildcard jobs/*/*.py))); do \
	  echo "$(BIN)/mypy $$folder"; $(BIN)/mypy $$folder; done
	$(BIN)/python -m docs.generate --check
	$(MKDOCS) build --strict --quiet

audit: $(INSTALLED)  ## check the locks for known vulnerabilities, if osv.dev can be reached
	@$(BIN)/python -c 'import urllib.request as u; u.urlopen("https://api.osv.dev/v1/vulns/PYSEC-2018-66", timeout=5)' \
	  2>/dev/null || { echo "audit: osv.dev cannot be reached from here; the locks were not audited" >&2; exit 0; }; \
	  for lock in requirements.lock benchmarks/daft.lock; do $(BIN)/pip-audit --requirement $$lock --require-hashes \
	  --disable-pip --vulnerability-service osv --progress-spinner off || exit 1; done

format: $(INSTALLED)  ## fix and format the code with ruff
	$(BIN)/ruff check --fix $(TREES)
	$(BIN)/ruff format $(TREES)

docs-pages: $(INSTALLED)  ## write the pages of docs/ that come from the code: reference, architecture
	$(BIN)/python -m docs.generate

docs: docs-pages  ## build the documentation into build/docs; a dead link is an error
	$(MKDOCS) build --strict --quiet

docs-serve: $(INSTALLED)  ## show the documentation at http://127.0.0.1:8000 and follow changes
	$(MKDOCS) serve

test: $(INSTALLED)  ## run the tests in TEST_PROCESSES=2 processes, about six minutes; longer ones below
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

test-fast: $(INSTALLED)  ## run the unit tests without S3 and Ray, less than two minutes
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile -m "not s3 and not ray" tests/unit

test-slow: $(INSTALLED)  ## run end-to-end tests that take minutes each
	$(BIN)/python -m pytest tests/slow

test-faults: $(INSTALLED)  ## inject faults and measure every promise; BATCHJOB_SEED=1, about 25 minutes
	$(BIN)/python -m pytest tests/faults --timeout 900

demo: $(INSTALLED)  ## classify handwritten digits, from PNG files to Parquet, on a Ray started for it
	$(BIN)/python jobs/digits/make_data.py
	$(BIN)/python jobs/digits/train.py
	$(BIN)/batchjob run jobs/digits/digits.yaml
	$(BIN)/python jobs/digits/show.py

# Daft needs an older pyarrow than everything else here, so it is installed into a folder that only its own runs see. If
# it cannot be installed, the comparison reports that and runs without it.
SIZE ?= small
$(VENV)/daft/.installed: $(INSTALLED) benchmarks/daft.lock
	-$(INDEX_FOR_UV) $(UV) pip install --quiet $(COMPILED) --require-hashes --target $(@D) --requirements benchmarks/daft.lock && touch $@

bench: $(INSTALLED) $(VENV)/daft/.installed  ## compare with Ray Data, Daft and a plain loop; SIZE=full takes hours
	$(BIN)/python -m benchmarks.compare --size $(SIZE)

lock: $(INSTALLED)  ## resolve requirements.lock again, with the newest versions
	$(UV) pip compile --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --no-header --extra dev --quiet --output-file requirements.lock pyproject.toml
	echo daft | $(UV) pip compile --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --no-header --quiet --output-file benchmarks/daft.lock -

wheel: $(INSTALLED)  ## build dist/batchjob-….whl, for cluster.yaml or your own index
	rm -rf dist
	$(UV) build --wheel --offline --no-build-isolation

clean:  ## remove caches and the jobs' output; .venv stays
	rm -rf out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(TREES) -name __pycache__ -type d -prune -exec rm -rf {} +
