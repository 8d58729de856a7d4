# What a newcomer and CI run. Each target makes what it needs, from a fresh clone on.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# What installs torch, the largest thing by far.
TORCH_INSTALL ?= $(BIN)/pip install

# What `make test` gives to pytest, and what it installs effdense with: test,peers adds other libraries.
TESTS ?=
EXTRAS ?= test

# `make gpu`: where the report goes and how long it may take. It uses PYTHON as it is and installs nothing.
OUT ?= build/gpu/report
BUDGET ?= 8m

# `make fuzz`: for how long, in all, and which targets (a part of their names; nothing: all).
SECONDS ?= 600
ONLY ?=

# `make wheels`: one for each of these pairs.
PYTHONS ?= $(PYTHON)
TORCHES ?= $(TORCH)

RUFF := ruff==0.17.6
# The last: what benchmarks and tests import, for its types.
LINT_TOOLS := $(RUFF) clang-format==23.1.5 mypy==2.4.1 basedpyright==1.40.2 hypothesis numpy pillow pytest rich
# ruff formats the signatures.
DOCS_TOOLS := mkdocs-material==9.8.2 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11 $(RUFF)

BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find build_backend csrc effdense -type f -not -name '*.pyc')
CPP := $(shell find csrc harness tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.inc')

# Stamps: which torch is there, whether effdense is as its sources are, and with which extra.
TORCH_STAMP := $(VENV)/.torch-$(firstword $(shell echo '$(TORCH)' | cksum))
TEST_STAMP := $(VENV)/.effdense-$(EXTRAS)
DEMO_STAMP := $(VENV)/.effdense-bench
LINT_STAMP := $(VENV)/.lint-$(firstword $(shell echo '$(LINT_TOOLS)' | cksum))
DOCS_STAMP := $(VENV)/.docs-$(firstword $(shell echo '$(DOCS_TOOLS)' | cksum))

.PHONY: help torch install test fuzz demo gpu lint format docs wheels clean

help:
	@echo 'make torch    install torch in $(VENV)'
	@echo 'make install  install effdense in $(VENV)'
	@echo 'make test     install effdense in $(VENV) and run its tests'
	@echo 'make fuzz     fuzz operators, modules, convert and the readers of files (SECONDS=, ONLY=)'
	@echo 'make demo     install effdense in $(VENV) and compare it with plain PyTorch on real images'
	@echo 'make gpu      build for the GPU of this machine, check and time it, offline, with $(PYTHON) (OUT=, BUDGET=)'
	@echo 'make lint     check formatting, style and types'
	@echo 'make format   put the sources into the agreed format'
	@echo 'make docs     write the documentation to build/docs, with an API reference; warnings are errors'
	@echo 'make wheels   build, repair and test wheels in build/wheels (PYTHONS="python3.11 ...", TORCHES="torch==2.13.0 ...")'
	@echo 'make clean    remove what the above made, $(VENV) too'
	@echo
	@echo 'PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH="$(TORCH)" can be set, e.g.'
	@echo '    make test VENV=.venv-cuda TORCH="torch==2.14.1 torchvision==0.29.1" EXTRAS=test,peers'

torch: $(TORCH_STAMP)

install: $(TEST_STAMP)

test: $(TEST_STAMP)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(TESTS)

fuzz: $(TEST_STAMP)
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --only '$(ONLY)'

demo: $(DEMO_STAMP)
	$(BIN)/python -m benchmarks.demo

gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT) --budget $(BUDGET)

lint: $(LINT_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(LINT_STAMP)
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheels:
	$(PYTHON) build_backend/wheels.py --pythons $(PYTHONS) --torches $(TORCHES) --out build/wheels

clean:
	rm -rf $(VENV) build dist effdense.egg-info _effdense*.so .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(TORCH_STAMP): $(VENV)/.venv
	@rm -f $(VENV)/.torch-*
	$(TORCH_INSTALL) $(TORCH)
	@touch $@

# build/lib* would put modules that have been renamed since into the wheel.
$(VENV)/.effdense-%: $(TORCH_STAMP) $(SOURCES)
	rm -rf build/lib*
	$(BIN)/pip install '.[$*]'
	@touch $@

# The API reference is read from the sources: without torch.
$(DOCS_STAMP): $(VENV)/.venv
	$(BIN)/pip install $(DOCS_TOOLS)
	@touch $@

# With torch, because mypy reads its types.
$(LINT_STAMP): $(TORCH_STAMP)
	$(BIN)/pip install $(LINT_TOOLS)
	@touch $@
