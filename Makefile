# `make train` and `make test` need nothing but Python 3.10 or newer, `make` and a package registry.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# By a path: a script beside a clone called crate_fast would otherwise find the clone's folder for the package.
BY_PATH := --config-settings editable_mode=compat

# The oldest versions that pyproject.toml allows, and a NumPy that triton 3.6's interpreter takes.
OLDEST := .venv-oldest
OLDEST_VERSIONS := torch==2.11.* triton==3.6.* 'numpy<2.4' pytest pytest-xdist
# What depends on them: the compiler and export, kernels, FSDP and DDP, streams and graphs, training on the digits.
OLDEST_TESTS := $(patsubst %,tests/test_%.py,export gpu_training graphed kernels layer model odd_tensors)

# What builds the documentation reads the code and does not import it: no PyTorch is installed for it.
SITE := .venv-docs
TOOLS := import sys; toml = __import__("tomllib" if sys.version_info > (3, 11) else "pip._vendor.tomli", fromlist=["load"]); \
	print(*toml.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")

.PHONY: train test quick one test-oldest test-rounding fuzz bench gpu wheels lint types site

train: $(VENV)/installed-train
	$(BIN)/crate-fast train $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal $(ARGS)

# The first case of every test that is not marked slow: about 95 seconds of a core. The slowest are shown, so that what
# has become slow is seen.
quick: $(VENV)/installed-test
	$(BIN)/python -m pytest --quick --numprocesses=2 --dist=worksteal --durations=5 $(ARGS)

# TEST is a file, a test as pytest names it (tests/test_cli.py::test_as_a_process), or words of names ("resume and not killed").
one: $(if $(TEST),$(VENV)/installed-test)
	@test -n "$(TEST)" || { echo "make one: TEST is ''; it must be a file, a test in it, or words of tests' names" >&2; exit 2; }
	$(BIN)/python -m pytest $(if $(findstring /,$(TEST)),'$(TEST)',-k '$(TEST)') $(ARGS)

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal $(OLDEST_TESTS) $(ARGS)
	$(OLDEST)/bin/python benchmarks/compile.py --quick

# The tests that judge numbers, as other processors round them, on two threads, and with other numbers. Every setting is run,
# though one before has failed. What torch.compile keeps for one processor it would take for another.
NUMERIC := kernels layer tuning model odd_tensors inspection weights export graphed graphs loop training
rounded = echo "$(1) $(2)"; \
	env $(1) TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(VENV)/inductor-$(firstword $(subst =,-,$(1))) \
		$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal --quiet $(2) $(ARGS) \
		$(NUMERIC:%=tests/test_%.py) && echo "passed: $(1) $(2)" || { failed=1; echo "FAILED: $(1) $(2)"; };
SSE := ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Prescott
AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 OPENBLAS_CORETYPE=Haswell

test-rounding: $(VENV)/installed-test
	@failed=0; \
	$(call rounded,ATEN_CPU_CAPABILITY=default $(SSE),--seed=0 --threads=2) \
	$(call rounded,ATEN_CPU_CAPABILITY=avx2 $(AVX2),--seed=1 --threads=1) \
	$(call rounded,ONEDNN_MAX_CPU_ISA=AVX512_CORE,--seed=2 --threads=2) \
	$(call rounded,ATEN_CPU_CAPABILITY=default $(AVX2),--seed=2 --threads=1) \
	exit $$failed

# Changed files in every command for FUZZ_SECONDS, other ones each time; what is found is printed with its seed.
FUZZ_SECONDS ?= 3600
fuzz: $(VENV)/installed-test
	$(BIN)/python tests/fuzz.py --minutes $$(($(FUZZ_SECONDS) / 60)) --seed $$(date +%s) $(ARGS)

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
	$(BIN)/lint-imports --no-logo

types: $(VENV)/installed-test
	$(BIN)/pyright --pythonpath $(BIN)/python

# In site/, index.html first; it needs no server. Warnings are errors.
site: $(SITE)/installed
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict $(ARGS)

# The stamp is written last, so an installation that was cut off is taken up again; an environment without a working pip
# is made anew.
$(VENV)/installed-%: setup.py pyproject.toml
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing crate-fast[$*] and what it needs in $(VENV) (minutes, the first time)"
	@$(PIP) install $(BY_PATH) --editable '.[$*]'
	@touch $@

$(OLDEST)/installed: setup.py pyproject.toml Makefile
	@echo "installing crate-fast[train] with the oldest PyTorch in $(OLDEST) (minutes, the first time)"
	@$(PYTHON) -m venv --clear $(OLDEST)
	@$(OLDEST)/bin/python -m pip --quiet --disable-pip-version-check install $(BY_PATH) --editable '.[train]' $(OLDEST_VERSIONS)
	@touch $@

$(SITE)/installed: pyproject.toml Makefile
	@echo "installing what builds the documentation in $(SITE)"
	@$(PYTHON) -m venv --clear $(SITE)
	@$(SITE)/bin/python -c '$(TOOLS)' > $(SITE)/tools.txt
	@$(SITE)/bin/python -m pip --quiet --disable-pip-version-check install --requirement $(SITE)/tools.txt
	@touch $@
