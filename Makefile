# `make` shows what there is. PYTHON chooses the interpreter: make test PYTHON=python3.13
PYTHON ?= python

.DEFAULT_GOAL := help
.PHONY: help install test lint bench docs

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## Install the package as it lies here, with what development needs
	$(PYTHON) -m pip install --editable ".[dev]"

test: ## Run the tests
	$(PYTHON) -m pytest

lint: ## Check format, style and types
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

bench: ## Measure against the peers that are installed, and keep the results in benchmarks/results
	$(PYTHON) benchmarks/import_time.py
	$(PYTHON) benchmarks/empirical_ntk.py
	$(PYTHON) benchmarks/infinite_ntk.py

docs: ## Build the documentation into site/
	$(PYTHON) -m mkdocs build --strict
