# Needs Python 3.11, make and a package index; every target makes its own .venv first.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup docs demo test test-all planted test-processors test-versions check bench clean
setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Patchbay needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,ray]'
	touch $@

demo: setup
	$(BIN)/patchbay demo --report report/demo.html

test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The slow tier too: what is marked slow, and the whole of grids that `make test` takes by turns (tests/shares.py).
test-all: setup
	HF_HUB_OFFLINE=1 PATCHBAY_EVERYWHERE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "" --hypothesis-profile many

# Bugs planted one at a time in a copy, that the tests must notice; goes on where it was stopped. `make planted PLANTED="--changed"`.
planted: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.planted $(PLANTED)

# The numerical part as other processors round it: `make test-processors SETTINGS=default:1` for one.
test-processors: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.processors $(SETTINGS)

# Both ends of the ranges in pyproject.toml, each in an environment of its own: `make test-versions ENDS=newest` for one.
ENDS ?= oldest newest
test-versions:
	for end in $(ENDS); do $(PYTHON) tests/versions.py $$end || exit 1; done

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, into site/: pages of methods are made from their docstrings; it takes nothing from other hosts.
docs: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m mkdocs build --quiet --strict

bench: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m bench

clean:
	rm -rf .venv .venv-oldest .venv-newest report site .pytest_cache .mypy_cache .ruff_cache
