# Every target works in a clean checkout on Linux with Python 3.11 or newer; the first one installs.
SHELL := /bin/bash
# Keeps the checkout's root off sys.path, where `import model` would find a second identity of a folder.
export PYTHONSAFEPATH = 1
# Threads of torch that wait for each other must not spin on cores that others use.
export OMP_WAIT_POLICY = PASSIVE
# Whoever waits for messages reads them, as in every process of the product.
export GRPC_EXPERIMENTS = -event_engine_client,-event_engine_listener
# Tests start hundreds of processes; each would compile all modules again, and pytest all tests.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=
DEMO_ARGS = $(if $(DATA),--data '$(DATA)')
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo 1)
# fbgemm-gpu carries the CUDA build; on a CPU the shim pulls fbgemm-gpu-cpu under the same name.
TARGETS := $(if $(GPU),,./deploy/packaging/fbgemm-gpu-shim) -e '.[$(if $(GPU),gpu,cpu),test,dev]'
COMPILER := $(shell command -v $${CXX:-g++})
# The tests of these folders have a target each; `test` and `test-slow` share all others.
APART := $(addprefix --ignore tests/,crash multihost mutants simulation)
RUN_TESTS = $(if $(DATA),SILVERSHARD_DATA='$(DATA)') $(BIN)/pytest -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder --durations 25 $(APART)
PROTOS := admin retrieval shard table update

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-crash test-chaos test-mutants test-multihost test-sanitized test-emulated bench bench-kernels bench-gpu bench-model bench-tables bench-text bench-semantic bench-joint bench-peer bench-freshness bench-churn bench-cluster check fmt setup proto proto-check wheel clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.installed ## train on MovieLens, publish, serve on two shards, ask, measure
	$(BIN)/silvershard demo $(DEMO_ARGS)

test: $(VENV)/.installed ## run the fast tests: under ten minutes on two cores
	$(RUN_TESTS) -m 'not slow'

test-slow: $(VENV)/.installed ## run the tests that take long: real clusters, trainings, kernels in Triton's interpreter
	$(RUN_TESTS) -m slow

test-crash: $(VENV)/.installed ## swap generations 50 times, kill 200 processes and drop what they did not sync, under load
	SILVERSHARD_CRASH_SWAPS=$(or $(SWAPS),50) SILVERSHARD_CRASH_FAULTS=$(or $(FAULTS),200) $(BIN)/pytest -n0 --durations 10 tests/crash

test-chaos: $(VENV)/.installed ## ask a cluster in virtual time a million requests beside 100,000 faults (REQUESTS=...; half an hour)
	SILVERSHARD_SIMULATED_REQUESTS=$(or $(REQUESTS),1000000) $(BIN)/pytest -n auto --maxprocesses 4 --dist load tests/simulation

test-mutants: $(VENV)/.installed ## plant bugs in a copy of the tree: each must be noticed by the history checker or by a test
	$(BIN)/pytest -n auto --maxprocesses 4 --dist load tests/mutants

test-multihost: $(VENV)/.installed ## cut off and kill hosts that are namespaces of this machine (root; ten minutes)
	timeout --kill-after 30 $(or $(BUDGET_S),1500) $(BIN)/pytest -n0 --durations 20 tests/multihost

test-sanitized: $(VENV)/.installed ## test the native operators under AddressSanitizer and UBSan
	$(BIN)/python -P tests/native_builds.py sanitized

test-emulated: $(VENV)/.installed ## test the AVX-512 operators without such a CPU (needs libsimde-dev)
	$(BIN)/python -P tests/native_builds.py emulated

bench: $(VENV)/.installed ## measure the pipeline beside exact search, gate first
	$(BIN)/python -P benchmarks/run.py

# A passive wait policy would add the time of waking up to every call on two threads.
bench-kernels: $(VENV)/.bench ## measure the operators beside Faiss (QUICK=1: fewer cells, three minutes)
	env -u OMP_WAIT_POLICY $(BIN)/python -P benchmarks/kernels.py $(if $(QUICK),--quick)

