# `make run` trains the default recipe from nothing; `make test` runs the tests, `make test-deployment` those with servers
# and workers, `make soak` a long one of these; all set up .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What pip is given for PyTorch. Another build, for the CPU alone or for a GPU: make run TORCH="--index-url URL torch"
TORCH ?= torch==2.13.0

.PHONY: run test test-deployment soak check format clean setup

run: setup
	$(BIN)/cairn run arithmetic

test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not agreement and not deployment"
	$(BIN)/python -m pytest -n 2 --dist worksteal -m agreement

test-deployment: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m deployment

soak: setup
	$(BIN)/python -m tests.deployment.soak

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.installed

# torch comes first and alone, so that the build chosen above is what all the others find.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Cairn needs Python 3.11 or newer; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -P models/mlx_engine/blas.py
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
