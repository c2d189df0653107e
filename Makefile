# SPDX-License-Identifier: Apache-2.0
# `make finetune` and `make test` work on a fresh machine: each sets up .venv first.
VENV   ?= .venv
PYTHON ?= $(firstword $(wildcard $(VENV)/bin/python) python3)
STEPS  ?= 60
OUT    ?= runs/quickstart
ARGS   ?=

PY    := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
BUILT_FROM := pyproject.toml constraints.txt $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow sanitize fuzz test-gpu check format bench finetune clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(STAMP)  ## .venv with the package (editable) and all it needs; again when the build files change

$(STAMP): $(BUILT_FROM)
	@PYTHON='$(PYTHON)' VENV='$(VENV)' bash .ci/setup
	@touch $@

test: $(STAMP)  ## the test suite
	@$(PY) -m pytest $(ARGS)

test-slow: $(STAMP)  ## the tests marked slow (no such test is no failure: pytest's exit code 5)
	@$(PY) -m pytest -m "slow and not gpu" $(ARGS) || { code=$$?; test $$code -eq 5 || exit $$code; }

fuzz: $(STAMP)  ## 100,000 hostile adapter files (make test takes 2,000)
	@FUZZ_INPUTS=100000 $(PY) -m pytest tests/test_fuzz.py tests/test_config_fuzz.py $(ARGS)

sanitize: $(STAMP)  ## the native extension's tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
	@bash .ci/sanitize $(PY) $(ARGS)

test-gpu: $(STAMP)  ## the tests marked gpu
	@$(PY) -m pytest -m gpu $(ARGS)

check: $(STAMP)  ## ruff, mypy --strict, the rules about who imports whom
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy --strict fastadapt
	@$(PY) -m pytest -q tests/test_imports.py

format: $(STAMP)  ## ruff's formatter and its safe fixes
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(STAMP)  ## real training steps against PEFT + bitsandbytes, interleaved
	@$(PY) bench/train.py $(ARGS)

finetune: $(STAMP)  ## fine-tune SmolLM2-135M in NF4 on real conversations (STEPS=5 for a short one)
	@$(PY) bench/quickstart.py --steps $(STEPS) --out $(OUT) $(ARGS)

clean:  ## caches and build outputs; .venv and runs/ stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks fastadapt/*.so
	@find fastadapt kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
