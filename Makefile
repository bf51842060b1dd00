# `make train` and `make test` need nothing but Python 3.10 or newer, `make` and a package registry.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: train test test-rounding bench gpu lint

train: $(VENV)/installed-train
	$(BIN)/crate-fast train $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal $(ARGS)

# The tests that judge numbers, as other processors round them, on two threads, and with other numbers.
NUMERIC := kernels layer tuning model odd_tensors inspection weights export graphed graphs loop training
ROUNDING := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2 \
	ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_CBWR=COMPATIBLE MKL_CBWR=AVX2 OPENBLAS_CORETYPE=Prescott OPENBLAS_CORETYPE=Haswell \
	PYTEST_ADDOPTS=--threads=2 PYTEST_ADDOPTS=--seed=1 PYTEST_ADDOPTS=--seed=2

test-rounding: $(VENV)/installed-test
	@for setting in $(ROUNDING); do \
		echo "$$setting"; \
		env $$setting $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal --quiet $(ARGS) \
			$(NUMERIC:%=tests/test_%.py) || exit; \
	done

bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/run.py $(ARGS)

gpu: $(VENV)/installed-test
	$(BIN)/python benchmarks/gpu.py $(ARGS)

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
