# The two commands of the README: `make quickstart` and `make test`. Both make .venv themselves, from pinned versions.
PYTHON ?= python3
BIN := .venv/bin
REFERENCES := .venv/references

.PHONY: quickstart test test-gpu test-tiles lint bench-reference reliability wheel docs clean

quickstart: .venv/installed
	$(BIN)/python -m recipes fit --config quickstart

# one process a core with one thread each: torch's threads wait for each other by spinning
test: lint $(REFERENCES)/installed
	MAMBA_SSM_FOLDER=$(CURDIR)/$(REFERENCES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --durations=15
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/gpu

# The kernels on a GPU; writes docs/gpu_tests.md. Needs torch, triton and pytest, no .venv: make test-gpu PYTHON_TEST=python3 COMMIT=...
PYTHON_TEST ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
# one process a core, since most of the time goes to compiling, and one for 5 GB of the GPU's memory at most
GPU_PROCESSES ?= $(shell n=$$(nproc); m=$$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -1); \
	m=$$(($${m:-40000} / 5000)); echo $$((n < m ? n : m)))
test-gpu:
	OMP_NUM_THREADS=1 $(PYTHON_TEST) -m pytest -o addopts=-q -p no:cacheprovider $(if $(GPU_PROCESSES),-n $(GPU_PROCESSES)) tests/gpu \
		--gpu-summary docs/gpu_tests.md $(if $(COMMIT),--gpu-commit $(COMMIT))

# every kernel that doctor would run, compiled for every architecture; `make test` compiles those that ask for most
test-tiles: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/offline.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-reference: .venv/installed-dev
	$(BIN)/python tests/bench_reference.py

# docs/reliability.md, from the tests that are marked `fault`
reliability: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability.py

wheel: .venv/installed-dev
	$(BIN)/python -m build --wheel --no-isolation

docs: .venv/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt mkdocs
	$(BIN)/mkdocs build --strict

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ .venv/installed

# mamba-ssm's plain-torch references, beside the environment and not in it: nothing is compiled, no nvcc is needed
$(REFERENCES)/installed: .venv/installed-dev
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation --no-deps --upgrade --target $(REFERENCES) mamba-ssm==2.3.2.post1 einops
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
