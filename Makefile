# `make run` and `make test` set everything up by themselves; SEED and ARGS reach `bascule run`.
SHELL := /bin/bash
PYTHON ?= python3.11
SEED ?= 1
ARGS ?=
BIN := .venv/bin
PACKAGES := $(addprefix build/src/bascule/,schemas plugins trainers verifiers runtime)

.PHONY: run test check format nightly faults attacks clean

run: .venv/run.stamp
	$(BIN)/bascule run --task arith --seed $(SEED) $(ARGS)

test: .venv/dev.stamp
	$(BIN)/python -m pytest

check: .venv/dev.stamp build/src/bascule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/lint-imports
	$(BIN)/python -m bascule.schemas.lock

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

nightly: .venv/dev.stamp
	$(BIN)/python -m pytest -m nightly -s
	$(BIN)/python -m tests.simulation --schedules 100000
	$(BIN)/python -m tests.faults --seed 3
	$(MAKE) attacks
	$(BIN)/python -m ops.bench algorithms

faults: .venv/dev.stamp
	$(BIN)/python -m tests.faults --seed $(SEED) $(ARGS)

# As the user that one is, and as an ordinary one where that is root. Both tables are printed, whatever the first says.
attacks: .venv/dev.stamp
	status=0; $(BIN)/python -m tests.attacks $(ARGS) || status=1; \
	if test "$$(id -u)" = 0; then $(BIN)/python -m tests.attacks --user $(ARGS) || status=1; fi; exit $$status

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache

# torch first and alone, so that nothing else chooses its build.
.venv/run.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "torch>=2.13,<2.14"
	$(BIN)/python -m pip install -q -e ".[tasks,torch]"
	touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python -m pip install -q -e ".[tasks,torch,dev]"
	touch $@

# mypy sees the folders at the root as one namespace through this link.
build/src/bascule:
	mkdir -p build/src
	ln -sfn ../.. $@
