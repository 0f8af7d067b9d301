# What people and CI call. Every target makes its own virtual environment when it is missing or
# older than the pins; `make` alone lists the targets.
#
#   PYTHON=python3.12             the interpreter of the virtual environment
#   PIP_ARGS="--extra-index-url …" more options for pip (docs/development.md: a smaller torch)
#   JOBS=4                        processes of `make test`, each of which runs some of the tests
#   ARGS="--max-tokens 50"        more options for the command of `demo` and `serve`, or for pytest

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
JOBS ?= 2

BIN := .venv/bin
# Tests run engines beside busy processes: threads that wait for each other would collapse there.
test test-full: export OMP_NUM_THREADS := 1

RUN := .venv/run.stamp
DEV := .venv/dev.stamp
PINS := pyproject.toml constraints.txt
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

PROTOS := $(wildcard proto/mini_infer/v1/*.proto)
STUBS := services/common/mini_infer/v1
BASELINE := proto/baseline.binpb
protoc = $(BIN)/python -m grpc_tools.protoc -I proto \
	--python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTOS)

.PHONY: help install demo demo-eval serve proto proto-baseline proto-check format format-check \
	lint typecheck test test-full test-gpu soak bench ci

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.* ## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

install: $(DEV) ## everything for development, in .venv

demo: $(RUN) ## start all processes and stream a completion
	@$(BIN)/mini-infer demo $(ARGS)

demo-eval: $(RUN) ## judge 200 stories of the demo model
	@$(BIN)/python models/training/evaluate.py

serve: $(RUN) ## serve the demo model (ARGS="--model FOLDER" for another)
	@$(BIN)/mini-infer serve $(ARGS)

proto: $(DEV) ## generate the gRPC stubs
	$(call protoc,services/common)

proto-baseline: $(DEV) ## make today's proto files what later ones must stay compatible with
	$(BIN)/buf build -o $(BASELINE)

proto-check: $(DEV) ## stubs as generated, buf lint, format and breaking
	@generated=$$(mktemp -d) && trap 'rm -rf "$$generated"' EXIT && $(call protoc,$$generated) && \
	diff -r -x __init__.py -x __pycache__ "$$generated/mini_infer/v1" $(STUBS) || \
	{ echo "the stubs differ from proto/: run make proto" >&2; exit 1; }
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf breaking --against $(BASELINE)

format: $(DEV) ## format Python and proto files
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format
	$(BIN)/buf format --write

format-check: $(DEV)
	$(BIN)/ruff format --check

lint: $(DEV) ## ruff, and who may import whom
	$(BIN)/ruff check
	$(BIN)/lint-imports

typecheck: $(DEV) ## mypy, strict
	$(BIN)/mypy

test: $(DEV) ## every test but the slow ones
	@TIMEFORMAT='make test took %0R s'; time $(BIN)/pytest -n $(JOBS) -m "not slow and not gpu" $(ARGS)

test-full: $(DEV) ## every test that needs no GPU, with coverage of all processes
	@rm -f .coverage .coverage.*
	@TIMEFORMAT='make test-full took %0R s'; time $(BIN)/coverage run -m pytest -m "not gpu" $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

test-gpu: $(DEV) ## the tests that need a CUDA device
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else \
	"make test-gpu needs a CUDA device and a CUDA build of torch; this torch is " + torch.__version__)'
	@TIMEFORMAT='make test-gpu took %0R s'; time $(BIN)/pytest -m gpu $(ARGS)

soak: $(DEV) ## the scheduler against its model, 100,000 x 200 steps: hours
	@SOAK_EXAMPLES=$(or $(EXAMPLES),100000) SOAK_STEPS=200 \
	$(BIN)/pytest --timeout 0 tests/engine/test_scheduler_machine.py $(ARGS)

bench: $(DEV) ## speed on this CPU, beside transformers
	@$(BIN)/python benchmarks/cpu_baseline.py

ci: proto-check format-check lint typecheck test-full ## all that must pass before a change lands

$(RUN): $(PINS) | $(BIN)/pip
	@echo "Installing what a server needs into .venv: a few minutes the first time"
	$(PIP_INSTALL) -e '.[gateway,tokenizer,engine]'
	@touch $@

$(DEV): $(PINS) | $(BIN)/pip
	@echo "Installing what development needs into .venv: a few minutes the first time"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(RUN) $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "Mini-Infer needs Python 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv .venv
