# slora: `make help` lists what can be done here. CI and the README call only these targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTOS := $(shell cd protos && find slora -name '*.proto' | sort)
STAMP := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
# uv does not look into pip's local wheel folder by itself; without it torch would bring gigabytes of CUDA.
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
# Tests, demo and benchmarks start hundreds of processes: each would compile all that it imports, half of its seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup proto lint format test test-gpu test-compose release-check bench bench-gpu demo up down clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install the project with everything needed to develop and run it

$(STAMP): pyproject.toml
	@echo "Setting up $(VENV) (once; some seconds to a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv
	@$(BIN)/python -m uv pip install -q --python $(BIN)/python -e '.[dev]'
	@! command -v npm >/dev/null || npm ci --prefix clients/node --silent --no-audit --no-fund --ignore-scripts || \
		echo "The Node client's packages could not be installed; its test will be skipped."
	@touch $@

proto: setup ## Generate gen/python from protos/
	@rm -rf gen/python/slora
	@python -m grpc_tools.protoc -I protos --python_out=gen/python --pyi_out=gen/python \
		--grpc_python_out=gen/python $(PROTOS)

format: setup ## Format the code and the protos
	@ruff check -q --fix --unsafe-fixes . ; ruff format -q . && buf format -w

lint: setup ## Check style, types, protos, generated code and who imports whom
	ruff check .
	ruff format --check .
	buf lint
	buf format -d --exit-code
	mypy
	lint-imports
	python -m pytest -q tests/architecture

test: setup ## Run every test that needs no accelerator
	python -m pytest tests --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-gpu: setup ## Run the tests of the accelerator's kernels and runner, on an accelerator
	python -m pytest tests/kernels/gpu tests/gpu tests/unit/engine_memory/test_pinned_memory.py \
		tests/unit/engine_execution/test_gpu_runner.py tests/unit/engine_execution/test_step_branch.py \
		tests/unit/engine_execution/test_step_launches.py
	python -m tests.gpu.sanitize

test-compose: setup ## Bring docker-compose.yml up on a Docker engine and ask it; takes long, says so where none runs
	python -m pytest -v -s tests/deploy/compose_trial.py

release-check: setup ## Check that package, chart and images carry one version, and build them into dist/
	python deploy/release_check.py

bench: setup ## Measure the engine against transformers + PEFT on this machine's CPU
	python -m benchmarks.bench_cpu_throughput

bench-gpu: setup ## Measure on an accelerator: the engine's core, against transformers + PEFT, and all services
	python -m benchmarks.gpu.bench_engine
	python -m benchmarks.gpu.bench_peft
	python -m benchmarks.gpu.bench_services

demo: setup ## The whole path on this machine: S3, adapter store, engine, gateway, many adapters; ends by itself
	@python -m services.local demo

up: setup ## Keep it running: make up CHECKPOINT=dir ADAPTERS=dir-or-s3-uri [PORT=50051] [HTTP_PORT=8000] [UP_OPTIONS=...]
	@python -m services.local up $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)") \
		$(if $(ADAPTERS),--adapters "$(ADAPTERS)") $(if $(PORT),--port "$(PORT)") \
		$(if $(HTTP_PORT),--http-port "$(HTTP_PORT)") $(UP_OPTIONS)

down: setup ## Stop what `make up` started
	@python -m services.local down

clean: ## Remove the environment and what the demo cached; what `make up` was given stays in .slora/up
	rm -rf $(VENV) .slora/demo .slora/demo-cache out
