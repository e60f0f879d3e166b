PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two workers with one thread each: more threads than cores make small matrices many times slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo bench-quick test test-heavy test-deepspeed test-newest test-aot-all lock lint install clean

install: $(VENV)/.installed

SOURCES := pyproject.toml setup.py $(wildcard comm/*.c kernels/*.[ch] placement/*.[ch] placement/solve/*.c)
NEWEST := .venv-newest

ifneq ($(VENV),$(NEWEST))
$(VENV)/.installed: requirements.lock $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@
endif

# The newest versions that the ranges allow, in an environment of their own; they become the lock when the tests pass.
$(NEWEST)/.installed: $(SOURCES)
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet numpy "setuptools>=77" -e ".[dev]"
	touch $@

test-newest: $(NEWEST)/.installed
	$(MAKE) test VENV=$(NEWEST)

lock: $(NEWEST)/.installed
	{ sed -n '/^#/p' requirements.lock; \
	$(NEWEST)/bin/python -m pip freeze --all --exclude-editable | grep -v "^pip==" | sed 's/+cpu$$//'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

# What the engine launches, compiled by its own host code through a driver that launches nothing: the oldest triton, that of
# the newest torch, and the newest.
test-aot-all: install
	for version in 3.6.0 3.8.0 3.9.0; do \
	  test -d .venv-triton-$$version || \
	    $(BIN)/python -m pip install --quiet --no-deps --target .venv-triton-$$version triton==$$version; \
	  PYTHONPATH=$(CURDIR)/.venv-triton-$$version $(BIN)/python -m moe.kernels.aot --launches \
	    --json bench/results/launches_triton_$$version.json || exit 1; \
	done

demo: install
	$(BIN)/moe demo

# Under three minutes; what moved beyond noise since the last committed results.
bench-quick: install
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.quick

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p moe

test: install lint
	$(PYTEST) -m "not heavy and not deepspeed"

test-heavy: install
	$(PYTEST) -m heavy

# DeepSpeed compiles its reader once, some ten minutes; it needs g++ and libaio's headers (Debian: libaio-dev).
test-deepspeed: install
	$(BIN)/python -m pip install --quiet "deepspeed>=0.19,<0.20"
	export PATH=$(CURDIR)/$(BIN):$$PATH DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(CURDIR)/$(VENV)/deepspeed_ops OMP_NUM_THREADS=1; \
	$(BIN)/python -c "from moe.offload.deepnvme import aio_handles; aio_handles()" && \
	$(BIN)/python -m pytest -m deepspeed -rs tests/offload tests/moe/test_parallel.py && $(BIN)/python bench/bench_deepnvme.py

clean:
	rm -rf $(VENV) $(NEWEST) build *.egg-info
