# Yuan2 on Kubernetes. `make demo` shows the whole path, `make test` proves it; `make help` lists the rest.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

CACHE  := $(or $(YUAN2_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/yuan2)
PYTHON ?= python3
VENV   := .venv
LIGHT  := .venv-light
COMPAT := .venv-compat
VLLM   := .venv-vllm
FASTCHAT := .venv-fastchat
PY     := $(VENV)/bin/python
PYTEST := $(PY) -m pytest
PATHS  := core:operator:trainer_image:server_image:deploy/local:deploy/demo
SOURCES := core operator trainer_image server_image deploy tests examples

export YUAN2_CACHE := $(CACHE)
# uv trusts the certificates that the machine trusts.
export UV_NATIVE_TLS ?= 1
# pip and uv name a package mirror differently; whichever name is set serves both.
INDEX := $(or $(UV_DEFAULT_INDEX),$(UV_INDEX_URL),$(PIP_INDEX_URL))
ifneq ($(INDEX),)
export UV_DEFAULT_INDEX := $(INDEX)
export PIP_INDEX_URL := $(INDEX)
endif

.PHONY: help
help: ## List the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(VENV)/.ok ## Prepare .venv, the Python of tests and benchmarks
$(VENV)/.ok: requirements/dev.txt scripts/venv.sh
	@python=$$(scripts/find-python.sh 3.11 $(PYTHON)) && scripts/venv.sh $(VENV) requirements/dev.txt "$$python"

.PHONY: venv-light
venv-light: $(LIGHT)/.ok ## Prepare .venv-light, without torch: for work on core and operator
$(LIGHT)/.ok: requirements/light.txt scripts/venv.sh
	@python=$$(scripts/find-python.sh 3.11 $(PYTHON)) && scripts/venv.sh $(LIGHT) requirements/light.txt "$$python"

# FastChat as its documents pin it, the other side of the benchmarks.
$(FASTCHAT)/.ok: requirements/fastchat.txt scripts/venv.sh
	@scripts/venv.sh $(FASTCHAT) requirements/fastchat.txt "$$(scripts/find-python.sh 3.10)"

$(COMPAT)/.ok: requirements/compat.txt scripts/venv.sh
	@python=$$(scripts/find-python.sh 3.10) && scripts/venv.sh $(COMPAT) requirements/compat.txt "$$python"

$(VLLM)/.ok: requirements/vllm.txt scripts/venv.sh server_image/pyproject.toml
	@scripts/venv.sh $(VLLM) requirements/vllm.txt "$$(scripts/find-python.sh 3.11)" server_image

.PHONY: demo demo-down
demo: $(VENV)/.ok ## Train and serve a small Yuan 2.0 on a real one-node cluster, then ask it
	@$(PY) deploy/demo/demo.py up
demo-down: ## Remove every trace of the demo but the cache
	@$(PYTHON) deploy/demo/demo.py down

.PHONY: test lint unit unit-light compat vllm vllm-worker build integration processors soak-kill e2e
test: ## Everything CI runs
	@scripts/test.sh

lint: verify ## Format, lint, types, layers, generated files
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/mypy
	PYTHONPATH=$(PATHS) $(VENV)/bin/lint-imports
	$(PY) scripts/sizes.py

# Two processes of one thread each use two cores better than one process of two.
unit unit-light compat integration vllm-worker: export OMP_NUM_THREADS = 1

unit: $(VENV)/.ok ## Unit and golden tests
	$(PYTEST) tests/unit tests/golden tests/gpu -q -n 2 --dist loadfile

unit-light: $(LIGHT)/.ok ## The unit tests of core and operator in .venv-light
	$(LIGHT)/bin/python -m pytest tests/unit/core tests/unit/operator -q -n 2 --dist loadfile -m "not torch"

compat: $(COMPAT)/.ok ## The unit tests of trainer and server on Python 3.10 and torch 2.1.2
	$(COMPAT)/bin/python -m pytest tests/unit/core tests/unit/model tests/unit/trainer tests/unit/server tests/golden tests/gpu -q -n 2 --dist loadfile

# Both sides: our own model answers in .venv, vLLM in .venv-vllm.
vllm: $(VENV)/.ok $(VLLM)/.ok ## The plugin yuan2_vllm in an unmodified vLLM on CPU
	$(VLLM)/bin/python -m pytest tests/vllm -q

vllm-worker: $(VENV)/.ok $(VLLM)/.ok $(FASTCHAT)/.ok ## The worker with the engine vllm, against FastChat's programs
	$(PYTEST) tests/integration/server -q -m vllm

build: ## Build a cluster's programs and, as root, the images into the cache
	@$(PYTHON) deploy/local/cluster.py build

integration: $(VENV)/.ok $(FASTCHAT)/.ok ## Against the real control plane, FastChat and DeepSpeed
	$(PYTEST) tests/integration -q -n 2 -m "not vllm"

processors: $(VENV)/.ok ## The tests that carry the numbers, as other kinds of processors compute
	@scripts/processors.sh $(PY)

.PHONY: gpu-check gpu-bundle
gpu-check: $(VENV)/.ok ## On this machine's GPU, what only one can show, with figures (GPU_PYTHON=python3: not .venv)
	@scripts/gpu-check.sh $(or $(GPU_PYTHON),$(PY))

gpu-bundle: $(VENV)/.ok ## Pack gpu-check for a machine that has torch, transformers and safetensors alone
	@scripts/gpu-check.sh $(or $(GPU_PYTHON),$(PY)) --bundle

soak-kill: $(VENV)/.ok ## Runs killed in every phase, ten by chance (YUAN2_KILL_SEED, YUAN2_KILL_ROUNDS)
	YUAN2_KILL_SEED=$${YUAN2_KILL_SEED:-$$RANDOM} YUAN2_KILL_ROUNDS=$${YUAN2_KILL_ROUNDS:-10} $(PYTEST) tests/integration/trainer/test_kills.py -q -s

e2e: $(VENV)/.ok ## On the real node
	$(PYTEST) tests/e2e -q -n 2 --dist loadfile

.PHONY: lifecycle e2e-lifecycle
lifecycle: $(VENV)/.ok ## The demo: Ctrl-C while it trains, again to the end, demo-down
	$(PYTEST) tests/lifecycle -q -m "not long"

e2e-lifecycle: $(VENV)/.ok ## The same for each of its steps, and on a cluster that KUBECONFIG names (not part of test)
	$(PYTEST) tests/lifecycle -q

.PHONY: mutation
MUTATION := build/mutation/tool
$(MUTATION)/.ok: requirements/mutation.txt $(VENV)/.ok
	@rm -rf $(MUTATION) && $(CACHE)/uv-tool/bin/uv pip install -q --python $(PY) --target $(MUTATION) --require-hashes -r $<
	@touch $@
mutation: $(MUTATION)/.ok ## What the tests of the pure packages do not notice, by package (hours)
	@nice -n 19 $(PY) scripts/mutation.py

.PHONY: verify generate format lock
verify: $(VENV)/.ok ## Check that code is formatted and generated files are up to date
	$(VENV)/bin/ruff format --check $(SOURCES)
	PYTHONPATH=$(PATHS) $(PY) -m yuan2_operator.api.crd --check crds
	$(PY) docs/fields.py --check

generate: $(VENV)/.ok ## Write the generated files: crds/ and the field tables in docs/
	PYTHONPATH=$(PATHS) $(PY) -m yuan2_operator.api.crd crds
	$(PY) docs/fields.py

format: $(VENV)/.ok ## Format the code
	$(VENV)/bin/ruff format $(SOURCES)
	$(VENV)/bin/ruff check --fix $(SOURCES)

lock: ## Resolve requirements/*.in into requirements/*.txt (versions and hashes)
	scripts/lock.sh

.PHONY: bench bench-data bench-docs bench-operator bench-path bench-prepare bench-serve bench-train
bench: bench-prepare bench-train bench-data bench-operator bench-serve ## All numbers that need no node (an hour)
	@echo "bench: build/bench has them; 'make bench-path' measures the path on the node, 'make bench-docs' writes docs/benchmarks.md"

bench-docs: $(VENV)/.ok ## Put the tables of build/bench into docs/benchmarks.md
	PYTHONPATH=$(PATHS) $(PY) -m tests.bench.pages

bench-path: $(VENV)/.ok ## Numbers of the whole path, to build/bench/path.json
	$(PY) -m tests.bench.path

bench-data: $(VENV)/.ok ## Memory for 0.8 million conversations, to build/bench/data.json
	PYTHONPATH=$(PATHS) $(PY) -m tests.bench.data

bench-operator: $(VENV)/.ok ## The operator: requests, memory, many runs on simulated nodes, to build/bench/operator.json (with Go)
	PYTHONPATH=$(PATHS) $(PY) -m tests.bench.operating

bench-prepare: $(VENV)/.ok $(FASTCHAT)/.ok ## Preparation of data against FastChat's, to build/bench/prepare.json
	PYTHONPATH=$(PATHS) $(PY) -m tests.bench.prepare

bench-serve: $(VENV)/.ok $(FASTCHAT)/.ok ## Our worker against FastChat's, to build/bench/serve.json
	PYTHONPATH=$(PATHS) $(PY) -m tests.bench.serve

bench-train: $(VENV)/.ok $(FASTCHAT)/.ok ## The trainer against FastChat's, to build/bench/train.json
	PYTHONPATH=$(PATHS) $(PY) -m tests.bench.train

.PHONY: clean clean-cache
clean: ## Remove what was built in the checkout
	rm -rf $(VENV) $(LIGHT) $(COMPAT) $(VLLM) $(FASTCHAT) build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
clean-cache: ## Remove the cache outside the checkout
	rm -rf $(CACHE)
