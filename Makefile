PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Installed first and by exact version: a later, looser requirement would otherwise fetch another build.
TORCH ?= torch==2.13.0

# Two workers with one thread each: more threads than cores make small matrices many times slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-heavy lint install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py $(wildcard kernels/*.c kernels/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: install
	$(BIN)/moe demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p moe

test: install lint
	$(PYTEST) -m "not heavy"

test-heavy: install
	$(PYTEST) -m heavy

clean:
	rm -rf $(VENV) build *.egg-info
