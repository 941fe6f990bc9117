# Every target makes its own virtual environment in .venv and installs what it needs, once.
# A changed pyproject.toml installs again. PYTHON chooses the interpreter the environment is made with.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(VENV)/bin/pip install --quiet --disable-pip-version-check
SUITE := $(RUN) -m pytest

.PHONY: help demo test test-slow lint bench clean

help:
	@echo 'make demo       the main job: convert, quantize, sample, compare; prints a table'
	@echo 'make test       every test not marked slow'
	@echo 'make test-slow  the slow ones'
	@echo 'make lint       ruff: rules, import order, formatting'
	@echo 'make bench      time full precision against quantized layers at the "tiny" shapes'
	@echo 'make clean      remove .venv and what tests and the demo left behind'

# A stamp of its own: `venv` writes its first files long before pip is there.
$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

# What running needs.
$(VENV)/.installed: pyproject.toml | $(VENV)/.made
	$(INSTALL) --editable .
	@touch $@

# What testing needs: also PyTorch and diffusers (the reference the models are compared with) and libtpu
# (compiles for TPU slices, needs no TPU).
$(VENV)/.installed-test: pyproject.toml | $(VENV)/.made
	$(INSTALL) --editable '.[test,torch,tpu]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(RUN) -m experiments.demo

# Most of what the suites do is to compile programs that run for milliseconds: they are hardly optimized, and XLA's older
# code generator for CPUs takes half the time of its newer one. Where a release of XLA knows these options no longer,
# `make test COMPILER=` does without. Tests marked `optimized`, and those of real sizes, compile as users do.
# Compiling takes one core: files go to as many processes as there are cores.
COMPILER ?= --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
QUICKLY = JAX_DISABLE_MOST_OPTIMIZATIONS=1 XLA_FLAGS="$$XLA_FLAGS $(COMPILER)"
SHARED := --numprocesses auto --dist loadfile

test: $(VENV)/.installed-test
	$(QUICKLY) $(SUITE) -m 'not slow' $(SHARED)

# What compiled code prints before it ends a process goes past Python: only its own output is captured.
test-slow: $(VENV)/.installed-test
	$(QUICKLY) $(SUITE) -m slow --capture=sys $(SHARED)

lint: $(VENV)/.installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/.installed
	$(VENV)/bin/qvdjax bench --suite tiny

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info demo-output
	find qvdjax models conversion experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
