# make quickstart trains a small hybrid; make test is what CI runs. Everything happens in .venv, made from the lock.

PYTHONS := python3.11 python3.12 python3.13 python3.14 python3
PYTHON ?= $(shell for p in $(PYTHONS); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
STAMP := .venv/.complete
CORES := $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))

TESTS := JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax
PYTEST := $(TESTS) $(BIN)/python -m pytest -n $(CORES) --dist=worksteal -q
EVERYWHERE := not gpu and not oracle

.PHONY: .venv quickstart study-tiny test test-fast test-all lint types oracles fuzz lock clean

.venv: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "hydrax needs Python 3.11 or newer; tried $(PYTHONS). Set PYTHON=..." >&2; exit 1; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

quickstart: .venv
	$(BIN)/python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart

test: .venv
	$(PYTEST) -m "$(EVERYWHERE) and not slow"

test-fast: .venv
	$(PYTEST) -m "$(EVERYWHERE) and not slow and not thorough"

test-all: .venv
	$(PYTEST) -m "$(EVERYWHERE)"

# How much attention recall needs, in minutes on CPU cores; it ends in runs/study_tiny/report/report.html.
study-tiny: .venv
	$(BIN)/python -m launch.sweep --sweep=sweeps/mqar_ratio --workdir=runs/study_tiny --executor=stacked
	$(BIN)/python -m launch.report --runs=runs/study_tiny --out=runs/study_tiny/report

N ?= 50
START ?= 0

fuzz: .venv
	FUZZ_START=$(START) FUZZ_COUNT=$(N) $(PYTEST) tests/contract/test_hybrids.py

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv
	$(BIN)/mypy

# Third-party references need torch, so they get an environment of their own. On Linux, PyPI's torch brings gigabytes of
# CUDA: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make oracles takes the build without it.
oracles: .venv-oracles/.complete
	$(TESTS) .venv-oracles/bin/python -m pytest -n $(CORES) -q -m oracle tests/oracles

.venv-oracles/.complete: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "hydrax needs Python 3.11 or newer; tried $(PYTHONS). Set PYTHON=..." >&2; exit 1; }
	rm -rf .venv-oracles
	$(PYTHON) -m venv .venv-oracles
	.venv-oracles/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	.venv-oracles/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e ".[oracles]"
	@touch $@

lock:
	uv pip compile pyproject.toml --extra data --extra dev --extra eval --extra hf --extra notebooks --extra slurm --extra tensorboard \
		--universal --python-version 3.11 --no-header --no-annotate --quiet --output-file requirements.lock

clean:
	rm -rf .venv .venv-oracles .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
