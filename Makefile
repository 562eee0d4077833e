# One runner, verbs. `make` alone lists them; continuous integration runs the same ones.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
# More arguments for the tool behind a target: make test ARGS="-k revoke -n 0"
ARGS ?=
# Test processes; the suite is made for two cores.
JOBS ?= 2
# How long `make fuzz` looks for trouble, for each target.
FUZZ_EXAMPLES ?= 20000

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

##@ Use
.PHONY: setup demo dev
.venv/.ready: .ci/constraints.txt .ci/setup pyproject.toml protos/pyproject.toml ca/pyproject.toml clients/python/pyproject.toml
	@.ci/setup

setup: .venv/.ready ## Make .venv with the locked packages and this checkout (about a minute, once)

demo: setup ## Two services give up their shared API key: three acts, under two minutes
	@$(BIN)/idb demo $(ARGS)

dev: setup ## A broker with a real OpenBao on loopback, in .dev/, until Ctrl-C
	@$(BIN)/idb dev --dir .dev $(ARGS)

##@ Change
.PHONY: test lint types check fix fuzz bench
test: setup ## The whole test suite (about a quarter of an hour on two cores)
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadscope $(ARGS)

lint: setup ## Style, format and layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: setup ## mypy, strict, everywhere
	@$(BIN)/mypy

check: lint types test ## What must hold before a change lands: style, layers, types, tests, bounded fuzzing, drift

fix: setup ## Let ruff repair and format what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

fuzz: setup ## Fuzz every parser for longer than the suite does (FUZZ_EXAMPLES each)
	@HYPOTHESIS_PROFILE=fuzz HYPOTHESIS_MAX_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/fuzz -n $(JOBS) --timeout 0 $(ARGS)

bench: setup ## Measure against OpenBao, cfssl and the raw ceiling: one table, one JSON in .bench/
	@$(BIN)/python tests/bench/run.py $(ARGS)

##@ Generate
.PHONY: protos docs constraints clean distclean
protos: setup ## Regenerate the stubs from the .proto files
	@$(BIN)/python protos/generate.py

docs: setup ## Regenerate the reference pages in docs/
	@$(BIN)/python .ci/generate_docs.py

constraints: setup ## Lock the packages again (ARGS=--upgrade for the newest)
	@.ci/lock $(ARGS)

clean: ## Remove caches and build products
	@rm -rf build dist .bench .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## Remove .venv, .dev and the Envoy of the tests as well
	@rm -rf .venv .dev .envoy