bench-gpu: $(VENV)/.installed ## measure the operators on an H100 or H200, three runs of under ten minutes
	for part in 1 2 3; do $(BIN)/python -P benchmarks/gpu.py --part $$part || exit 1; done

bench-model: $(VENV)/.installed ## measure reranking, joint training, tables, text and ids (QUICK=1: five minutes)
	$(if $(DATA),SILVERSHARD_DATA='$(DATA)') $(BIN)/python -P benchmarks/model.py $(if $(QUICK),--quick)

bench-tables: $(VENV)/.installed ## measure embedding tables: quantised, sharded, remote
	$(BIN)/python -P benchmarks/embeddings.py
	$(BIN)/python -P benchmarks/tables.py $(if $(QUICK),--quick)

bench-text: $(VENV)/.installed ## measure text towers
	$(BIN)/python -P benchmarks/text.py $(if $(QUICK),--quick)

bench-semantic: $(VENV)/.installed ## measure semantic-id generation
	$(BIN)/python -P benchmarks/semantic.py $(if $(QUICK),--quick)

bench-peer: $(VENV)/.installed ## compare our sequence towers with SASRec and HSTU of RecTools (QUICK=1: one seed, few epochs)
	$(BIN)/python -P benchmarks/quality_peer.py $(DEMO_ARGS) $(if $(QUICK),--quick) $(if $(JOBS),--jobs $(JOBS))

bench-joint: $(VENV)/.installed ## measure an index trained with the towers beside one built after them
	$(if $(DATA),SILVERSHARD_DATA='$(DATA)') $(BIN)/python -P benchmarks/joint.py $(if $(QUICK),--quick)

bench-freshness: $(VENV)/.installed ## measure updates, their lag and swaps on a running cluster (QUICK=1: three minutes)
	$(BIN)/python -P benchmarks/freshness.py $(if $(QUICK),--quick)

bench-churn: $(VENV)/.installed ## measure the index under 10 million updates (QUICK=1: 300,000)
	$(BIN)/python -P benchmarks/churn.py $(if $(QUICK),--quick)

bench-cluster: $(VENV)/.installed ## measure what a cluster adds to its shards and what faults and overload cost (QUICK=1: five minutes)
	$(BIN)/python -P benchmarks/cluster.py $(if $(QUICK),--quick)

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check --quiet -e '.[bench]'
	@touch $@

check: $(VENV)/.installed proto-check ## lint, format, types, layering, packaging
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pip check
	$(BIN)/pytest -q -m 'not slow' tests/test_layering.py tests/test_packaging.py tests/test_exports.py tests/test_targets.py

fmt: $(VENV)/.installed ## format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.installed ## create .venv and install, nothing else

$(VENV)/.installed: pyproject.toml setup.py $(wildcard kernels/native/*) deploy/packaging/fbgemm-gpu-shim/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, got {sys.version}" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(if $(COMPILER),SILVERSHARD_REQUIRE_NATIVE=1) $(BIN)/pip install --disable-pip-version-check --quiet $(TARGETS)
	@touch $@

proto: $(VENV)/.installed ## regenerate the protobuf code under cluster/
	$(BIN)/python -m grpc_tools.protoc -I .namespace --python_out=.namespace --pyi_out=.namespace \
	  --grpc_python_out=.namespace $(PROTOS:%=.namespace/silvershard/cluster/%.proto)

proto-check: $(VENV)/.installed ## fail when the committed protobuf code is not what the .proto files give
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	$(BIN)/python -m grpc_tools.protoc -I .namespace --python_out=$$out --pyi_out=$$out \
	  --grpc_python_out=$$out $(PROTOS:%=.namespace/silvershard/cluster/%.proto) && \
	for file in $$out/silvershard/cluster/*; do \
	  cmp "$$file" "cluster/$$(basename $$file)" || { echo "run 'make proto' and commit"; exit 1; }; \
	done

wheel: $(VENV)/.installed ## build the wheel into dist/
	rm -rf build
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove build outputs, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
