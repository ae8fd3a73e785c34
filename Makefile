# `make help` lists the targets. Everything runs in a virtual environment of its own, .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DATA ?= data

.DEFAULT_GOAL := help
.PHONY: help run test soak bench load profile lint format lock artifact-cuda clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/cpu: docker/requirements-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes -r docker/requirements-cpu.txt
	@touch $@

$(VENV)/dev: docker/requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes -r docker/requirements-dev.txt
	@touch $(VENV)/cpu $@

run: $(VENV)/cpu ## serve the bundled model on :8000
	$(BIN)/python -m app

test: $(VENV)/dev ## install what the tests need, then run the whole suite
	$(BIN)/python -m pytest $(ARGS)

soak: $(VENV)/dev ## 100,000 requests of mixed lengths: memory must stay flat
	$(BIN)/python -m pytest tests/test_soak.py --soak-requests 100000 -s

lint: $(VENV)/dev ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev ## rewrite files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev ## this server beside its ceiling, its floor and a plain script, in one run (about 4 minutes)
	$(BIN)/python -m loadtest.bench

load: $(VENV)/dev ## what the replica on :8000 carries, the autoscaling target that follows, and its proof (under 10 minutes)
	$(BIN)/python -m loadtest.capacity $(ARGS)
	$(BIN)/python -m loadtest.simulate capacity/report.json

profile: $(VENV)/dev ## where the CPU time of one request goes
	$(BIN)/python -m loadtest.budget

artifact-cuda: $(VENV)/dev ## derive the fp16 artifact for CUDA from the committed weights
	$(BIN)/python -m model.export --artifact model/sentiment --precision fp16 --out artifacts/sentiment-cuda

LOCK := pip-compile --quiet --upgrade --strip-extras --allow-unsafe --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host pyproject.toml

lock: $(VENV)/dev ## pin dependencies anew, by hash and without index addresses
	$(PIP) install pip-tools
	$(BIN)/$(LOCK) --extra cpu -o docker/requirements-cpu.txt
	$(BIN)/$(LOCK) --extra gpu -o docker/requirements-gpu.txt
	$(BIN)/$(LOCK) --extra cpu --extra dev -o docker/requirements-dev.txt

clean: ## remove what the other targets made
	rm -rf $(VENV) artifacts .mypy_cache .ruff_cache .pytest_cache .hypothesis
