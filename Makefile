# `make quickstart` and `make test` need Python 3.10+ and a package registry; they set up the rest by themselves.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready

.PHONY: setup quickstart test test-all test-asan gpu lint wheel clean

setup: $(READY)

# torch comes first, and the package with --no-build-isolation: so pip builds against that torch and fetches no second one.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt setuptools wheel ninja pybind11
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	@$(VENV)/bin/python -c "from fastgpt.ops import registry; print(registry.extension_line())"
	@touch $@

quickstart: setup
	$(VENV)/bin/fastgpt quickstart $(ARGS)

test: lint
	$(VENV)/bin/python -m pytest -n 2

test-all: lint
	$(VENV)/bin/python -m pytest -n 2 -m "slow or not slow"

# The C++ kernels and the BPE trainer under AddressSanitizer and UndefinedBehaviorSanitizer.
test-asan: setup
	tests/asan.sh $(VENV)/bin/python

# On a machine with a CUDA GPU and nvcc: tests, compute-sanitizer and benchmarks of the kernels.
gpu: setup
	benchmarks/gpu.sh $(VENV)/bin/python

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

wheel: setup
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist *.egg-info fastgpt/*.so $(READY)
