# make demo   the whole method on the embedded model: prints one table, writes runs/demo
# make test   lint, then the tests: one or more for every behavior
# make test-fast   those that start no engine, server, browser or compiler: minutes
# make test-all   every test, the matrices as well, in parts; one that has passed on these very files is not run again
# make docs   the documentation as a site in site/
# make test-newest   the tests that need no vLLM, with the newest releases that pyproject.toml allows
# Each makes .venv from nothing but Python >= 3.11, and is quick once it exists.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: demo test test-fast test-all docs picture lint format clean
.DEFAULT_GOAL := test

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# Only the tests need vLLM. What the line above installs later fits it: both follow constraints.txt.
VLLM_INSTALL := $(addprefix tests/serving/,install_vllm.py torchvision_schemas.py triton_backends.py)
.venv/.vllm: $(VLLM_INSTALL) constraints.txt | .venv/.installed
	$(BIN)/python tests/serving/install_vllm.py
	touch $@

# Some tests look at pages in a browser.
.venv/.programs: tests/install_programs.py tests/browser.py tests/nginx.py | .venv/.installed
	$(BIN)/python tests/install_programs.py
	touch $@

# Programs of others that are tried against our servers, each in an environment of its own.
.venv/.clients: tests/install_clients.py | .venv/.installed
	$(BIN)/python tests/install_clients.py
	touch $@

demo: .venv/.installed
	$(BIN)/hones demo --out runs/demo

# Tests that share something expensive run in one of so many processes (tests/conftest.py); each takes up to 3 GB.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS)

test: lint .venv/.vllm .venv/.programs
	$(PYTEST) -m 'not matrix'

test-fast: .venv/.vllm
	$(PYTEST) -m 'not matrix and not slow'

# All parts, or some: make test-all PART='steer http'; tests/all_parts.py --list names them.
PART ?=
test-all: lint .venv/.vllm .venv/.programs .venv/.clients
	WORKERS=$(WORKERS) $(BIN)/python tests/all_parts.py $(PART)

# A test builds it, too, with warnings as errors.
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "site/index.html"

# The pictures in docs/ and README: of the run in $(RUN), and of the playground with its profiles.
RUN ?= runs/demo
picture: .venv/.installed .venv/.programs
	$(BIN)/hones report $(RUN)
	cp $(RUN)/picture.svg docs/demo.svg
	$(BIN)/python tests/browser.py $(RUN)/report.html docs/report.png
	PYTHONPATH=tests $(BIN)/python -m serving.playground_page $(RUN)/profiles docs/playground.png

lint: .venv/.installed
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/mypy --no-error-summary

format: .venv/.installed
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .

clean:
	rm -rf .venv .venv-newest .test-all runs/demo dist site

# With the newest releases that pyproject.toml allows, which each call looks for again, instead of those in constraints.txt. Only torch is the one
# from there: elsewhere it brings gigabytes of CUDA. vLLM allows older ones only, so it is not there, nor are the tests that need it.
NEWEST := .venv-newest/bin

.PHONY: test-newest
test-newest:
	test -x $(NEWEST)/python || $(PYTHON) -m venv .venv-newest
	$(NEWEST)/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		"$$(grep ^torch== constraints.txt)" --editable '.[dev]'
	@$(NEWEST)/python -m pip freeze --disable-pip-version-check --exclude-editable | paste -s -d ' ' | fold -s -w 120
	$(NEWEST)/python tests/install_programs.py
	$(NEWEST)/python -m pytest --numprocesses $(WORKERS) tests/steer tests/offline \
		tests/serving/test_transformers_server.py tests/serving/test_http.py -k 'not (test_http and vllm)'
