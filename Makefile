# `make train` and `make test` need nothing but Python 3.10 or newer, `make` and a package registry.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: train test bench gpu wheels lint

train: $(VENV)/installed-train
	$(BIN)/crate-fast train $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal $(ARGS)

bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/run.py $(ARGS)

# On a machine with a GPU, PyTorch and no package registry: nothing is installed.
gpu:
	$(PYTHON) benchmarks/gpu.py $(ARGS)

# What such a machine may lack, fetched where there is a registry, for the Python that is there.
GPU_PYTHON ?= 3.12
wheels: $(VENV)/installed-test
	$(PIP) download --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --dest wheels lion-pytorch simplejpeg

lint: $(VENV)/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# The stamp is written last, so an installation that was cut off is taken up again; an environment without a working pip
# is made anew.
$(VENV)/installed-%: setup.py pyproject.toml
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing crate-fast[$*] and what it needs in $(VENV) (minutes, the first time)"
	@$(PIP) install --editable '.[$*]'
	@touch $@
