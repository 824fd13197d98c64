# make demo and make test work on a fresh machine; each sets up what it needs and can be repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

.PHONY: demo test test-all setup check docs bench clean

demo: setup
	@echo "== recovering a paragraph from hidden states of SmolLM2-135M"
	@$(BIN)/sipit demo

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup -p no:benchmark

test: setup
	@echo "== running one case of each test; make test-all runs every case"
	@$(PYTEST) --quick

test-all: setup
	@echo "== running every case of every test"
	@$(PYTEST)

setup: $(STAMP)
	@echo "== preparing the pinned real model (fetched and converted once)"
	@$(BIN)/python -c "from sipit.models.pinned import pinned_folder; print('   ', pinned_folder('smollm2-135m'))"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MKDOCS) build --strict --quiet --site-dir $(VENV)/site

docs: $(STAMP)
	$(MKDOCS) serve

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

$(STAMP): pyproject.toml constraints.txt
	@echo "== creating $(VENV) and installing pinned dependencies (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)
